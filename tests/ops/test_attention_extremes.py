"""Scores at their extremes, shared pages, large caches and replayed graphs, in the kernels for many queries
too (steps of more than 128 tokens), and with q, k and v of one byte."""

import pytest
import torch

from fastkernels import ops
from tests.conftest import CUDA_REASON
from tests.ops import test_attention_fp8 as fp8
from tests.ops.attention_cases import PagedBatch, check_contiguous, cumulative
from tests.ops.test_paged_decode import check_bytes, with_bytes

on_cuda = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))

HEAD_DIMS = [64, 96, 128, 256]
PAGE = 16
PREFILLS = [(140, 140), (150, 600), (1, 300)]
AROUND_PAGES = [(0, 0), (1, 1), *((n, n) for n in (PAGE - 1, PAGE, PAGE + 1)), (0, PAGE), (129, 8 * PAGE + 1)]


def contiguous(lengths: list[tuple[int, int]], device: torch.device, head_dim: int) -> list[torch.Tensor]:
    """q and k of length 1."""
    cu_q, cu_k = (cumulative([pair[i] for pair in lengths], device) for i in (0, 1))
    parts = [(int(cu_q[-1]), 8), (int(cu_k[-1]), 2), (int(cu_k[-1]), 2)]
    q, k, v = (torch.randn(*part, head_dim, device=device) for part in parts)
    return [q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, cu_q, cu_k]


