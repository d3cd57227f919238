import pytest
import torch

from fastkernels import ops
from tests.conftest import CUDA_REASON
from tests.ops.attention_cases import DTYPES, HEADS, PagedBatch

# (queries, keys): decodes, whole prompts, prefill chunks with a prefix, skipped sequences
MIXED = [
    (1, 1),
    (5, 5),
    (0, 40),
    (1, 15),
    (1, 16),
    (0, 0),
    (1, 17),
    (64, 64),
    (7, 65),
    (65, 300),
    (1, 1003),
    (2, 129),
]
# Several tiles of rows and blocks of keys a sequence, with decodes between them
PREFILLS = [(200, 200), (1, 77), (129, 129), (0, 9), (3, 300), (128, 300), (33, 1000), (257, 383), (1, 600)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, head_dim, dtype, device):
    PagedBatch.random(MIXED, device, heads=heads, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
def test_prefill_tiles(heads, head_dim, dtype, device):
    PagedBatch.random(PREFILLS, device, heads=heads, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_page_sizes_of_prefill_tiles(page_size, head_dim, device):
    options = {"head_dim": head_dim, "page_size": page_size, "dtype": torch.bfloat16}
    batch = PagedBatch.random(PREFILLS, device, **options)
    batch.check()
    batch.check(window=140)


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 100, "soft_cap": 20.0}, {"window": 300}, {"soft_cap": 5.0}],
    ids=str,
)
def test_options_of_prefill_tiles(options, device):
    PagedBatch.random(PREFILLS, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16).check(**options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "lengths", [[(150, 9001)], [(1, 20), (140, 5000), (1, 3000)], [(200, 12345)]], ids=str
)
def test_split_context_of_prefill_tiles(lengths, head_dim, device):
    shape = {"heads": (4, 1), "head_dim": head_dim, "dtype": torch.bfloat16}
    PagedBatch.random(lengths, device, **shape).check()


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_more_tiles_than_multiprocessors(head_dim):
    lengths = [(100 + 53 * i, 100 + 97 * i) for i in range(14)] + [(1, 300)] * 5
    shape = {"heads": (8, 8), "head_dim": head_dim, "dtype": torch.bfloat16}
    batch = PagedBatch.random(lengths, torch.device("cuda"), **shape)
    expected = batch.check()
    for _ in range(5):  # by whichever block a tile is taken
        assert torch.equal(batch.check(), expected)


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
def test_page_sizes(page_size, device):
    if page_size == 1 and device.type == "cuda":
        pytest.skip("the CUDA kernels take pages of 8 tokens and more")
    around = [(min(3, n), n) for p in (page_size, 64, 256) for n in (p - 1, p, p + 1)]
    PagedBatch.random([*MIXED, *around], device, page_size=page_size, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 50, "soft_cap": 30.0}, {"window": 300}, {"soft_cap": 5.0}, {"scale": 1.0}],
    ids=str,
)
def test_options(options, dtype, device):
    PagedBatch.random(MIXED, device, dtype=dtype).check(**options)


@pytest.mark.parametrize("length", [255, 256, 257, 1000, 2049])
def test_split_context_of_one_decode(length, device):
    PagedBatch.random([(1, length)], device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16).check()


def test_pages_before_the_window_are_not_read(device):
    batch = PagedBatch.random([(1, 200), (4, 333)], device)
    expected = batch.check(window=40)
    for i, length in enumerate((200, 333)):
        gone = (length - 4 - 40) // 16 - 3  # well before the window, and before its tile of keys
        batch.page_table[i, : max(gone, 0)] = -1
    assert torch.equal(
        ops.paged_attention(
            batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q, window=40
        ),
        expected,
    )


