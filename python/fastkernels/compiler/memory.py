"""One arena for all that a step computes: buffers that are never alive together share memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastkernels.compiler.plan import Plan

ALIGNMENT_BYTES = 256


def item_bytes(dtype: str, element_bytes: int) -> int:
    """Of an element of a buffer or weight; element_bytes: of the model's dtype."""
    return element_bytes if dtype == "model" else int(getattr(torch, dtype).itemsize)


@dataclass(frozen=True)
class Lifetime:
    """A buffer from the step that first touches it to the last that does, both included."""

    name: str
    size_bytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Some step needs both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class ArenaLayout:
    """offsets: buffer -> bytes from the arena's start; unshared_bytes: what the buffers take side by side."""

    offsets: Mapping[str, int]
    size_bytes: int
    unshared_bytes: int


def arena_layout(plan: Plan, *, max_num_tokens: int, max_num_seqs: int, element_bytes: int) -> ArenaLayout:
    """Places every arena buffer of ``plan`` for steps of at most max_num_tokens rows and max_num_seqs logits
    rows.

    element_bytes: of the model's dtype
    """
    lifetimes = arena_lifetimes(
        plan, max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs, element_bytes=element_bytes
    )
    offsets, size_bytes = place(lifetimes)
    return ArenaLayout(offsets, size_bytes, sum(_aligned(life.size_bytes) for life in lifetimes))


def arena_lifetimes(
    plan: Plan, *, max_num_tokens: int, max_num_seqs: int, element_bytes: int
) -> list[Lifetime]:
    """The lifetimes of the plan's arena buffers; that of an alias counts for the buffer it is part of.

    What the body hands to the head, and the logits, live to the end: the head may run several times after one
    body.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(plan.steps):
        for name in (*step.inputs, *step.outputs):
            root = plan.root(name)
            if root.kind == "arena":
                first.setdefault(root.name, index)
                last[root.name] = index
    end = len(plan.steps)
    lifetimes = []
    for name, begin in first.items():
        buffer = plan.buffers[name]
        crosses = begin < plan.head_start <= last[name]
        stop = end if crosses or name == plan.root(plan.output).name else last[name]
        rows = max_num_seqs if buffer.rows == "logits" else max_num_tokens
        row_bytes = buffer.row_size * item_bytes(buffer.dtype, element_bytes)
        lifetimes.append(Lifetime(name, rows * row_bytes, begin, stop))
    return lifetimes


def place(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets, multiples of ALIGNMENT_BYTES, such that no two that meet overlap; and the end of the last.

    Greedy by size: the largest first, each in the smallest gap that fits it between those placed that it
    meets.
    Source: Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference", section 5.
    """
    placed: list[tuple[int, int, Lifetime]] = []  # begin, end
    offsets: dict[str, int] = {}
    for life in sorted(lifetimes, key=lambda life: (-life.size_bytes, life.first)):
        size = _aligned(life.size_bytes)
        best, best_gap, cursor = None, None, 0
        for begin, end, other in placed:  # kept sorted by begin
            if not life.meets(other):
                continue
            gap = begin - cursor
            if gap >= size and (best_gap is None or gap < best_gap):
                best, best_gap = cursor, gap
            cursor = max(cursor, end)
        offset = cursor if best is None else best
        offsets[life.name] = offset
        placed.append((offset, offset + size, life))
        placed.sort(key=lambda entry: entry[0])
    return offsets, max((end for _, end, _ in placed), default=0)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
