"""Logits of whole prompts, many a step, beside the requests there are: nothing is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fastkernels.errors import RequestError
from fastkernels.runtime.pack import StepPacker
from fastkernels.runtime.scheduler import Batch, Request, Scheduler
from fastkernels.runtime.step import StepBuffers


class HeadExecutor(Protocol):
    """What is asked of ``runtime.executor.Executor``."""

    inputs: StepBuffers

    def run_body(self, num_tokens: int) -> None: ...

    def run_head(self, num_logits: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class LogitsPiece:
    """logits: [n, vocab_size] on the device, valid until the next piece is asked for
    prompts, positions: [n]: the prompt, and the token of it, that each row comes after
    """

    prompts: np.ndarray
    positions: np.ndarray
    logits: torch.Tensor


@dataclass(frozen=True)
class PromptLogprobs:
    """logprobs: fp32 [n], natural, of a prompt's last n tokens; greedy: bool [n], which are likeliest"""

    logprobs: torch.Tensor
    greedy: torch.Tensor


def prompt_logits(
    executor: HeadExecutor,
    scheduler: Scheduler,
    packer: StepPacker,
    padded: Callable[[int], int],
    prompts: Sequence[np.ndarray],
    firsts: Sequence[int],
) -> Iterator[LogitsPiece]:
    """Of every prompt, i32 [num_tokens], what the model says after each token from its number ``first`` on.

    padded: rows that a step of so many tokens runs with
    Prompts go through in their order, in chunks; pieces of one come in the order of its tokens. The head
    takes at most max_num_seqs rows at a time, so it runs several times over one body. Raises RequestError
    while there is no row or too few pages left for a prompt.
    """
    inputs = executor.inputs
    waiting = [Request.from_prompt(index, prompt, 0) for index, prompt in enumerate(prompts)][::-1]
    active: list[Request] = []
    try:
        while waiting or active:
            budget = scheduler.max_num_tokens - sum(_left(request) for request in active)
            while waiting and budget > 0:
                row = scheduler.borrow_row(waiting[-1].num_tokens)
                if row is None:
                    break
                active.append(waiting.pop())
                active[-1].row = row
                budget -= _left(active[-1])
            if not active:
                needed = scheduler.kv_cache.pages_for(waiting[-1].num_tokens)
                raise RequestError(
                    f"logits of {waiting[-1].num_tokens} tokens need a row and {needed} KV pages, and "
                    f"beside the requests that run {scheduler.kv_cache.num_free} pages are free; ask again "
                    "when some have ended"
                )
            batch = _next_batch(active, scheduler.max_num_tokens)
            num_rows = padded(batch.num_tokens)
            owners = np.repeat([request.request_id for request in batch.requests], batch.counts)
            positions = np.concatenate(
                [np.arange(s, s + c) for s, c in zip(batch.starts, batch.counts, strict=True)]
            )
            wanted = np.flatnonzero(positions >= np.asarray(firsts)[owners])
            for begin in range(0, max(len(wanted), 1), inputs.max_num_seqs):
                rows = wanted[begin : begin + inputs.max_num_seqs]
                pages = packer.pack(batch, num_rows)
                inputs.host.logits_indices[: len(rows)] = rows
                inputs.upload(pages)
                if begin == 0:
                    executor.run_body(num_rows)
                if len(rows):
                    yield LogitsPiece(owners[rows], positions[rows], executor.run_head(len(rows)))
            for request, count in zip(batch.requests, batch.counts, strict=True):
                request.num_computed += count
                if not _left(request):
                    active.remove(request)
                    scheduler.return_row(request.row)
    finally:
        for request in active:
            scheduler.return_row(request.row)


def score_prompts(
    pieces: Iterable[LogitsPiece], prompts: Sequence[np.ndarray], firsts: Sequence[int]
) -> list[PromptLogprobs]:
    """Of each prompt's tokens from number ``first`` on; ``pieces`` are of the prompts less their last token.

    Reduced on the device, and read once all is launched.
    """
    ids, begins = np.concatenate(prompts), np.cumsum([0, *map(len, prompts)])
    found = [torch.empty(len(p) - first) for p, first in zip(prompts, firsts, strict=True)]
    greedy = [torch.empty(one.shape, dtype=torch.bool) for one in found]
    reduced = []
    with torch.inference_mode():
        for piece in pieces:
            targets = torch.from_numpy(ids[begins[piece.prompts] + piece.positions + 1]).to(
                piece.logits.device, torch.int64
            )
            logits = piece.logits.float()
            taken = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
            reduced.append((piece.prompts, piece.positions, taken, logits.argmax(1) == targets))
    for owners, positions, taken, likeliest in reduced:
        taken, likeliest = taken.cpu(), likeliest.cpu()
        for prompt in np.unique(owners):
            rows = np.flatnonzero(owners == prompt)
            at = slice(positions[rows[0]] + 1 - firsts[prompt], positions[rows[-1]] + 2 - firsts[prompt])
            found[prompt][at], greedy[prompt][at] = taken[rows], likeliest[rows]
    return [PromptLogprobs(*both) for both in zip(found, greedy, strict=True)]


def _left(request: Request) -> int:
    return request.num_tokens - request.num_computed


def _next_batch(active: Sequence[Request], max_num_tokens: int) -> Batch:
    """The oldest first, as far as the tokens reach; by rows, as steps are."""
    counts: dict[int, int] = {}
    for request in active:
        count = min(_left(request), max_num_tokens - sum(counts.values()))
        if count:
            counts[request.request_id] = count
    requests = sorted((r for r in active if r.request_id in counts), key=lambda request: request.row)
    return Batch(
        requests,
        [request.num_computed for request in requests],
        [counts[request.request_id] for request in requests],
        sampled=[False] * len(requests),
        num_tokens=sum(counts.values()),
        decodes_only=False,
    )
