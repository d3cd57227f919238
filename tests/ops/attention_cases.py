"""Batches of random sequences for the tests of attention."""

from dataclasses import dataclass

import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
# (num_q_heads, num_kv_heads): groups of 1, 3, 4, 7, and one KV head
HEADS = [(2, 2), (6, 2), (8, 2), (7, 1), (4, 1)]


def cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


@dataclass
class PagedBatch:
    """Sequences in a cache whose unused slots and pages are NaN; the page table is transposed in memory."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor

    @classmethod
    def random(
        cls,
        lengths: list[tuple[int, int]],  # (queries, keys) of each sequence
        device: torch.device,
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        padding: int = 0,
    ) -> "PagedBatch":
        num_pages_of = [-(-len_k // page_size) for _, len_k in lengths]
        max_pages = max([1, *num_pages_of]) + 1
        num_pages = sum(num_pages_of) + 2
        order = torch.randperm(num_pages)
        cache = torch.full(
            (num_pages, 2, heads[1], page_size, head_dim), float("nan"), dtype=dtype, device=device
        )
        table = torch.full(
            (max_pages, len(lengths)), 2**30, dtype=torch.int32
        )  # a wild page where none is used
        used = 0
        for i, (_, len_k) in enumerate(lengths):
            for j in range(num_pages_of[i]):
                page = int(order[used])
                used += 1
                table[j, i] = page
                tokens = min(page_size, len_k - j * page_size)
                cache[page, :, :, :tokens] = torch.randn(
                    2, heads[1], tokens, head_dim, dtype=dtype, device=device
                )
        num_tokens = sum(len_q for len_q, _ in lengths) + padding
        return cls(
            torch.randn(num_tokens, heads[0], head_dim, dtype=dtype, device=device) * 2,
            cache,
            table.to(device).t(),
            torch.tensor([len_k for _, len_k in lengths], dtype=torch.int32, device=device),
            cumulative([len_q for len_q, _ in lengths], device),
        )

    @property
    def num_tokens(self) -> int:
        """Without the padding."""
        return int(self.cu_seqlens_q[-1])

    def check(self, **options) -> torch.Tensor:
        out = poisoned(*self.q.shape, dtype=self.q.dtype, device=self.q.device)
        result = ops.paged_attention(
            self.q, self.kv_cache, self.page_table, self.seq_lens, self.cu_seqlens_q, out=out, **options
        )
        assert result is out
        rest = (self.page_table, self.seq_lens, self.cu_seqlens_q)
        exact = reference.paged_attention(self.q.double(), self.kv_cache.double(), *rest, **options)
        plain = reference.paged_attention(self.q, self.kv_cache, *rest, **options)
        n = self.num_tokens
        assert_as_good_as_torch(out[:n], plain[:n], exact[:n])
        again = ops.paged_attention(self.q, self.kv_cache, *rest, **options)
        assert torch.equal(out[:n], again[:n]), "two runs differ"
        return out


def half_dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16] if device.type == "cuda" else DTYPES


def with_bytes(batch: PagedBatch, dtype: torch.dtype) -> tuple[PagedBatch, dict[str, torch.Tensor]]:
    """The batch with a cache of this dtype, and scales that differ from head to head."""
    heads, device = batch.kv_cache.shape[2], batch.q.device
    k_scale, v_scale = (0.02 * (1 + torch.arange(2 * heads, device=device).float())).view(2, heads)
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    cache = batch.kv_cache.float() / torch.stack((k_scale, v_scale))[None, :, :, None, None]
    cache = cache.clamp(-largest, largest)  # unused slots are NaN, and in int8 what a 0 * NaN would not show
    batch.kv_cache = cache.nan_to_num(127.0).round().to(dtype) if dtype == torch.int8 else cache.to(dtype)
    return batch, {"k_scale": k_scale, "v_scale": v_scale}


def check_bytes(batch: PagedBatch, **options) -> torch.Tensor:
    arguments = (batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    out = poisoned(*batch.q.shape, dtype=batch.q.dtype, device=batch.q.device)
    ops.paged_attention(batch.q, *arguments, out=out, **options)
    n = batch.num_tokens
    exact = reference.paged_attention(batch.q.double(), *arguments, **options)
    plain = reference.paged_attention(batch.q, *arguments, **options)
    assert_as_good_as_torch(out[:n], plain[:n], exact[:n])
    assert torch.equal(ops.paged_attention(batch.q, *arguments, **options)[:n], out[:n]), "two runs differ"
    return out


def check_contiguous(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, **options
) -> torch.Tensor:
    out = poisoned(*q.shape, dtype=q.dtype, device=q.device)
    assert ops.attention(q, k, v, cu_q, cu_k, out=out, **options) is out
    n = int(cu_q[-1])
    exact = reference.attention(q.double(), k.double(), v.double(), cu_q, cu_k, **options)
    plain = reference.attention(q, k, v, cu_q, cu_k, **options)
    assert_as_good_as_torch(out[:n], plain[:n], exact[:n])
    assert torch.equal(out[:n], ops.attention(q, k, v, cu_q, cu_k, **options)[:n]), "two runs differ"
    return out
