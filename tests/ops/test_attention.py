import numpy as np
import pytest
import torch

from fastkernels import ops
from tests.ops.attention_cases import DTYPES, HEADS, check_contiguous, cumulative

LENGTHS = [
    (1, 1),
    (0, 5),
    (5, 5),
    (63, 63),
    (64, 64),
    (65, 65),
    (1, 300),
    (17, 200),
    (3, 1003),
]  # (queries, keys)
# Several tiles of rows and blocks of keys a sequence, ends before, at and after both
PREFILLS = [(200, 200), (1, 77), (129, 129), (0, 9), (128, 300), (33, 1000), (257, 383), (256, 256)]
HALF = [torch.float16, torch.bfloat16]


def random(lengths, device, *, heads=(4, 2), head_dim=64, dtype=torch.float32, padding=0):
    cu_q = cumulative([len_q for len_q, _ in lengths], device)
    cu_k = cumulative([len_k for _, len_k in lengths], device)
    q = torch.randn(int(cu_q[-1]) + padding, heads[0], head_dim, device=device, dtype=dtype) * 2
    k, v = torch.randn(2, int(cu_k[-1]), heads[1], head_dim, device=device, dtype=dtype)
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, head_dim, dtype, device):
    check_contiguous(*random(LENGTHS, device, heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
def test_prefill_tiles(heads, head_dim, dtype, device):
    check_contiguous(*random(PREFILLS, device, heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 100},
        {"window": 130, "soft_cap": 20.0},
        {"soft_cap": 5.0, "causal": False},
    ],
    ids=str,
)
def test_options_of_prefill_tiles(options, head_dim, device):
    check_contiguous(*random(PREFILLS, device, head_dim=head_dim, dtype=torch.bfloat16), **options)


def test_nan_after_the_last_key(device):
    # The keys of a sequence end within a block of keys; what lies behind them must not be read, or not count.
    q, k, v, cu_q, cu_k = random(
        [(150, 150), (40, 90)], device, heads=(4, 2), head_dim=128, dtype=torch.bfloat16
    )
    padding = torch.full((100, 2, 128), float("nan"), device=device, dtype=torch.bfloat16)
    check_contiguous(q, torch.cat([k, padding]), torch.cat([v, padding]), cu_q, cu_k)
    check_contiguous(q, torch.cat([k, padding]), torch.cat([v, padding]), cu_q, cu_k, causal=False)


def test_one_key_and_value_for_all_heads(device):
    q, k, v, cu_q, cu_k = random([(200, 200)], device, heads=(4, 2), dtype=torch.bfloat16)
    expected = ops.attention(q, k[:, :1].repeat(1, 2, 1), v[:, :1].repeat(1, 2, 1), cu_q, cu_k)
    assert torch.equal(
        ops.attention(q, k[:, :1].expand(-1, 2, -1), v[:, :1].expand(-1, 2, -1), cu_q, cu_k), expected
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 64},
        {"window": 100, "soft_cap": 20.0},
        {"soft_cap": 5.0},
        {"scale": 0.3},
        {"causal": False, "soft_cap": 1.0},
    ],
    ids=str,
)
def test_options(options, dtype, device):
    check_contiguous(*random(LENGTHS, device, dtype=dtype), **options)


@pytest.mark.parametrize("head_dim", [1, 8, 33, 100])
def test_any_head_dim_on_the_cpu(head_dim):
    check_contiguous(*random(LENGTHS, torch.device("cpu"), heads=(6, 2), head_dim=head_dim))