@pytest.mark.parametrize("lengths", [((1, 1_000_000), (3, 100)), ((1, 50), (140, 200_000))], ids=str)
def test_a_very_long_sequence(lengths, device):
    """Decoded beside a short one; and a chunk of prompt. For the CPU they would be much work: less there."""
    if device.type == "cpu":
        lengths = [(min(len_q, 3), len_k // 5) for len_q, len_k in lengths]
    PagedBatch.random(
        list(lengths), device, heads=(4, 1), head_dim=64, page_size=256, dtype=torch.bfloat16
    ).check()


def test_sequences_that_share_pages(device):
    batch = PagedBatch.random([(1, 100), (3, 90), (1, 70)], device)
    batch.page_table[1:, :4] = batch.page_table[0, :4]
    batch.check()


def test_page_table_strides(device):
    batch = PagedBatch.random(MIXED, device)
    transposed = batch.check()
    assert batch.page_table.stride(0) == 1
    batch.page_table = batch.page_table.contiguous()
    assert torch.equal(batch.check()[: batch.num_tokens], transposed[: batch.num_tokens])
    batch.page_table = batch.page_table.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(batch.check()[: batch.num_tokens], transposed[: batch.num_tokens])


def test_padded_rows_and_sequences(device):
    # As a step is padded to its bucket: rows past the last sequence, and sequences without tokens.
    batch = PagedBatch.random([(3, 40), (1, 9), (0, 0), (0, 0)], device, padding=4)
    batch.q[4:] = float("nan")
    assert batch.check()[4:].isnan().all()


def test_strided_q(device):
    batch = PagedBatch.random(MIXED, device)
    expected = batch.check()[: batch.num_tokens]
    merged = torch.randn(batch.q.shape[0], 3 * 4, 64, device=device)
    merged[:, 4:8] = batch.q
    batch.q = merged[:, 4:8]
    assert torch.equal(batch.check()[: batch.num_tokens], expected)


def test_opcheck_and_compile(device):
    batch = PagedBatch.random([(3, 20), (1, 33)], device)
    arguments = (batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    plan = ops.AttentionPlan.allocate(
        num_tokens=4, num_seqs=2, num_q_heads=4, num_kv_heads=2, head_dim=64, device=device
    )
    shapes = {"num_tokens": 4, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
    ops.plan_attention(plan, batch.cu_seqlens_q, seq_lens=batch.seq_lens, **shapes)
    expected = ops.paged_attention(*arguments)
    assert torch.equal(ops.paged_attention(*arguments, plan=plan), expected)
    torch.library.opcheck(
        torch.ops.fastkernels.paged_attention.default,
        (*arguments, plan.work_map, plan.workspace, 0.125, 0, 0.0, torch.empty_like(batch.q)),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(lambda *x: ops.paged_attention(*x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected + 1)


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize(
    ("captured_lengths", "other_lengths"),
    [
        ([(1, 20)] * 8 + [(0, 0)] * 4, [(1, 1500), (5, 70), (2, 2)] + [(0, 0)] * 9),
        # decodes alone, then prefills and decodes side by side
        ([(1, 20)] * 200, [(100, 3000), (1, 1500), (96, 96)] + [(1, 50)] * 3 + [(0, 0)] * 194),
    ],
    ids=["decode", "mixed"],
)
def test_graph_replays_another_batch(captured_lengths, other_lengths):
    device = torch.device("cuda")
    shape = {"heads": (8, 2), "head_dim": 128, "dtype": torch.bfloat16}
    captured = PagedBatch.random(captured_lengths, device, **shape)
    other = PagedBatch.random(other_lengths, device, **shape)
    num_tokens, num_seqs = captured.num_tokens, len(captured_lengths)
    assert other.num_tokens == num_tokens
    num_pages = max(captured.kv_cache.shape[0], other.kv_cache.shape[0])
    max_pages = max(captured.page_table.shape[1], other.page_table.shape[1])
    cache = torch.empty(num_pages, *captured.kv_cache.shape[1:], device=device, dtype=torch.bfloat16)
    table = torch.zeros(num_seqs, max_pages, device=device, dtype=torch.int32)
    q, out = torch.empty_like(captured.q), torch.empty_like(captured.q)
    seq_lens, cu_seqlens_q = torch.empty_like(captured.seq_lens), torch.empty_like(captured.cu_seqlens_q)
    shapes = {"num_tokens": num_tokens, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    plan = ops.AttentionPlan.allocate(num_seqs=num_seqs, device=device, **shapes)

    def fill(batch: PagedBatch) -> None:
        cache[: batch.kv_cache.shape[0]] = batch.kv_cache
        table[:, : batch.page_table.shape[1]] = batch.page_table
        q.copy_(batch.q)
        seq_lens.copy_(batch.seq_lens)
        cu_seqlens_q.copy_(batch.cu_seqlens_q)

    def step() -> None:
        ops.plan_attention(plan, cu_seqlens_q, seq_lens=seq_lens, dtype=q.dtype, **shapes)
        ops.paged_attention(q, cache, table, seq_lens, cu_seqlens_q, plan=plan, out=out)

    fill(captured)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in (other, captured, other):
        fill(batch)
        out.fill_(float("nan"))
        step()
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
        batch.check()


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
def test_cuda_refuses_what_it_does_not_take():
    device = torch.device("cuda")
    with pytest.raises(ValueError, match="head_dim is 48, but the CUDA kernels take 64, 80, 96, 128, 256"):
        PagedBatch.random([(1, 5)], device, head_dim=48).check()
    with pytest.raises(ValueError, match="page_size is 4, but the CUDA kernels take powers of two from 8"):
        PagedBatch.random([(1, 5)], device, page_size=4).check()
    batch = PagedBatch.random([(1, 5), (1, 5)], device)
    small = ops.AttentionPlan(torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device))
    with pytest.raises(ValueError, match="the plan has room for 1 and 1 elements, but these shapes need"):
        batch.check(plan=small)


def test_refuses_what_it_does_not_take():
    batch = PagedBatch.random([(3, 20), (1, 33)], torch.device("cpu"))
    q, cache, table, lengths, cu = (
        batch.q,
        batch.kv_cache,
        batch.page_table,
        batch.seq_lens,
        batch.cu_seqlens_q,
    )
    for arguments, message in [
        ((q.double(), cache, table, lengths, cu), "q is float64, but the op takes bf16, fp16, fp32"),
        ((q, cache.half(), table, lengths, cu), "kv_cache is fp16, but the op takes fp32"),
        ((q, cache[:, 0], table, lengths, cu), r"kv_cache has shape .* but the op takes \[num_pages, 2"),
        (
            (q, cache.transpose(0, 1).contiguous().transpose(0, 1), table, lengths, cu),
            "kv_cache must be contiguous",
        ),
        (
            (q, cache[:, :, :, :12].contiguous(), table, lengths, cu),
            "page_size is 12, but the op takes powers of two",
        ),
        ((q, cache, table.long(), lengths, cu), "page_table is int64, but the op takes int32"),
        (
            (q, cache, table[:1], lengths, cu),
            r"page_table has shape .* but the op takes \[num_seqs, max_pages\]",
        ),
        ((q, cache, table, lengths[:1], cu), r"seq_lens has shape \[1\], but the op takes \[num_seqs\]"),
        ((q, cache, table, lengths.long(), cu), "seq_lens is int64, but the op takes int32"),
        ((q, cache, table, lengths, cu.long()), "cu_seqlens_q is int64, but the op takes int32"),
        (
            (q[:, :3], cache, table, lengths, cu),
            "num_q_heads is 3, but the op takes multiples of num_kv_heads",
        ),
        ((q, cache, table.to("meta"), lengths, cu), "page_table is on meta, but q is on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(*arguments)
    with pytest.raises(ValueError, match=r"window is -1"):
        ops.paged_attention(q, cache, table, lengths, cu, window=-1)
    with pytest.raises(ValueError, match=r"soft_cap is -2\.0"):
        ops.paged_attention(q, cache, table, lengths, cu, soft_cap=-2.0)
    with pytest.raises(ValueError, match="out has shape"):
        ops.paged_attention(q, cache, table, lengths, cu, out=torch.empty_like(q[:2]))


def test_refuses_wrong_pages_and_lengths(device, monkeypatch):
    # In GPU memory they are looked at in the debug mode only; where the CPU can read them, always.
    if device.type == "cuda":
        monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    batch = PagedBatch.random([(3, 20), (1, 33)], device)
    num_pages = batch.kv_cache.shape[0]

    def call(**changed: torch.Tensor | int) -> None:
        arguments = {**vars(batch), **changed}
        ops.paged_attention(**arguments)

    for page in (-1, num_pages):
        table = batch.page_table.clone()
        table[1, 2] = page
        with pytest.raises(ValueError, match=f"sequence 1 names page {page}, but the cache has pages 0 to"):
            call(page_table=table)
    with pytest.raises(
        ValueError, match="sequence 0 has 2000 tokens, but its row of the page table holds 64"
    ):
        call(seq_lens=torch.tensor([2000, 33], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 5, but there are 4 rows"):
        call(cu_seqlens_q=torch.tensor([0, 3, 5], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="a sequence has 3 queries, but max_query_len is 2"):
        call(max_query_len=2)
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        call(cu_seqlens_q=torch.tensor([0, 3, 2], dtype=torch.int32, device=device))


def test_debug_mode_says_the_same(monkeypatch):
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    test_refuses_wrong_pages_and_lengths(torch.device("cpu"), monkeypatch)
    PagedBatch.random(MIXED, torch.device("cpu")).check(window=30)
