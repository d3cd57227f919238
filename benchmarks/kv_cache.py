"""copy_pages: pages of all layers copied within the caches, and swapped to pinned host memory and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Case, Row, close, run_cases
from benchmarks.shapes import Shapes, shapes_for
from fastkernels import ops

NUM_LAYERS = 32
PAGE_SIZE = 16


class Inputs(NamedTuple):
    caches: torch.Tensor  # [NUM_LAYERS, num_pages, 2, num_kv_heads, PAGE_SIZE, head_dim]
    sources: torch.Tensor  # like caches; caches itself where pages are copied within them
    from_pages: torch.Tensor  # [num_pairs] int32
    to_pages: torch.Tensor


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    for num_pairs in (1, 16) if quick else (1, 16, 128):
        yield _within(num_pairs, shapes, device)
    if device.type == "cuda":
        for to_host in (True, False):
            yield _swap(64, shapes, device, to_host)


def _caches(num_pages: int, s: Shapes, device: torch.device) -> torch.Tensor:
    return torch.randn(
        NUM_LAYERS, num_pages, 2, s.num_kv_heads, PAGE_SIZE, s.head_dim, dtype=s.dtype, device=device
    )


def _num_bytes(num_pairs: int, s: Shapes) -> int:
    return 2 * NUM_LAYERS * num_pairs * 2 * s.num_kv_heads * PAGE_SIZE * s.head_dim * s.dtype.itemsize


def _label(name: str, num_pairs: int) -> str:
    return f"{name}, {num_pairs} page{'s' if num_pairs > 1 else ''} of {NUM_LAYERS} layers"


def _within(num_pairs: int, s: Shapes, device: torch.device) -> Case:
    def make() -> Inputs:
        caches = _caches(2 * num_pairs, s, device)
        pages = torch.randperm(2 * num_pairs, dtype=torch.int32, device=device)
        return Inputs(caches, caches, pages[:num_pairs], pages[num_pairs:])

    def ours(i: Inputs):
        layers = list(i.caches.unbind(0))
        return lambda: (ops.copy_pages(layers, i.from_pages, i.to_pages), i.caches)[1]

    def by_layer(i: Inputs):
        from_pages, to_pages = i.from_pages.long(), i.to_pages.long()

        def call() -> torch.Tensor:
            for cache in i.caches.unbind(0):
                cache.index_copy_(0, to_pages, cache.index_select(0, from_pages))
            return i.caches

        return call

    return Case(
        "copy_pages",
        _label("within", num_pairs),
        s.dtype,
        make=make,
        ours=ours,
        expect=lambda i: i.caches.index_copy(1, i.to_pages.long(), i.caches[:, i.from_pages.long()]),
        num_bytes=_num_bytes(num_pairs, s),
        peers={"torch index_copy_ a layer": by_layer},
    )


def _swap(num_pairs: int, s: Shapes, device: torch.device, to_host: bool) -> Case:
    """All pages in their order: one contiguous copy, which shows what the bus takes, does the same."""

    def make() -> Inputs:
        here, there = _caches(num_pairs, s, device), _caches(num_pairs, s, device).cpu().pin_memory()
        pages = torch.arange(num_pairs, dtype=torch.int32, device=device)
        return Inputs(there if to_host else here, here if to_host else there, pages, pages)

    def ours(i: Inputs):
        layers, sources = list(i.caches.unbind(0)), list(i.sources.unbind(0))
        return lambda: (ops.copy_pages(layers, i.from_pages, i.to_pages, from_caches=sources), i.caches)[1]

    def compare(result: Any, expected: Any, dtype: str) -> None:
        torch.cuda.synchronize(device)  # the host's memory is read next
        close(result, expected, dtype)

    return Case(
        "copy_pages",
        _label("to the host" if to_host else "from the host", num_pairs),
        s.dtype,
        make=make,
        ours=ours,
        expect=lambda i: i.sources.to(i.caches.device),
        num_bytes=_num_bytes(num_pairs, s),
        peers={"one contiguous copy": lambda i: lambda: i.caches.copy_(i.sources, non_blocking=True)},
        compare=compare,
        note="bound by the bus to the host, not by memory",
    )