def with_large_scores(given: list[torch.Tensor]) -> None:
    """Scores of +-60 among small ones, at a scale of 60."""
    q, k = given[:2]
    k[5::7] = q[3, 0]
    k[6::7] = -q[3, 0]
    q[4::9] = q[3, 0]
    q[5::9] = -q[3, 0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_large_and_equal_scores_of_many_queries(head_dim, device):
    given = contiguous(PREFILLS, device, head_dim)
    with_large_scores(given)
    q, k, v = (x.bfloat16() for x in given[:3])
    check_contiguous(q, k, v, *given[3:], scale=60.0)
    check_contiguous(q, k[:1].expand_as(k).contiguous(), v, *given[3:], scale=60.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_and_equal_scores_of_bytes(head_dim, device):
    given = contiguous(PREFILLS, device, head_dim)
    with_large_scores(given)
    q, k, v, *lengths = given
    scales = {"q_scale": 1 / 448, "k_scale": 1 / 448, "v_scale": 0.01}
    scales = {name: torch.full((2,), scale, device=device) for name, scale in scales.items()}
    quantized = [fp8.quantize(x, scale) for x, scale in zip((q, k, v), scales.values(), strict=True)]
    fp8.check_contiguous((*quantized, *lengths), scales, scale=60.0)
    equal = quantized[1][:1].expand_as(quantized[1]).contiguous()
    fp8.check_contiguous((quantized[0], equal, quantized[2], *lengths), scales, scale=60.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_queries_of_bytes_that_see_no_key_give_zeros(head_dim, device):
    out = fp8.check_contiguous(*fp8.contiguous([(200, 30), (150, 0), (20, 20)], device, head_dim=head_dim))
    assert (out[:170] == 0).all() and (out[170:200] != 0).any() and (out[200:350] == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths_around_pages(head_dim, device):
    PagedBatch.random(AROUND_PAGES, device, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16).check()
    if head_dim == 128:
        fp8.check_paged(*fp8.paged(AROUND_PAGES, device, heads=(8, 2), head_dim=head_dim))


@pytest.mark.parametrize(
    "lengths, shared",
    [([(1, 100), (3, 90), (1, 70)], 4), ([(140, 400), (150, 350), (1, 390), (2, 340)], 20)],
    ids=["decode", "prefill"],
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sequences_that_share_pages(head_dim, lengths, shared, device):
    def share(batch: PagedBatch) -> PagedBatch:
        batch.page_table[1:, :shared] = batch.page_table[0, :shared]
        return batch

    shape = {"heads": (8, 2), "head_dim": head_dim}
    share(PagedBatch.random(lengths, device, dtype=torch.bfloat16, **shape)).check()
    batch, scales = with_bytes(
        PagedBatch.random(lengths, device, dtype=torch.bfloat16, **shape), torch.float8_e4m3fn
    )
    check_bytes(share(batch), **scales)
    if head_dim == 128:
        batch, scales = fp8.paged(lengths, device, **shape)
        fp8.check_paged(share(batch), scales)


# --- on a GPU -----------------------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("lengths", [[(1, 700), (3, 90)], [(150, 400), (1, 300)]], ids=str)
def test_a_cache_of_more_than_2_31_elements(lengths, kv_dtype):
    """The same pages at its end give the same bits."""
    batch = PagedBatch.random(lengths, torch.device("cuda"), heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    scales: dict[str, torch.Tensor] = {}
    if kv_dtype != torch.bfloat16:
        batch, scales = with_bytes(batch, kv_dtype)
    small, rest = batch.kv_cache, (batch.seq_lens, batch.cu_seqlens_q)
    expected = ops.paged_attention(batch.q, small, batch.page_table, *rest, **scales)
    num_pages = (1 << 31) // small[0].numel() + len(small)
    cache = torch.empty(num_pages, *small.shape[1:], dtype=kv_dtype, device="cuda")
    first = num_pages - len(small)
    cache[first:] = small
    assert torch.equal(
        ops.paged_attention(batch.q, cache, batch.page_table + first, *rest, **scales), expected
    )


def tensors(batch: PagedBatch) -> list[torch.Tensor]:
    return [batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q]


@on_cuda
@pytest.mark.parametrize(
    "kind, lengths, others, max_query_len",
    [
        ("bytes", [(1, 20)] * 40, [(1, 3000)] * 3 + [(1, 7)] * 37, 1),
        ("bytes", [(1, 20)] * 200, [(100, 3000), (1, 1500), (96, 96), (1, 50), (1, 1), (1, 16)], None),
        ("bf16", [(2, 40)] * 20, [(2, 2000), (1, 17), (1, 1)] * 10, 2),
        ("fp8", [(1, 20)] * 200, [(100, 3000), (1, 1500), (96, 96), (1, 50), (1, 1), (1, 16)], None),
    ],
    ids=["decode of bytes", "mixed, bytes", "drafts", "mixed, q in fp8"],
)
def test_a_graph_replays_another_batch(kind, lengths, others, max_query_len):
    """With the batch it was captured with, then one of other lengths, and back: the bits of eager calls."""
    device, shape = torch.device("cuda"), {"heads": (8, 2), "head_dim": 128}
    num_seqs = max(len(lengths), len(others))
    options: dict[str, object] = {"max_query_len": max_query_len}
    batches = []
    for one in (lengths, others):
        padded = one + [(0, 0)] * (num_seqs - len(one))
        if kind == "fp8":
            batch, scales = fp8.paged(padded, device, **shape)
            options |= {**scales, "out_dtype": torch.bfloat16}
        else:
            batch = PagedBatch.random(padded, device, dtype=torch.bfloat16, **shape)
            if kind == "bytes":
                batch, scales = with_bytes(batch, torch.float8_e4m3fn)
                options |= scales
        batches.append(tensors(batch))
    sizes = [
        [max(size) for size in zip(*(x.shape for x in pair), strict=True)]
        for pair in zip(*batches, strict=True)
    ]
    held = [
        torch.zeros(size, dtype=x.dtype, device=device) for size, x in zip(sizes, batches[0], strict=True)
    ]

    def fill(batch: list[torch.Tensor]) -> None:
        for place, x in zip(held, batch, strict=True):
            place[tuple(slice(0, size) for size in x.shape)] = x

    def attention(given: list[torch.Tensor]) -> torch.Tensor:
        return ops.paged_attention(*given, **options)

    fill(batches[0])
    attention(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(held)
    for batch in (batches[1], batches[0], batches[1]):
        fill(batch)
        out.fill_(float("nan"))
        graph.replay()
        num_tokens = len(batch[0])
        assert torch.isfinite(out[:num_tokens]).all()
        assert torch.equal(out[:num_tokens], attention(held)[:num_tokens])
        assert (out[:num_tokens] - attention(batch)).norm() <= 0.05 * out[:num_tokens].norm()
