"""Sequences of few queries: what the decode kernel takes, one-byte caches, and masks of draft trees."""

import pytest
import torch

from fastkernels import ops
from tests.conftest import CUDA_REASON
from tests.ops.attention_cases import BYTES, PagedBatch, check_bytes, cumulative, half_dtypes, with_bytes
from tests.tolerances import assert_as_good_as_torch, poisoned

PAGE = 16
AROUND_PAGES = [(1, n) for n in (1, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 255, 256, 257, 700)]
# Also prompts, chunks, drafts and sequences without queries or keys
MIXED = [*AROUND_PAGES, (0, 0), (0, 33), (2, 2), (4, 90), (5, 300), (16, 200), (40, 40), (70, 130)]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(32, 1), (20, 1), (16, 2), (33, 1), (64, 8), (3, 3)], ids=str)
def test_groups(heads, head_dim, device):
    for dtype in half_dtypes(device)[-2:]:
        PagedBatch.random(MIXED, device, heads=heads, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 256])
def test_pages_of_every_size(page_size, device):
    lengths = [(1, n) for p in (page_size, 64) for n in (p - 1, p, p + 1, 7 * p + 3)]
    for options in ({}, {"window": 37}, {"window": 200}):
        PagedBatch.random(
            lengths, device, heads=(8, 2), head_dim=128, page_size=page_size, dtype=torch.bfloat16
        ).check(**options)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 5, 9, 17, 33])
def test_few_and_many_sequences(num_seqs, head_dim, device):
    """From one sequence split among all SMs to a sequence a block, very uneven."""
    lengths = [(1, 9000), (1, 1), (1, 700), (2, 64), (1, 65), (0, 20), *((1, 40 * n) for n in range(1, 28))]
    for options in ({}, {"window": 150}, {"soft_cap": 20.0}):
        PagedBatch.random(
            lengths[:num_seqs], device, heads=(16, 8), head_dim=head_dim, dtype=torch.bfloat16
        ).check(**options)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", [None, *BYTES], ids=str)
def test_one_sequence_of_few_rows(kv_dtype, head_dim, device):
    """Of at most 8 packed rows: blocks of 8 warps, which take 128 keys at a time."""
    for len_q, len_k in ((1, 1), (1, 127), (2, 129), (1, 2047), (2, 6000)):
        batch = PagedBatch.random(
            [(len_q, len_k)], device, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16
        )
        if kv_dtype is None:
            batch.check()
            batch.check(window=70)
        else:
            batch, scales = with_bytes(batch, kv_dtype)
            check_bytes(batch, **scales)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_seqs", [1, 40, 150])
