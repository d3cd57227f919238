"""sample: greedy, and drawn from the likeliest tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Case, ResultError, Row, run_cases
from benchmarks.shapes import shapes_for
from fastkernels import ops

TOP_K, TOP_P = 50, 0.9


class Inputs(NamedTuple):
    logits: torch.Tensor  # [num_seqs, vocab_size]
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    steps: torch.Tensor
    out_ids: torch.Tensor
    out_logprobs: torch.Tensor


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    ways: tuple[tuple[str, float, int, float, str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
        ("greedy", 0.0, 0, 1.0, "torch argmax", _greedy),
        (f"top-k {TOP_K}, top-p {TOP_P}", 1.0, TOP_K, TOP_P, "torch topk, softmax, draw", _top_k_top_p),
        (f"top-p {TOP_P}", 1.0, 0, TOP_P, "torch sort, softmax, draw", _top_p),
    )
    sizes = [(num_seqs, shapes.vocab_size, "") for num_seqs in shapes.seqs]
    if not quick:
        sizes.append((64, 262_144, " of 256k"))
    for way, temperature, top_k, top_p, peer, by_torch in ways:
        for num_seqs, vocab_size, of in sizes:
            rows = "1 row" if num_seqs == 1 else f"{num_seqs} rows"
            yield _case(
                f"{way}, {rows}{of}",
                num_seqs,
                vocab_size,
                shapes.dtype,
                device,
                (temperature, top_k, top_p),
                {peer: lambda i, by_torch=by_torch: lambda: by_torch(i.logits)},
            )


def _case(
    name: str,
    num_seqs: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    parameters: tuple[float, int, float],
    peers: dict[str, Any],
) -> Case:
    temperature, top_k, top_p = parameters

    def make() -> Inputs:
        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_seqs,), value, dtype=dtype, device=device)

        return Inputs(
            torch.randn(num_seqs, vocab_size, device=device).mul_(3.0).to(dtype),
            full(temperature, torch.float32),
            full(top_k, torch.int32),
            full(top_p, torch.float32),
            full(0.0, torch.float32),
            torch.arange(num_seqs, device=device),
            full(0, torch.int32),
            full(-1, torch.int32),
            full(0.0, torch.float32),
        )

    def ours(i: Inputs):
        def call() -> torch.Tensor:
            rest = (i.temperature, i.top_k, i.top_p, i.min_p, i.seeds, i.steps)
            return ops.sample(i.logits, *rest, out_ids=i.out_ids, out_logprobs=i.out_logprobs)[0]

        return call

    def least_logit(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and the smallest of each row that may be drawn."""
        kept, _ = i.logits.float().sort(descending=True)
        kept = kept[:, : 1 if temperature == 0 else top_k or None]
        before = kept.softmax(-1).cumsum(-1) - kept.softmax(-1)
        last = (before < top_p).sum(-1, keepdim=True).sub_(1)
        return i.logits.clone(), kept.gather(1, last)

    def compare(ids: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], dtype: str) -> None:
        logits, least = expected
        drawn = logits.float().gather(1, ids.long()[:, None])
        if not bool(
            (drawn >= least - 0.02 * least.abs()).all()
        ):  # sums in fp32 may differ by a token at the edge
            raise ResultError("a token was drawn that the filters should have left out")

    return Case(
        "sample",
        name,
        dtype,
        make=make,
        ours=ours,
        expect=least_logit,
        compare=compare,
        num_bytes=num_seqs * vocab_size * dtype.itemsize,
        peers=peers,
    )


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def _top_k_top_p(logits: torch.Tensor) -> torch.Tensor:
    scores, ids = logits.float().topk(min(TOP_K, logits.shape[1]), dim=-1)
    return _draw(scores, ids)


def _top_p(logits: torch.Tensor) -> torch.Tensor:
    scores, ids = logits.float().sort(descending=True, dim=-1)
    return _draw(scores, ids)


def _draw(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """From the fewest of the sorted scores that reach TOP_P. torch.multinomial would wait for the GPU."""
    probabilities = scores.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= TOP_P
    race = probabilities.masked_fill_(outside, 0.0) / torch.empty_like(probabilities).exponential_(1.0)
    return ids.gather(1, race.argmax(-1, keepdim=True)).squeeze(1)
