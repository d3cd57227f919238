"""attention over contiguous sequences, paged_attention over a KV cache, and the plan they share.

The plan of a step is made once and serves every layer, so the attention rows leave it out; it has rows of its
own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, ResultError, Row, close, run_cases
from benchmarks.peers import flash_attention_3, vllm_name
from fastkernels import ops

Lengths = tuple[tuple[int, int], ...]  # (queries, keys) of each sequence


@dataclass(frozen=True)
class Batch:
    """A step's sequences and the model's heads."""

    name: str
    lengths: Lengths
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: torch.dtype | None = None  # of k and v, where it is not that of out
    q_dtype: torch.dtype | None = None  # likewise

    @property
    def num_tokens(self) -> int:
        return sum(queries for queries, _ in self.lengths)

    @property
    def num_keys(self) -> int:
        return sum(keys for _, keys in self.lengths)

    @property
    def longest(self) -> tuple[int, int]:
        return max(queries for queries, _ in self.lengths), max(keys for _, keys in self.lengths)

    @property
    def flops(self) -> int:
        """Of the two products, masked-out scores not counted."""
        seen = sum(q * (k - q) + q * (q + 1) // 2 for q, k in self.lengths)
        return 4 * self.num_q_heads * self.head_dim * seen

    def num_bytes(self, dtype: torch.dtype) -> int:
        """K and V once, q and out once."""
        keys = 2 * self.num_keys * self.num_kv_heads * (self.kv_dtype or dtype).itemsize
        rows = self.num_tokens * self.num_q_heads * ((self.q_dtype or dtype).itemsize + dtype.itemsize)
        return (keys + rows) * self.head_dim

    def cu_seqlens_q(self, device: torch.device) -> torch.Tensor:
        return _cumulative([queries for queries, _ in self.lengths], device)

    def cu_seqlens_k(self, device: torch.device) -> torch.Tensor:
        return _cumulative([keys for _, keys in self.lengths], device)

    def seq_lens(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([keys for _, keys in self.lengths], dtype=torch.int32, device=device)


def decode(num_seqs: int, context: int, suffix: str = "", **heads: Any) -> Batch:
    return Batch(f"{num_seqs} x {_short(context)}{suffix}", ((1, context),) * num_seqs, **heads)


def prefill(num_seqs: int, length: int, suffix: str = "", **heads: Any) -> Batch:
    return Batch(f"{num_seqs} x {_short(length)}{suffix}", ((length, length),) * num_seqs, **heads)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


# --- the batches --------------------------------------------------------------------------------------------


def _batches(device: torch.device, quick: bool) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """(contiguous prefills, paged prefills and mixed steps, paged decodes)"""
    if device.type != "cuda":
        heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
        if quick:
            mixed = Batch("mixed", ((16, 32), (1, 64)), **heads)
            return [prefill(2, 64, **heads)], [prefill(2, 64, **heads), mixed], [decode(4, 128, **heads)]
        mixed = Batch("mixed: 1 x 128 of 512, 8 decodes at 512", ((128, 512), *((1, 512),) * 8), **heads)
        prefills = [prefill(4, 256, **heads), prefill(1, 1024, **heads)]
        return prefills, [*prefills, mixed], [decode(n, 1024, **heads) for n in (1, 8, 32)]
    shapes = [(16, 512), (8, 2048), (2, 8192), (1, 16384), (1, 32768)]
    contiguous = [
        *(prefill(*shape) for shape in shapes),
        prefill(2, 8192, ", head 64", head_dim=64),
        prefill(2, 8192, ", head 256, 16 q heads", head_dim=256, num_q_heads=16),
    ]
    fp8 = {"q_dtype": torch.float8_e4m3fn, "kv_dtype": torch.float8_e4m3fn}
    fp8_prefills = [prefill(*shape, ", q, k, v e4m3", **fp8) for shape in ((8, 2048), (2, 8192), (1, 32768))]
    contiguous += fp8_prefills
    e4m3 = {"kv_dtype": torch.float8_e4m3fn}
    over_bytes = [prefill(*shape, ", K, V e4m3", **e4m3) for shape in ((16, 512), (2, 8192), (1, 32768))]
    mixed = Batch("mixed: 4 x 512 of 2k, 60 decodes at 1k", ((512, 2048),) * 4 + ((1, 1024),) * 60)
    chunk = Batch("1 x 512 of 100k", ((512, 102400),))
    paged = [*(prefill(*shape) for shape in shapes), *fp8_prefills, *over_bytes, chunk, mixed]
    if quick:
        return contiguous[1:2], [paged[1], mixed], [decode(1, 1024), decode(32, 1024)]
    decodes = [(1, 128), (1, 1024), (1, 8192), (1, 131072), (8, 1024), (8, 8192), (32, 1024), (32, 4096)]
    decodes += [(64, 2048), (128, 1024), (256, 512)]
    in_bytes = [(1, 8192), (32, 1024), (32, 4096), (64, 2048), (128, 1024), (256, 512), (1, 131072)]
    in_bytes += [(32, 8192), (64, 4096), (128, 2048), (256, 1024), (1, 262144)]  # 0.5 GB
    others = [
        decode(32, 4096, ", 64 q heads", num_q_heads=64),
        decode(64, 4096, ", head 64", head_dim=64),
        decode(32, 4096, ", 32 KV heads", num_kv_heads=32),
        decode(256, 4096, ", 1 KV head", num_kv_heads=1),
        Batch("1 x 64k, 63 x 1k", ((1, 65536), *((1, 1024),) * 63)),
        *(Batch(f"32 x 4k, {n} drafts", ((n, 4096),) * 32) for n in (4, 8, 16)),
        *(decode(n, k, ", e4m3", kv_dtype=torch.float8_e4m3fn) for n, k in in_bytes),
        decode(64, 4096, ", e5m2", kv_dtype=torch.float8_e5m2),
        decode(64, 4096, ", int8", kv_dtype=torch.int8),
    ]
    return contiguous, paged, [decode(*shape) for shape in decodes] + others


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    contiguous, paged, decodes = _batches(device, quick)
    for batch in decodes:
        yield _paged_case("paged attention, decode", batch, dtype, device)
    for batch in contiguous:
        yield _contiguous_case(batch, dtype, device)
    for batch in paged:
        yield _paged_case("paged attention, prefill", batch, dtype, device)
    if device.type == "cuda":
        for batch in (decode(1, 8192), decode(32, 1024), decode(256, 512), paged[-1], paged[1]):
            yield _plan_case(batch, dtype, device)


# --- contiguous ---------------------------------------------------------------------------------------------


class Contiguous(NamedTuple):
    q: torch.Tensor  # [num_tokens, num_q_heads, head_dim]
    k: torch.Tensor  # [num_keys, num_kv_heads, head_dim]
    v: torch.Tensor


def _contiguous_case(batch: Batch, dtype: torch.dtype, device: torch.device) -> Case:
    cu_q, cu_k = batch.cu_seqlens_q(device), batch.cu_seqlens_k(device)
    plan = _plan_once(batch, dtype, device, cu_q, cu_seqlens_k=cu_k)

    def make() -> Contiguous:
        q = torch.randn(batch.num_tokens, batch.num_q_heads, batch.head_dim, dtype=dtype, device=device)
        k, v = torch.randn(2, batch.num_keys, batch.num_kv_heads, batch.head_dim, dtype=dtype, device=device)
        kv_dtype = batch.kv_dtype or dtype
        return Contiguous(q.to(batch.q_dtype or dtype), k.to(kv_dtype), v.to(kv_dtype))

    def ours(i: Contiguous):
        out = torch.empty_like(i.q, dtype=dtype)
        return lambda: ops.attention(i.q, i.k, i.v, cu_q, cu_k, plan=plan(), out=out)

    def by_fa3(i: Contiguous):
        out, (max_q, max_k) = torch.empty_like(i.q), batch.longest
        lengths = {"max_seqlen_q": max_q, "cu_seqlens_q": cu_q, "max_seqlen_k": max_k, "cu_seqlens_k": cu_k}

        def call() -> torch.Tensor:
            fa3(i.q, i.k, i.v, causal=True, out=out, fa_version=3, **lengths)
            return out

        return call

    def expect(i: Contiguous) -> torch.Tensor:
        return _flat(_sdpa(*(_batched(x.float(), batch) for x in i), batch))

    def by_sdpa(attend: Callable[..., torch.Tensor]):
        def prepare(i: Contiguous):
            q, k, v = (_batched(x, batch) for x in i)
            return lambda: attend(q, k, v, batch)

        return prepare

    peers: dict[str, Any] = {}
    if batch.q_dtype is None:
        peers = {name: by_sdpa(attend) for name, attend in _sdpa_backends(device).items()}
        if device.type == "cuda" and (fa3 := flash_attention_3()) is not None:
            peers[f"FlashAttention 3 ({vllm_name()})"] = by_fa3
    return Case(
        "attention, causal prefill",
        batch.name,
        dtype,
        make=make,
        ours=ours,
        expect=expect,
        compare=lambda result, expected, dtype: _close((_flat(result),), (expected,), batch, dtype),
        num_bytes=batch.num_bytes(dtype),
        flops=batch.flops,
        peers=peers,
    )


# --- paged --------------------------------------------------------------------------------------------------


class Paged(NamedTuple):
    q: torch.Tensor  # [num_tokens, num_q_heads, head_dim]
    kv_cache: torch.Tensor  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    page_table: torch.Tensor  # [num_seqs, max_pages] int32, pages in random order


def _paged_case(subject: str, batch: Batch, dtype: torch.dtype, device: torch.device) -> Case:
    cu_q, seq_lens = batch.cu_seqlens_q(device), batch.seq_lens(device)
    plan = _plan_once(batch, dtype, device, cu_q, seq_lens=seq_lens)
    pages = torch.tensor([-(-keys // batch.page_size) for _, keys in batch.lengths], device=device)
    num_pages, max_pages = int(pages.sum()), int(pages.max())

    def make() -> Paged:
        table = torch.zeros(len(batch.lengths), max_pages, dtype=torch.int32, device=device)
        used = torch.arange(max_pages, device=device) < pages[:, None]
        table[used] = torch.randperm(num_pages, dtype=torch.int32, device=device)
        cache = (num_pages, 2, batch.num_kv_heads, batch.page_size, batch.head_dim)
        keys = torch.randn(cache, dtype=dtype, device=device)
        if batch.kv_dtype is not None:
            keys = keys.to(batch.kv_dtype)
        q = torch.randn(batch.num_tokens, batch.num_q_heads, batch.head_dim, dtype=dtype, device=device)
        return Paged(q.to(batch.q_dtype or dtype), keys, table)

    def ours(i: Paged):
        out = torch.empty_like(i.q, dtype=dtype)
        longest = batch.longest[0]
        return lambda: ops.paged_attention(*i, seq_lens, cu_q, max_query_len=longest, plan=plan(), out=out)

    def by_fa3(i: Paged):
        # FlashAttention's own layout: [num_pages, page_size, num_kv_heads, head_dim], K and V apart.
        k, v = i.kv_cache.permute(1, 0, 3, 2, 4).contiguous()
        q, table, out, (max_q, max_k) = i.q, i.page_table, torch.empty_like(i.q), batch.longest
        lengths = {"max_seqlen_q": max_q, "cu_seqlens_q": cu_q, "max_seqlen_k": max_k, "seqused_k": seq_lens}

        def call() -> torch.Tensor:
            fa3(q, k, v, causal=True, block_table=table, out=out, fa_version=3, **lengths)
            return out

        return call

    def by_sdpa(attend: Callable[..., torch.Tensor]):
        def prepare(i: Paged):
            k, v = _gathered(i, batch)
            q = _batched(i.q, batch)
            return lambda: attend(q, k, v, batch)

        return prepare

    equal = len(set(batch.lengths)) == 1 and batch.longest[1] % batch.page_size == 0
    equal = (
        equal and batch.kv_dtype is None and (batch.longest[0] == 1 or batch.longest[0] == batch.longest[1])
    )
    peers: dict[str, Any] = {}
    if equal:
        backends = _sdpa_backends(device)
        peers = {f"{name}, K and V contiguous": by_sdpa(attend) for name, attend in backends.items()}
    if device.type == "cuda" and batch.kv_dtype is None and (fa3 := flash_attention_3()) is not None:
        peers[f"FlashAttention 3 ({vllm_name()}), paged"] = by_fa3
    return Case(
        subject,
        batch.name,
        dtype,
        make=make,
        ours=ours,
        expect=lambda i: _expected_of_ends(i, batch),
        compare=lambda result, expected, dtype: _compare_ends(result, expected, batch, dtype),
        num_bytes=batch.num_bytes(dtype),
        flops=batch.flops,
        peers=peers,
    )


def _gathered(i: Paged, batch: Batch) -> torch.Tensor:
    """[2, num_seqs, num_kv_heads, num_keys, head_dim], from pages of sequences of one length."""
    pages = i.kv_cache[i.page_table.long()]  # [num_seqs, max_pages, 2, num_kv_heads, page_size, head_dim]
    return pages.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).contiguous()


def _expected_of_ends(i: Paged, batch: Batch) -> tuple[torch.Tensor, ...]:
    """What the first and the last sequence give: enough for a benchmark, and small in fp32."""
    expected, num_seqs = [], len(batch.lengths)
    starts = batch.cu_seqlens_q(torch.device("cpu")).tolist()
    for index in sorted({0, num_seqs - 1}):
        queries, keys = batch.lengths[index]
        pages = i.kv_cache[i.page_table[index, : -(-keys // batch.page_size)].long()]
        k, v = pages.float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :keys]
        q = i.q[starts[index] : starts[index + 1]].float().transpose(0, 1)[None]
        mask = None
        if 1 < queries < keys:
            own = torch.arange(keys - queries, keys, device=q.device)
            mask = torch.arange(keys, device=q.device)[None] <= own[:, None]
        group = batch.num_q_heads // batch.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=queries == keys > 1)
        expected.append(out[0].transpose(0, 1))
    return tuple(expected)


def _compare_ends(result: torch.Tensor, expected: tuple[torch.Tensor, ...], batch: Batch, dtype: str) -> None:
    result = _flat(result)
    ends = (result[: batch.lengths[0][0]], result[-batch.lengths[-1][0] :])
    _close(ends[: len(expected)], expected, batch, dtype)


def _close(
    result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], batch: Batch, dtype: str
) -> None:
    if batch.q_dtype is None:
        return close(result, expected, dtype)
    for x, y in zip(result, expected, strict=True):  # weights in e4m3: tests/ops/test_attention_fp8.py
        error = ((x.float() - y).norm() / y.norm()).item()
        if not error <= 0.04:
            raise ResultError(f"the result is off by {error:.3g} of its norm; 0.04 is allowed")
    return None


# --- the plan -----------------------------------------------------------------------------------------------


def _plan_once(
    batch: Batch, dtype: torch.dtype, device: torch.device, cu_seqlens_q: torch.Tensor, **keys: torch.Tensor
) -> Callable[[], ops.AttentionPlan]:
    """Makes the batch's plan when it is first asked for.

    The work map depends on the lengths alone: all sets of inputs share it, as the layers of a model do.
    """

    @functools.cache
    def make() -> ops.AttentionPlan:
        plan = ops.AttentionPlan.allocate(
            num_tokens=batch.num_tokens,
            num_seqs=len(batch.lengths),
            num_q_heads=batch.num_q_heads,
            num_kv_heads=batch.num_kv_heads,
            head_dim=batch.head_dim,
            device=device,
        )
        return _fill(plan, batch, dtype, cu_seqlens_q, **keys)

    return make


def _fill(
    plan: ops.AttentionPlan,
    batch: Batch,
    dtype: torch.dtype,
    cu_seqlens_q: torch.Tensor,
    **keys: torch.Tensor,
) -> ops.AttentionPlan:
    return ops.plan_attention(
        plan,
        cu_seqlens_q,
        num_tokens=batch.num_tokens,
        num_q_heads=batch.num_q_heads,
        num_kv_heads=batch.num_kv_heads,
        head_dim=batch.head_dim,
        dtype=dtype,
        **keys,
    )


def _plan_case(batch: Batch, dtype: torch.dtype, device: torch.device) -> Case:
    cu_q, seq_lens = batch.cu_seqlens_q(device), batch.seq_lens(device)
    plan = _plan_once(batch, dtype, device, cu_q, seq_lens=seq_lens)

    def call() -> torch.Tensor:
        return _fill(plan(), batch, dtype, cu_q, seq_lens=seq_lens).work_map

    return Case(
        "attention plan",
        batch.name,
        dtype,
        make=lambda: None,
        ours=lambda _: call,
        expect=lambda _: plan().work_map.clone(),
        num_bytes=4 * (2 * len(batch.lengths) + 1),
        note="once a step",
    )


# --- torch's own attention ----------------------------------------------------------------------------------


def _batched(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[num_tokens, num_heads, head_dim] of one length -> [num_seqs, num_heads, length, head_dim], a view."""
    return x.unflatten(0, (len(batch.lengths), -1)).transpose(1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """The way back, where it is needed."""
    return x.transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
    """In whatever way torch chooses, K and V repeated for each query head."""
    group = batch.num_q_heads // batch.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def _sdpa_backends(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        gqa = batch.num_q_heads != batch.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=gqa)

    def restricted(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(*arguments: Any) -> torch.Tensor:
            with sdpa_kernel(backend):
                return grouped(*arguments)

        return attend

    if device.type != "cuda":
        return {"torch SDPA": grouped}
    return {
        "torch SDPA, flash": restricted(SDPBackend.FLASH_ATTENTION),
        "torch SDPA, cuDNN": restricted(SDPBackend.CUDNN_ATTENTION),
    }