def test_steps_that_are_told_their_longest(num_seqs, head_dim, device):
    """Fewer kernels, and on Hopper two to four blocks an SM: bit for bit what comes untold."""
    for longest, heads, kv_dtype in ((1, (16, 8), None), (1, (16, 8), torch.int8), (3, (8, 2), None)):
        lengths = [(1 + i % longest, 3 + 37 * i % 200) for i in range(num_seqs)]
        batch = PagedBatch.random(lengths, device, heads=heads, head_dim=head_dim, dtype=torch.bfloat16)
        scales: dict[str, torch.Tensor] = {}
        if kv_dtype is not None:
            batch, scales = with_bytes(batch, kv_dtype)
        arguments = (batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
        told = poisoned(*batch.q.shape, dtype=batch.q.dtype, device=device)
        ops.paged_attention(*arguments, max_query_len=longest, out=told, **scales)
        untold = ops.paged_attention(*arguments, **scales)
        assert torch.equal(told[: batch.num_tokens], untold[: batch.num_tokens])


def test_equal_scores(device):
    batch = PagedBatch.random(AROUND_PAGES, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    batch.q.zero_()  # each value counts alike
    batch.check()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign, device):
    """Scores around 60 or -60, and a few of the other sign."""
    for dtype in (torch.float16, torch.bfloat16):
        batch = PagedBatch.random(
            [(1, 300), (4, 65), (1, 2000)], device, heads=(8, 2), head_dim=64, dtype=dtype
        )
        batch.q.fill_(sign)
        used = batch.kv_cache[:, 0]
        used.copy_(torch.where(used > 2.0, -1.0, 1.0).masked_fill(used.isnan(), float("nan")))
        batch.check(scale=60 / 64)


def test_one_key_or_none(device):
    batch = PagedBatch.random([(1, 1), (0, 5), (1, 1), (2, 2)], device, heads=(4, 2), dtype=torch.bfloat16)
    out = batch.check()
    first = batch.kv_cache[batch.page_table[0, 0].long(), 1, :, 0]  # the only value there is
    assert torch.equal(out[0], first.repeat_interleave(2, 0))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(8, 2), (7, 1), (32, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_one_byte_caches(kv_dtype, heads, head_dim, device):
    for dtype in half_dtypes(device):
        batch = PagedBatch.random(MIXED, device, heads=heads, head_dim=head_dim, dtype=dtype)
        batch, scales = with_bytes(batch, kv_dtype)
        check_bytes(batch, **scales)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 50, "soft_cap": 30.0}, {"soft_cap": 5.0}, {"scale": 1.0}], ids=str
)
def test_options_with_one_byte_caches(options, kv_dtype, device):
    for page_size in (8, 32):
        batch = PagedBatch.random(
            MIXED, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, page_size=page_size
        )
        batch, scales = with_bytes(batch, kv_dtype)
        check_bytes(batch, **options, **scales)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_every_byte(kv_dtype, device):
    """Each finite value of the type, as a key and as a value, scale 1 where none is given."""
    every = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
    finite = every[every.float().isfinite()] if kv_dtype.is_floating_point else every
    values = finite.float()
    cache = torch.zeros(16, 2, 1, 16, 64).to(kv_dtype)
    flat = cache.view(torch.uint8)
    flat[:, 0] = 0
    for i in range(len(finite)):  # slot i holds value i in all dimensions
        flat[i // 16, 1, 0, i % 16] = finite[i].view(torch.uint8)
        flat[i // 16, 0, 0, i % 16] = finite[i].view(torch.uint8)
    n = len(finite)
    q = torch.zeros(1, 1, 64, dtype=torch.float16, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device)[None]
    lengths, cu = torch.tensor([n], dtype=torch.int32, device=device), cumulative([1], device)
    out = ops.paged_attention(q, cache.to(device), table, lengths, cu)
    assert torch.allclose(
        out.float().cpu(), values.double().mean().float().expand(1, 1, 64), atol=0.05, rtol=2e-3
    )
    largest = int(values.argmax())  # the key with the largest product takes all
    q[..., 0] = 300.0
    out = ops.paged_attention(q, cache.to(device), table, lengths, cu, scale=1.0)
    assert torch.allclose(out.float().cpu(), values[largest].expand(1, 1, 64), rtol=1e-3)


@pytest.mark.parametrize("heads", [(8, 2), (16, 2), (32, 1)], ids=str)
@pytest.mark.parametrize("num_drafts", [2, 4, 7, 16])
def test_tree_masks(num_drafts, heads, device):
    lengths = [(num_drafts, num_drafts), (num_drafts, 75), (1, 40), (num_drafts, 1000), (0, 9)]
    for dtype in half_dtypes(device):
        batch = PagedBatch.random(lengths, device, heads=heads, head_dim=128, dtype=dtype)
        bits = torch.rand(batch.num_tokens, 64) < 0.4
        token = torch.cat([torch.arange(len_q) for len_q, _ in lengths])
        bits[torch.arange(batch.num_tokens), token] = True  # a token sees itself
        mask = (bits.long() << torch.arange(64)).sum(1).to(device)
        batch.check(tree_mask=mask)
        batch, scales = with_bytes(batch, torch.float8_e4m3fn)
        check_bytes(batch, tree_mask=mask, **scales)


def test_tree_masks_of_64_tokens_and_more(device):
    lengths = [(64, 100), (65, 65), (63, 400), (1, 5), (150, 400)]
    for dtype in half_dtypes(device):
        batch = PagedBatch.random(lengths, device, heads=(8, 2), head_dim=64, dtype=dtype)
        mask = torch.randint(-(2**63), 2**63 - 1, (batch.num_tokens,), device=device)
        token = torch.cat([torch.arange(len_q, device=device) for len_q, _ in lengths])
        mask |= torch.ones_like(mask) << token.clamp(max=63)
        batch.check(tree_mask=mask)


def test_a_chain_is_causal(device):
    lengths = [(4, 4), (4, 100), (3, 700)]
    batch = PagedBatch.random(lengths, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    token = torch.cat([torch.arange(len_q, device=device) for len_q, _ in lengths])
    chain = (torch.full_like(token, 2) << token) - 1
    assert torch.equal(batch.check(tree_mask=chain), batch.check())


def test_skewed_batch(device):
    lengths = [(1, 20000), *[(1, 100)] * 30, (4, 3000)]
    PagedBatch.random(lengths, device, heads=(8, 2), head_dim=128, dtype=torch.bfloat16).check()


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_200k_tokens(kv_dtype):
    device, length, page_size, heads = torch.device("cuda"), 200_003, 16, (8, 2)
    num_pages = -(-length // page_size)
    cache = torch.randn(num_pages + 3, 2, heads[1], page_size, 128, device=device).to(kv_dtype)
    table = torch.randperm(num_pages + 3, device=device, dtype=torch.int32)[None, :num_pages]
    q = torch.randn(2, heads[0], 128, device=device, dtype=torch.bfloat16)
    lengths, cu = torch.tensor([length], dtype=torch.int32, device=device), cumulative([2], device)
    out = ops.paged_attention(q, cache, table, lengths, cu, scale=0.3)
    # The reference a chunk of pages at a time, in fp32
    scores, values = [], []
    for first in range(0, num_pages, 1000):
        k, v = cache[table[0, first : first + 1000].long()].float().permute(1, 2, 0, 3, 4).flatten(2, 3)
        k, v = k.repeat_interleave(4, 0), v.repeat_interleave(4, 0)
        scores.append(torch.einsum("qhd,hkd->hqk", q.float(), k) * 0.3)
        values.append(v)
    score = torch.cat(scores, 2)[..., :length].double()
    score[:, 0, length - 1] = -torch.inf
    weights, start, expected = score.softmax(-1), 0, 0.0
    for v in values:
        v = v[:, : length - start].double()
        expected = expected + torch.einsum("hqk,hkd->qhd", weights[..., start : start + v.shape[1]], v)
        start += v.shape[1]
    assert_as_good_as_torch(out, expected.to(torch.bfloat16), expected)


def test_refuses_what_it_does_not_take(device):
    batch = PagedBatch.random([(3, 20), (1, 33)], device, dtype=torch.bfloat16)
    arguments = (batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    scale = torch.ones(2, device=device)
    mask = torch.ones(4, dtype=torch.int64, device=device)
    for options, message in [
        ({"k_scale": scale}, "k_scale is given, but kv_cache is bf16; scales are for caches of"),
        ({"tree_mask": mask[:3]}, r"tree_mask has shape \[3\], but the op takes \[num_tokens\]"),
        ({"tree_mask": mask.int()}, "tree_mask is int32, but the op takes int64"),
        ({"tree_mask": mask, "window": 5}, "window is 5, but a tree_mask takes none"),
        ({"max_query_len": 0}, "max_query_len is 0, but the op takes 1 and more, or None"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(*arguments, **options)
    batch, scales = with_bytes(batch, torch.int8)
    arguments = (batch.q, batch.kv_cache, batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    for options, message in [
        ({"k_scale": scale[:1]}, r"k_scale has shape \[1\], but the op takes \[num_kv_heads\]"),
        ({"v_scale": scale.double()}, "v_scale is float64, but the op takes fp32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(*arguments, **options)
    if device.type == "cuda":
        with pytest.raises(
            ValueError, match=r"q is fp32 and scale .* take bf16 and fp16 and a positive scale"
        ):
            ops.paged_attention(batch.q.float(), *arguments[1:], **scales)
