"""Writes a batch into the host's side of the step block."""

from __future__ import annotations

import numpy as np

from fastkernels.runtime.kv_cache import KVCache
from fastkernels.runtime.scheduler import Batch
from fastkernels.runtime.step import HostStep, StepBuffers


class StepPacker:
    """Turns batches into the contents of ``StepBuffers``; only numpy, and no loop over tokens.

    Page tables are kept up to date from the changes the cache reports, for each host block on its own: a
    decode step touches the few entries that are new, not the whole table.
    """

    def __init__(self, inputs: StepBuffers, kv_cache: KVCache) -> None:
        self._inputs = inputs
        self._kv_cache = kv_cache
        self._changes: list[list[tuple[int, int]]] = [[] for _ in range(inputs.num_blocks)]
        self._shift = kv_cache.page_size.bit_length() - 1
        self._ascending = np.arange(
            max(inputs.max_num_tokens, inputs.max_pages_per_seq * kv_cache.page_size), dtype=np.int32
        )
        self._counts_by_row = np.zeros(inputs.max_num_seqs, dtype=np.int32)

    def pack(self, batch: Batch, padded_num_tokens: int) -> int:
        """Writes the batch, padded to padded_num_tokens tokens; returns the pages of its longest sequence.

        Padding writes no key or value (slot -1) and belongs to no sequence. The sampler writes its own
        fields.
        """
        host = self._inputs.advance()
        self._update_page_table(host)
        num_tokens = batch.num_tokens
        rows = np.array([request.row for request in batch.requests], dtype=np.intp)
        starts = np.array(batch.starts, dtype=np.int32)
        counts = np.array(batch.counts, dtype=np.int32)
        ends = starts + counts

        host.seq_lens.fill(0)
        host.seq_lens[rows] = ends
        self._counts_by_row.fill(0)
        self._counts_by_row[rows] = counts
        np.cumsum(self._counts_by_row, out=host.cu_seqlens_q[1:])

        positions = host.positions[:num_tokens]
        if batch.decodes_only:
            host.token_ids[:num_tokens] = [
                r.tokens[start] if r.num_known > start else -1 - r.pending_row
                for r, start in zip(batch.requests, batch.starts, strict=True)
            ]
            positions[:] = starts
            host.logits_indices[:num_tokens] = self._ascending[:num_tokens]
            rows_of_tokens = rows
        else:
            self._write_chunks(host, batch)
            rows_of_tokens = np.repeat(rows, counts)
            last = np.cumsum(counts) - 1
            host.logits_indices[: len(batch.samples)] = last[batch.sampled]
        pages = host.page_table[rows_of_tokens, positions >> self._shift]
        offsets = positions & (self._kv_cache.page_size - 1)
        host.slot_mapping[:num_tokens] = (pages.astype(np.int64) << self._shift) + offsets

        host.token_ids[num_tokens:padded_num_tokens] = 0
        host.positions[num_tokens:padded_num_tokens] = 0
        host.slot_mapping[num_tokens:padded_num_tokens] = -1
        host.logits_indices[len(batch.samples) :] = 0
        for logits_row, request in enumerate(batch.samples):
            request.pending_row = logits_row
        return self._kv_cache.pages_for(int(ends.max()))

    def _write_chunks(self, host: HostStep, batch: Batch) -> None:
        begin = 0
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            end = begin + count
            if request.num_known > start:
                host.token_ids[begin:end] = request.tokens[start : start + count]
            else:
                host.token_ids[begin] = -1 - request.pending_row
            host.positions[begin:end] = self._ascending[start : start + count]
            begin = end

    def _update_page_table(self, host: HostStep) -> None:
        new = self._kv_cache.changes
        if new:
            for changes in self._changes:
                changes.extend(new)
            new.clear()
        changes = self._changes[self._inputs.current]
        for row, first in changes:
            pages = self._kv_cache.pages[row]
            host.page_table[row, first : len(pages)] = pages[first:]
        changes.clear()
