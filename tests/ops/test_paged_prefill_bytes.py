"""Prompts, chunks and decodes over a KV cache of bytes: on Hopper the prefill kernel widens the pages."""

import pytest
import torch

from fastkernels import ops
from tests.conftest import CUDA_REASON
from tests.ops.attention_cases import BYTES, PagedBatch, check_bytes, half_dtypes, with_bytes

# Several tiles of rows and blocks of keys a sequence, around blocks of 64 and 128 keys
PREFILLS = [(200, 200), (1, 77), (129, 129), (0, 9), (3, 300), (128, 300), (33, 1000), (257, 383), (1, 600)]
EDGES = [(n, n) for n in (63, 64, 65, 127, 128, 129, 191, 192, 193)]


@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_prefill_tiles(kv_dtype, head_dim, heads, device):
    for dtype in half_dtypes(device):
        batch = PagedBatch.random(PREFILLS, device, heads=heads, head_dim=head_dim, dtype=dtype, padding=3)
        batch, scales = with_bytes(batch, kv_dtype)
        check_bytes(batch, **scales)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_page_sizes(head_dim, page_size, device):
    for lengths in (PREFILLS, EDGES):
        batch = PagedBatch.random(
            lengths, device, head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16
        )
        batch, scales = with_bytes(batch, torch.float8_e4m3fn)
        check_bytes(batch, **scales)
        check_bytes(batch, window=140, **scales)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 100, "soft_cap": 20.0}, {"soft_cap": 5.0}, {"scale": 0.5}], ids=str
)
def test_options(options, kv_dtype, head_dim, device):
    batch = PagedBatch.random(PREFILLS, device, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16)
    batch, scales = with_bytes(batch, kv_dtype)
    check_bytes(batch, **options, **scales)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_chunks_behind_long_prefixes(kv_dtype, head_dim, device):
    """Tiles split over their keys, whose parts are added up with the scale of V."""
    lengths = [(150, 5000), (1, 2000), (40, 3003)]
    for dtype in half_dtypes(device)[-1:]:
        batch = PagedBatch.random(lengths, device, heads=(8, 2), head_dim=head_dim, dtype=dtype)
        batch, scales = with_bytes(batch, kv_dtype)
        check_bytes(batch, **scales)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_queries_that_fp16_cannot_hold(kv_dtype, device):
    """On the GPU q becomes the largest fp16, not infinity, of which keys of 0 would make NaN."""
    batch = PagedBatch.random([(140, 140)], device, heads=(2, 1), head_dim=128, dtype=torch.bfloat16)
    batch, scales = with_bytes(batch, kv_dtype)
    batch.q[::7] *= 2.0**20
    batch.kv_cache.view(torch.uint8)[:, 0] = 0
    check_bytes(batch, **scales)


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_graph_replays_other_lengths(kv_dtype):
    """Captured with one batch, replayed with another: bit for bit what a call gives."""
    device = torch.device("cuda")
    batches = [
        with_bytes(
            PagedBatch.random(lengths, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16), kv_dtype
        )
        for lengths in ([(200, 200), (1, 90), (30, 700)], [(1, 5), (100, 900), (130, 131)])
    ]
    pages = max(batch.kv_cache.shape[0] for batch, _ in batches)
    columns = max(batch.page_table.shape[1] for batch, _ in batches)
    shape = (pages, *batches[0][0].kv_cache.shape[1:])
    cache = torch.zeros(shape, dtype=torch.uint8, device=device).view(kv_dtype)
    table = torch.zeros(3, columns, dtype=torch.int32, device=device)
    q, out = torch.empty_like(batches[0][0].q), torch.empty_like(batches[0][0].q)
    seq_lens, cu = torch.zeros_like(batches[0][0].seq_lens), torch.zeros_like(batches[0][0].cu_seqlens_q)
    scales = batches[0][1]

    def load(batch: PagedBatch) -> None:
        cache.view(torch.uint8)[: batch.kv_cache.shape[0]] = batch.kv_cache.view(torch.uint8)
        table[:, : batch.page_table.shape[1]] = batch.page_table
        seq_lens.copy_(batch.seq_lens)
        cu.copy_(batch.cu_seqlens_q)
        q.copy_(batch.q)

    load(batches[0][0])
    ops.paged_attention(q, cache, table, seq_lens, cu, out=out, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.paged_attention(q, cache, table, seq_lens, cu, out=out, **scales)
    for batch, _ in reversed(batches):
        load(batch)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, ops.paged_attention(q, cache, table, seq_lens, cu, **scales))