def test_more_heads_in_a_group_than_a_tile_has_rows(device):
    check_contiguous(*random([(1, 400), (3, 70)], device, heads=(71, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_equal_scores(dtype, device):
    q, k, v, cu_q, cu_k = random([(70, 70), (1, 600)], device, dtype=dtype)
    k = k / k.norm(dim=-1, keepdim=True)
    q = q / q.norm(dim=-1, keepdim=True)
    k[5::7] = q[3, 0]  # scores of +-60 among small ones
    k[6::7] = -q[3, 0]
    check_contiguous(q, k, v, cu_q, cu_k, scale=60.0)
    check_contiguous(q, k[:1].expand_as(k).contiguous(), v, cu_q, cu_k, scale=60.0)


def test_query_that_sees_no_key_gives_zeros(device):
    q, k, v, cu_q, cu_k = random([(70, 3)], device)
    out = check_contiguous(q, k, v, cu_q, cu_k)
    assert (out[:67] == 0).all() and (out[67:] != 0).all()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_prefill_tiles_that_see_no_key_give_zeros(head_dim, device):
    lengths = [(400, 30), (300, 0), (20, 20)]
    out = check_contiguous(*random(lengths, device, head_dim=head_dim, dtype=torch.bfloat16))
    assert (out[:370] == 0).all() and (out[370:400] != 0).all() and (out[400:700] == 0).all()
    out = check_contiguous(*random([(300, 0)], device, head_dim=head_dim, dtype=torch.bfloat16))
    assert (out == 0).all()


def test_padded_rows_are_left_alone(device):
    q, k, v, cu_q, cu_k = random([(2, 9), (1, 5)], device, padding=6)
    q[3:] = float("nan")
    assert check_contiguous(q, k, v, cu_q, cu_k)[3:].isnan().all()


def test_padded_rows_of_prefill_tiles_are_left_alone(device):
    q, k, v, cu_q, cu_k = random(
        [(150, 150), (37, 90)], device, padding=60, head_dim=128, dtype=torch.bfloat16
    )
    q[187:] = float("nan")
    assert check_contiguous(q, k, v, cu_q, cu_k)[187:].isnan().all()


def test_slices_of_a_merged_projection(device):
    merged = torch.randn(90, 16 * 64, device=device, dtype=torch.bfloat16)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in merged.split([8 * 64, 4 * 64, 4 * 64], dim=1))
    lengths = cumulative([37, 53], device)
    out = torch.empty(90, 3, 8, 64, device=device, dtype=torch.bfloat16)
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), lengths, lengths)
    assert torch.equal(ops.attention(q, k, v, lengths, lengths), expected)
    ops.attention(q, k, v, lengths, lengths, out=out[:, 1])
    assert torch.equal(out[:, 1], expected)


def test_empty(device):
    q, k, v, cu_q, cu_k = random([], device)
    assert ops.attention(q, k, v, cu_q, cu_k).shape == (0, 4, 64)


def test_a_sequence_does_not_depend_on_its_batch():
    q, k, v, cu_q, cu_k = random(LENGTHS, torch.device("cpu"))
    whole = ops.attention(q, k, v, cu_q, cu_k)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(len(LENGTHS)):
            rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            alone = ops.attention(
                q[rows], k[keys], v[keys], cu_q[i : i + 2] - cu_q[i], cu_k[i : i + 2] - cu_k[i]
            )
            assert torch.equal(whole[rows], alone)
    finally:
        torch.set_num_threads(threads)


def test_arrays_that_speak_dlpack():
    q, k, v, cu_q, cu_k = random([(3, 8)], torch.device("cpu"))
    arrays = [x.numpy() for x in (q, k, v, cu_q, cu_k)]
    out = np.full(q.shape, np.nan, dtype=np.float32)
    result = ops.attention(*arrays, out=out)
    expected = ops.attention(q, k, v, cu_q, cu_k)
    assert torch.equal(result, expected) and np.array_equal(out, expected.numpy())


def test_opcheck_and_compile(device):
    q, k, v, cu_q, cu_k = random([(3, 8), (2, 2)], device)
    plan = ops.AttentionPlan.allocate(
        num_tokens=5, num_seqs=2, num_q_heads=4, num_kv_heads=2, head_dim=64, device=device
    )
    ops.plan_attention(
        plan, cu_q, cu_seqlens_k=cu_k, num_tokens=5, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype=q.dtype
    )
    arguments = (q, k, v, cu_q, cu_k, plan.work_map, plan.workspace, 0.125, True, 0, 0.0, torch.empty_like(q))
    torch.library.opcheck(torch.ops.fastkernels.attention.default, arguments)
    lengths = (cu_q, cu_k, None, 5, 4, 2, 64, 0, True, q.dtype)
    torch.library.opcheck(torch.ops.fastkernels.attention_plan.default, (*lengths, plan.work_map))
    compiled = torch.compile(
        lambda *x: ops.attention(*x) + ops.attention(*x, plan=plan), fullgraph=True, backend="aot_eager"
    )
    expected = 2 * ops.attention(q, k, v, cu_q, cu_k)
    assert torch.equal(compiled(q, k, v, cu_q, cu_k), expected)


def test_plan_sizes(device):
    small = ops.attention_plan_sizes(1, 1, 8, 2, 64, device=device)
    large = ops.attention_plan_sizes(512, 64, 8, 2, 64, device=device)
    if device.type == "cpu":
        assert small == large == (0, 0), "the CPU needs no plan"
    else:
        assert 0 < small[0] < large[0] and 0 < small[1] < large[1]


