"""rope, append_kv, and the two in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.harness import Case, Row, run_cases
from benchmarks.peers import compiled
from benchmarks.shapes import Shapes, shapes_for, tokens_label
from fastkernels import ops
from fastkernels.ops import reference

PAGE_SIZE = 16
MAX_POSITION = 8192


class Inputs(NamedTuple):
    q: torch.Tensor  # [num_tokens, num_q_heads, head_dim], with k and v a slice of the merged projection
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor  # [num_tokens] int32
    cos_sin: torch.Tensor  # [MAX_POSITION, head_dim] fp32
    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor  # [num_tokens] int64
    q_out: torch.Tensor
    k_out: torch.Tensor


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick, compile_peers), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool, compile_peers: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    for make_case in (_rope, _rope_append_kv, _append_kv):
        for num_tokens in shapes.tokens:
            yield make_case(num_tokens, shapes, device, compile_peers)
    if device.type == "cuda":
        for num_tokens in shapes.tokens:
            yield _rope_append_kv(num_tokens, shapes, device, compile_peers, torch.float8_e4m3fn)


def _make(num_tokens: int, s: Shapes, device: torch.device, cache_dtype: torch.dtype | None = None) -> Inputs:
    qkv = torch.randn(
        num_tokens, s.num_q_heads + 2 * s.num_kv_heads, s.head_dim, dtype=s.dtype, device=device
    )
    q, k, v = qkv.split([s.num_q_heads, s.num_kv_heads, s.num_kv_heads], dim=1)
    num_pages = -(-num_tokens // PAGE_SIZE)
    angle = torch.rand(MAX_POSITION, s.head_dim // 2, device=device) * 6.28
    return Inputs(
        q,
        k,
        v,
        torch.randint(MAX_POSITION, (num_tokens,), dtype=torch.int32, device=device),
        torch.cat([angle.cos(), angle.sin()], dim=1),
        torch.zeros(num_pages, 2, s.num_kv_heads, PAGE_SIZE, s.head_dim, device=device).to(
            cache_dtype or s.dtype
        ),
        torch.randperm(num_pages * PAGE_SIZE, device=device)[:num_tokens],
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _write_cache(
    k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, page: torch.Tensor, offset: torch.Tensor
):
    cache[page, 0, :, offset] = k
    cache[page, 1, :, offset] = v
    return cache


def _expected_cache(i: Inputs, k: torch.Tensor) -> torch.Tensor:
    page, offset = i.slot_mapping // PAGE_SIZE, i.slot_mapping % PAGE_SIZE
    k, v = (x.to(i.kv_cache.dtype).float() for x in (k, i.v))
    return _write_cache(k, v, i.kv_cache.float(), page, offset)


def _expected_rope(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.rope(i.q.float(), i.k.float(), i.positions, i.cos_sin)


def _rows(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_tokens, 1, head_dim] cosines and sines of the tokens, which transformers looks up once a step."""
    cosine, sine = i.cos_sin[i.positions.long(), None].to(i.q.dtype).chunk(2, dim=-1)
    return torch.cat([cosine, cosine], -1), torch.cat([sine, sine], -1)


def _turn(
    q: torch.Tensor, k: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As models in plain PyTorch do it."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-b, a], dim=-1) * sine

    return turn(q), turn(k)


def _rope(num_tokens: int, s: Shapes, device: torch.device, compile_peers: bool) -> Case:
    def by_torch(turn: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        def prepare(i: Inputs):
            cosine, sine = _rows(i)
            return lambda: turn(i.q, i.k, cosine, sine)

        return prepare

    peers = {"torch eager": by_torch(_turn)}
    if compile_peers:
        peers["torch.compile"] = by_torch(compiled(_turn))
    heads = s.num_q_heads + s.num_kv_heads
    return Case(
        "rope",
        tokens_label(num_tokens),
        s.dtype,
        make=lambda: _make(num_tokens, s, device),
        ours=lambda i: lambda: ops.rope(i.q, i.k, i.positions, i.cos_sin, q_out=i.q_out, k_out=i.k_out),
        expect=_expected_rope,
        num_bytes=num_tokens * s.head_dim * (2 * heads * s.dtype.itemsize + 4),
        peers=peers,
    )


def _rope_append_kv(
    num_tokens: int,
    s: Shapes,
    device: torch.device,
    compile_peers: bool,
    cache_dtype: torch.dtype | None = None,
) -> Case:
    def ours(i: Inputs):
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            ops.rope_append_kv(
                i.q, i.k, i.v, i.positions, i.cos_sin, False, i.kv_cache, i.slot_mapping, q_out=i.q_out
            )
            return i.q_out, i.kv_cache

        return call

    def by_torch(i: Inputs):
        page, offset = i.slot_mapping // PAGE_SIZE, i.slot_mapping % PAGE_SIZE
        cosine, sine = _rows(i)

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            q, k = _turn(i.q, i.k, cosine, sine)
            return q, _write_cache(k.to(dtype), i.v.to(dtype), i.kv_cache, page, offset)

        return call

    def expect(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = _expected_rope(i)
        return q, _expected_cache(i, k)

    dtype = cache_dtype or s.dtype
    read = (s.num_q_heads + 2 * s.num_kv_heads) * s.dtype.itemsize
    written = s.num_q_heads * s.dtype.itemsize + 2 * s.num_kv_heads * dtype.itemsize
    return Case(
        "rope_append_kv",
        f"fp8 cache, {tokens_label(num_tokens)}" if cache_dtype else tokens_label(num_tokens),
        s.dtype,
        make=lambda: _make(num_tokens, s, device, cache_dtype),
        ours=ours,
        expect=expect,
        num_bytes=num_tokens * s.head_dim * (read + written + 4),
        peers={"torch eager": by_torch},
    )


def _append_kv(num_tokens: int, s: Shapes, device: torch.device, compile_peers: bool) -> Case:
    def by_torch(i: Inputs):
        page, offset = i.slot_mapping // PAGE_SIZE, i.slot_mapping % PAGE_SIZE
        return lambda: _write_cache(i.k, i.v, i.kv_cache, page, offset)

    return Case(
        "append_kv",
        tokens_label(num_tokens),
        s.dtype,
        make=lambda: _make(num_tokens, s, device),
        ours=lambda i: lambda: ops.append_kv(i.k, i.v, i.kv_cache, i.slot_mapping),
        expect=lambda i: _expected_cache(i, i.k),
        num_bytes=4 * num_tokens * s.num_kv_heads * s.head_dim * s.dtype.itemsize,
        peers={"torch index_put": by_torch},
    )
