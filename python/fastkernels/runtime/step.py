"""All that varies from step to step, in one block: the host writes it, one copy moves it, kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_ALIGN_INTS = 16  # fields begin on 64 bytes


@dataclass(slots=True)
class HostStep:
    """numpy views of the host's side of one block. T = max_num_tokens, S = max_num_seqs.

    A row is a sequence's place in page_table, seq_lens and cu_seqlens_q; it keeps the same row as long as it
    runs, and rows without tokens in a step have cu_seqlens_q[row] == cu_seqlens_q[row + 1]. Sampling fields
    go by logits row.
    """

    slot_mapping: np.ndarray  # i64 [T]; page * page_size + offset; -1 writes nothing
    seeds: np.ndarray  # i64 [S]
    token_ids: np.ndarray  # i32 [T]; -r - 1: the id sampled from logits row r of the step before
    positions: np.ndarray  # i32 [T]
    seq_lens: np.ndarray  # i32 [S], counting this step's tokens; 0 without a sequence
    cu_seqlens_q: np.ndarray  # i32 [S + 1]
    logits_indices: np.ndarray  # i32 [S]; the token whose hidden state logits row r comes from
    temperature: np.ndarray  # f32 [S]; 0 is greedy
    top_p: np.ndarray  # f32 [S]; 1 is off
    min_p: np.ndarray  # f32 [S]; 0 is off
    top_k: np.ndarray  # i32 [S]; 0 is off
    sample_steps: np.ndarray  # i32 [S]; index of the sampled token in its sequence
    slots: np.ndarray  # i32 [S]; row in the table of token counts; -1: no penalties
    repetition_penalty: np.ndarray  # f32 [S]; 1 is off
    presence_penalty: np.ndarray  # f32 [S]; 0 is off
    frequency_penalty: np.ndarray  # f32 [S]; 0 is off
    page_table: np.ndarray  # i32 [S, max_pages_per_seq], strides (1, S)


class StepBuffers:
    """The block on the device, whose addresses never change, and the pinned host blocks copied into it.

    Fields of ``HostStep`` as torch views of the device block are attributes of this object; ``host`` is the
    host's side that is being written. Two host blocks alternate, since the host packs step n + 1 while step n
    may still be copied; ``advance`` switches and waits until the block is free. On the CPU there is one
    block, host's and device's.

    page_table lies last and pages-major, so that a step copies one prefix of the block, as long as its
    longest sequence needs.

    sampled, sampled_logprobs: i32 and f32 [max_num_seqs] on the device, not part of the block: what the
    sampler drew in the last step, by logits row; negative token ids refer to it.
    """

    slot_mapping: torch.Tensor
    seeds: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    logits_indices: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    sample_steps: torch.Tensor
    slots: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    page_table: torch.Tensor

    def __init__(
        self, max_num_tokens: int, max_num_seqs: int, max_pages_per_seq: int, device: torch.device | str
    ) -> None:
        self.max_num_tokens = max_num_tokens
        self.max_num_seqs = max_num_seqs
        self.max_pages_per_seq = max_pages_per_seq
        self.device = torch.device(device)
        tokens, seqs = max_num_tokens, max_num_seqs
        sizes: dict[str, tuple[str, int]] = {
            "slot_mapping": ("i64", tokens),
            "seeds": ("i64", seqs),
            "token_ids": ("i32", tokens),
            "positions": ("i32", tokens),
            "seq_lens": ("i32", seqs),
            "cu_seqlens_q": ("i32", seqs + 1),
            "logits_indices": ("i32", seqs),
            "temperature": ("f32", seqs),
            "top_p": ("f32", seqs),
            "min_p": ("f32", seqs),
            "top_k": ("i32", seqs),
            "sample_steps": ("i32", seqs),
            "slots": ("i32", seqs),
            "repetition_penalty": ("f32", seqs),
            "presence_penalty": ("f32", seqs),
            "frequency_penalty": ("f32", seqs),
        }
        spans: dict[str, tuple[str, int, int]] = {}
        end = 0
        for name, (kind, size) in sizes.items():
            begin = -(-end // _ALIGN_INTS) * _ALIGN_INTS
            end = begin + size * (2 if kind == "i64" else 1)
            spans[name] = (kind, begin, end)
        self._page_table_begin = -(-end // _ALIGN_INTS) * _ALIGN_INTS
        num_ints = self._page_table_begin + max_pages_per_seq * seqs

        on_gpu = self.device.type == "cuda"
        self._block = torch.zeros(num_ints, dtype=torch.int32, device=self.device)
        if on_gpu:
            self._host_blocks = [torch.zeros(num_ints, dtype=torch.int32, pin_memory=True) for _ in range(2)]
            self._copied = [torch.cuda.Event() for _ in range(2)]
        else:
            self._host_blocks, self._copied = [self._block], []
        self._hosts = [self._host_views(block.numpy(), spans) for block in self._host_blocks]
        self._current = 0
        self.host = self._hosts[0]

        torch_dtypes = {"i64": torch.int64, "i32": torch.int32, "f32": torch.float32}
        for name, (kind, begin, stop) in spans.items():
            setattr(self, name, self._block[begin:stop].view(torch_dtypes[kind]))
        self.page_table = self._block[self._page_table_begin :].view(max_pages_per_seq, seqs).t()
        self.sampled = torch.zeros(seqs, dtype=torch.int32, device=self.device)
        self.sampled_logprobs = torch.zeros(seqs, dtype=torch.float32, device=self.device)

    def _host_views(self, block: np.ndarray, spans: dict[str, tuple[str, int, int]]) -> HostStep:
        dtypes = {"i64": np.int64, "i32": np.int32, "f32": np.float32}
        views = {name: block[begin:end].view(dtypes[kind]) for name, (kind, begin, end) in spans.items()}
        table = block[self._page_table_begin :].reshape(self.max_pages_per_seq, self.max_num_seqs).T
        host = HostStep(**views, page_table=table)
        host.slot_mapping.fill(-1)
        host.slots.fill(-1)
        host.top_p.fill(1.0)
        host.repetition_penalty.fill(1.0)
        return host

    @property
    def num_blocks(self) -> int:
        """Host blocks that alternate: 2, or 1 on the CPU."""
        return len(self._host_blocks)

    @property
    def current(self) -> int:
        """Index of the host block that ``host`` views."""
        return self._current

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        return 4 * (self._block.numel() + 2 * self.max_num_seqs)

    def advance(self) -> HostStep:
        """Switches to the next host block, waits until its last copy is done, and returns it."""
        if self._copied:
            self._current ^= 1
            self._copied[self._current].synchronize()
            self.host = self._hosts[self._current]
        return self.host

    def upload(self, max_pages_used: int) -> None:
        """Enqueues the copy to the device, of the page table max_pages_used pages a sequence."""
        if not self._copied:
            return
        num_ints = self._page_table_begin + max_pages_used * self.max_num_seqs
        self._block[:num_ints].copy_(self._host_blocks[self._current][:num_ints], non_blocking=True)
        self._copied[self._current].record()
