"""embedding: rows of a table that is far larger than any cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Row, run_cases
from benchmarks.shapes import shapes_for, tokens_label
from fastkernels import ops


class Inputs(NamedTuple):
    token_ids: torch.Tensor  # [num_tokens] int32
    out: torch.Tensor  # [num_tokens, hidden_size]


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    table = torch.randn(shapes.vocab_size, shapes.hidden_size, dtype=shapes.dtype, device=device)
    for num_tokens in shapes.tokens:
        yield _case(num_tokens, table)


def _case(num_tokens: int, table: torch.Tensor) -> Case:
    vocab_size, hidden_size = table.shape

    def make() -> Inputs:
        token_ids = torch.randint(vocab_size, (num_tokens,), dtype=torch.int32, device=table.device)
        return Inputs(token_ids, table.new_empty(num_tokens, hidden_size))

    return Case(
        "embedding",
        tokens_label(num_tokens),
        table.dtype,
        make=make,
        ours=lambda i: lambda: ops.embedding(i.token_ids, table, out=i.out),
        expect=lambda i: table[i.token_ids.long()],
        num_bytes=2 * num_tokens * hidden_size * table.dtype.itemsize,
        peers={"torch F.embedding": lambda i: lambda: F.embedding(i.token_ids, table)},
    )
