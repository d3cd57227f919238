"""Where an engine's memory goes, in bytes, and how many KV pages fit in what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from fastkernels.compiler.memory import arena_layout, item_bytes
from fastkernels.compiler.plan import Plan


class EngineMemoryError(MemoryError):
    """What was asked for does not fit; the message is the arithmetic."""


@dataclass(frozen=True)
class Ledger:
    """available_bytes: what the engine may use in all; None: not limited.

    arena_unshared_bytes: what the arena would be if its buffers shared nothing, for comparison only
    """

    weights_bytes: int
    arena_bytes: int
    workspaces_bytes: int
    graphs_bytes: int
    kv_bytes_per_page: int
    num_pages: int = 0
    page_size: int = 16
    arena_unshared_bytes: int = 0
    available_bytes: int | None = None

    @property
    def fixed_bytes(self) -> int:
        """All but the KV pages."""
        return self.weights_bytes + self.arena_bytes + self.workspaces_bytes + self.graphs_bytes

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.kv_bytes_per_page

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.kv_bytes

    @property
    def parts(self) -> Mapping[str, int]:
        """Name -> bytes, in the order of the sentence."""
        return {
            "weights": self.weights_bytes,
            "arena": self.arena_bytes,
            "workspaces": self.workspaces_bytes,
            "graphs": self.graphs_bytes,
        }

    def kv_pages_that_fit(self, available_bytes: int | None = None, *, at_least: int = 1) -> int:
        """Pages that the bytes left by all else hold; ``available_bytes`` of the ledger when None is given.

        Raises EngineMemoryError when fewer than ``at_least`` fit, and ValueError without a limit.
        """
        available = self.available_bytes if available_bytes is None else available_bytes
        if available is None:
            raise ValueError("kv_pages_that_fit needs available_bytes; this ledger has no limit")
        pages = max(available - self.fixed_bytes, 0) // self.kv_bytes_per_page
        if pages < at_least:
            needs = self.fixed_bytes + at_least * self.kv_bytes_per_page
            raise EngineMemoryError(
                f"no memory for the KV cache: {replace(self, num_pages=at_least).sentence()}, "
                f"{needs - available:,} bytes more than the {format_bytes(available)} available; lower "
                "max_num_tokens, max_num_seqs or max_seq_len, or give the engine more memory"
            )
        return pages

    def with_pages(self, num_pages: int) -> Ledger:
        return replace(self, num_pages=num_pages)

    def sentence(self) -> str:
        """The sum written out: weights 14.96 GiB + arena ... = total."""
        parts = [f"{name} {format_bytes(size)}" for name, size in self.parts.items()]
        pages = (
            f"{self.num_pages:,} KV pages of {self.page_size} tokens x "
            f"{format_bytes(self.kv_bytes_per_page)} = {format_bytes(self.kv_bytes)}"
        )
        return f"{' + '.join(parts)} + {pages}: together {format_bytes(self.total_bytes)}"


def kv_bytes_per_page(plan: Plan, page_size: int, element_bytes: int) -> int:
    """Bytes of one page in the caches of all layers: [2, num_kv_heads, page_size, head_dim] each.

    element_bytes: of the model's dtype
    """
    elements = 2 * plan.config.num_kv_heads * page_size * plan.config.head_dim
    return elements * sum(item_bytes(cache.dtype, element_bytes) for cache in plan.kv_caches)


def weights_bytes(plan: Plan, element_bytes: int) -> int:
    """element_bytes: of the model's dtype"""
    return sum(prod(spec.shape) * item_bytes(spec.dtype, element_bytes) for spec in plan.weights.values())


def estimate(
    plan: Plan,
    *,
    max_num_tokens: int,
    max_num_seqs: int,
    max_seq_len: int,
    page_size: int,
    element_bytes: int,
    workspaces_bytes: int = 0,
    graphs_bytes: int = 0,
    available_bytes: int | None = None,
) -> Ledger:
    """The ledger of an engine for ``plan``, by arithmetic alone: nothing is allocated.

    workspaces_bytes: step buffers and attention workspace; the rotary table is added here
    """
    arena = arena_layout(
        plan, max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs, element_bytes=element_bytes
    )
    table_bytes = max_seq_len * plan.config.rotary_dim * 4
    return Ledger(
        weights_bytes=weights_bytes(plan, element_bytes),
        arena_bytes=arena.size_bytes,
        workspaces_bytes=workspaces_bytes + table_bytes,
        graphs_bytes=graphs_bytes,
        kv_bytes_per_page=kv_bytes_per_page(plan, page_size, element_bytes),
        page_size=page_size,
        arena_unshared_bytes=arena.unshared_bytes,
        available_bytes=available_bytes,
    )


def format_bytes(size_bytes: int) -> str:
    """In the largest binary unit that leaves at least 1."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size_bytes:,} B" if unit == "B" else f"{size:.2f} {unit}"