def test_refuses_what_it_does_not_take():
    q, k, v, cu_q, cu_k = random([(3, 8), (2, 2)], torch.device("cpu"))
    for name, arguments, message in [
        ("q", (q.double(), k, v, cu_q, cu_k), "q is float64, but the op takes bf16, fp16, fp32"),
        ("k", (q, k.half(), v, cu_q, cu_k), "k is fp16, but the op takes fp32"),
        ("v", (q, k, v.half(), cu_q, cu_k), "v is fp16, but the op takes fp32"),
        ("q", (q[0], k, v, cu_q, cu_k), r"q has shape \[4, 64\], but the op takes \[num_tokens, num_q_heads"),
        ("k", (q, k[..., :63], v, cu_q, cu_k), r"k has shape \[10, 2, 63\], but the op takes"),
        ("v", (q, k, v[:9], cu_q, cu_k), "but the op takes the shape of k"),
        (
            "stride",
            (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cu_q, cu_k),
            "dimension of q must be",
        ),
        (
            "stride",
            (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), cu_q, cu_k),
            "dimension of v must be",
        ),
        ("heads", (q[:, :3], k, v, cu_q, cu_k), r"num_q_heads is 3, but the op takes multiples of .* \(2\)"),
        ("lengths", (q, k, v, cu_q.long(), cu_k), "cu_seqlens_q is int64, but the op takes int32"),
        ("lengths", (q, k, v, cu_q[:0], cu_k), "cu_seqlens_q is empty"),
        (
            "lengths",
            (q, k, v, cu_q, cu_k[:2]),
            r"cu_seqlens_k has shape \[2\], but the op takes \[num_seqs \+ 1\]",
        ),
        ("lengths", (q, k, v, cu_q.repeat_interleave(2)[::2], cu_k), "cu_seqlens_q must be contiguous"),
        ("device", (q, k, v, cu_q, cu_k.to("meta")), "cu_seqlens_k is on meta, but q is on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.attention(*arguments)
            pytest.fail(f"{name} was taken")
    for options, message in [
        ({"window": -1}, "window is -1, but the op takes a number of tokens"),
        ({"window": 4, "causal": False}, "a window needs causal=True"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0, but the op takes a positive number or 0"),
        ({"out": torch.empty(5, 4, 63)}, "out has shape"),
        ({"out": torch.empty(5, 4, 64).half()}, "out is fp16, but the op takes fp32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.attention(q, k, v, cu_q, cu_k, **options)
    with pytest.raises(ValueError, match="head_dim is 320, but the op takes 1 to 256"):
        ops.attention(q.new_empty(5, 4, 320), k.new_empty(10, 2, 320), v.new_empty(10, 2, 320), cu_q, cu_k)


def test_refuses_wrong_lengths():
    q, k, v, cu_q, cu_k = random([(3, 8), (2, 2)], torch.device("cpu"))
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 5, but there are 4 rows"):
        ops.attention(q[:4], k, v, cu_q, cu_k)
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 10, but there are 9 rows"):
        ops.attention(q, k[:9], v[:9], cu_q, cu_k)
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        ops.attention(q, k, v, torch.tensor([0, 4, 2], dtype=torch.int32), cu_k)
    with pytest.raises(ValueError, match="cu_seqlens_k must not be negative"):
        ops.attention(q, k, v, cu_q, torch.tensor([-1, 4, 5], dtype=torch.int32))


def test_plan_refuses_both_or_neither_of_the_lengths(device):
    plan = ops.AttentionPlan.allocate(
        num_tokens=5, num_seqs=2, num_q_heads=4, num_kv_heads=2, head_dim=64, device=device
    )
    cu = cumulative([3, 2], device)
    shapes = {"num_tokens": 5, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
    with pytest.raises(ValueError, match="give either cu_seqlens_k"):
        ops.plan_attention(plan, cu, **shapes)
    with pytest.raises(ValueError, match="give either cu_seqlens_k"):
        ops.plan_attention(plan, cu, cu_seqlens_k=cu, seq_lens=cu[1:], **shapes)
    with pytest.raises(ValueError, match="dtype is int32, but the op takes"):
        ops.plan_attention(plan, cu, cu_seqlens_k=cu, **{**shapes, "dtype": torch.int32})
