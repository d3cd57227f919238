"""Attention over queries, keys and values in e4m3.

Where Hopper's kernel rounds the weights p to e4m3, relative to the largest of the row, a weight is off by at
most a sixteenth of itself, or by 2^-18 of the largest where it falls below the normal numbers. So an element
of the result is off by at most (sum p |v|) / 16 + 2^-18 max(p) sum |v|, with p summing to 1, beside the
rounding of out. These errors are independent: over a row of v around 0 their norm is at most 2^-4 / sqrt(3) =
0.036 of the result's.
"""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.attention_cases import PagedBatch, cumulative
from tests.tolerances import poisoned

E4M3 = torch.float8_e4m3fn
PAGE = 16
# (queries, keys): decodes and drafts between prompts and chunks, around pages and blocks of 64 and 192 keys
MIXED = [
    (0, 5),
    (1, 1),
    (PAGE + 1, PAGE + 1),
    (1, PAGE - 1),
    (64, 64),
    (0, 0),
    (193, 193),
    (5, 300),
    (65, 700),
]
PREFILLS = [(200, 200), (1, 77), (129, 191), (0, 9), (3, 300), (128, 385), (33, 1000), (257, 383), (1, 600)]


def scales_of(num_kv_heads: int, device: torch.device) -> dict[str, torch.Tensor]:
    """They differ from head to head, and let some elements saturate."""
    ramp = 1.0 + torch.arange(num_kv_heads, device=device).float() / num_kv_heads
    return {"q_scale": 0.01 * ramp, "k_scale": 0.012 * ramp.flip(0), "v_scale": 0.008 * ramp}


def saturated(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448.0, 448.0).to(E4M3)  # what e4m3 cannot hold some versions of torch make NaN


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] in e4m3; scale: of a KV head and its query heads."""
    return saturated(x.float() / scale.repeat_interleave(x.shape[1] // scale.shape[0])[:, None])


def dequantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.double() * scale.double().repeat_interleave(x.shape[1] // scale.shape[0])[:, None]


def assert_close(
    result: torch.Tensor, exact: torch.Tensor, magnitudes: torch.Tensor, ends: torch.Tensor
) -> None:
    """exact: in float64; magnitudes: of |v| with the same weights; ends: the largest sum of |v|."""
    assert torch.isfinite(result).all(), "an element was not written"
    rounding = 2.0 ** (-8 if result.dtype == torch.bfloat16 else -11)
    limit = magnitudes / 16 + 2.0**-18 * ends + rounding * exact.abs() + 1e-4
    error = (result.double() - exact).abs()
    assert (error <= limit).all(), (
        f"max abs error {error.max():.3g}, limit there {limit[error > limit].max():.3g}"
    )
    assert error.norm() <= 0.04 * exact.norm(), f"relative error {error.norm() / exact.norm():.3g}"


def contiguous(lengths, device, *, heads=(8, 2), head_dim=128):
    num_tokens, num_keys = sum(n for n, _ in lengths), sum(n for _, n in lengths)
    scales = scales_of(heads[1], device)
    q = quantize(2 * torch.randn(num_tokens, heads[0], head_dim, device=device), scales["q_scale"])
    k = quantize(torch.randn(num_keys, heads[1], head_dim, device=device), scales["k_scale"])
    v = quantize(torch.randn(num_keys, heads[1], head_dim, device=device), scales["v_scale"])
    cu_q, cu_k = cumulative([n for n, _ in lengths], device), cumulative([n for _, n in lengths], device)
    return (q, k, v, cu_q, cu_k), scales


def check_contiguous(arguments, scales, *, out_dtype=torch.bfloat16, **options) -> torch.Tensor:
    q, k, v, cu_q, cu_k = arguments
    out = poisoned(*q.shape, dtype=out_dtype, device=q.device)
    assert ops.attention(*arguments, out=out, **scales, **options) is out
    wide = [dequantize(x, scales[name]) for x, name in ((q, "q_scale"), (k, "k_scale"), (v, "v_scale"))]
    exact = reference.attention(*wide, cu_q, cu_k, **options)
    magnitudes = reference.attention(*wide[:2], wide[2].abs(), cu_q, cu_k, **options)
    assert_close(out, exact, magnitudes, wide[2].abs().sum(0).max())
    again = ops.attention(*arguments, out_dtype=out_dtype, **scales, **options)
    assert torch.equal(out, again), "two runs differ"
    return out


def paged(lengths, device, **shape) -> tuple[PagedBatch, dict[str, torch.Tensor]]:
    """What no sequence uses of the cache stays NaN."""
    batch = PagedBatch.random(lengths, device, **shape)
    scales = scales_of(batch.kv_cache.shape[2], device)
    kv_scales = torch.stack((scales["k_scale"], scales["v_scale"]))[None, :, :, None, None]
    batch.kv_cache = saturated(batch.kv_cache / kv_scales)
    batch.q = quantize(batch.q, scales["q_scale"])
    return batch, scales


def check_paged(batch: PagedBatch, scales, *, out_dtype=torch.bfloat16, **options) -> torch.Tensor:
    rest = (batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    out = poisoned(*batch.q.shape, dtype=out_dtype, device=batch.q.device)
    ops.paged_attention(batch.q, batch.kv_cache, *rest, out=out, **scales, **options)
    n = batch.num_tokens
    q = dequantize(batch.q, scales["q_scale"])
    cache = batch.kv_cache.double()
    for i, name in enumerate(("k_scale", "v_scale")):
        cache[:, i] *= scales[name].double()[:, None, None]
    exact = reference.paged_attention(q, cache, *rest, **options)
    cache[:, 1] = cache[:, 1].abs()
    magnitudes = reference.paged_attention(q, cache, *rest, **options)
    assert_close(out[:n], exact[:n], magnitudes[:n], cache[:, 1].nan_to_num(0.0).sum((0, 2)).max())
    again = ops.paged_attention(batch.q, batch.kv_cache, *rest, out_dtype=out_dtype, **scales, **options)
    assert torch.equal(out[:n], again[:n]), "two runs differ"
    return out


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_contiguous(causal, head_dim, device):
    check_contiguous(*contiguous(PREFILLS, device, head_dim=head_dim), causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [MIXED, PREFILLS, [(1, 40), (1, 9)], [(3, 3)]], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (32, 4), (7, 1)], ids=str)
def test_mixed_steps(heads, lengths, head_dim, device):
    check_paged(*paged(lengths, device, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_page_sizes(page_size, device):
    around = [(70, n) for n in (page_size - 1 + 70, page_size + 70, page_size + 71)]
    check_paged(*paged([*PREFILLS, *around], device, head_dim=128, page_size=page_size))


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 140}, {"window": 300, "soft_cap": 20.0}, {"soft_cap": 5.0}, {"scale": 0.3}],
    ids=str,
)
def test_options(options, device):
    check_paged(*paged(PREFILLS, device, heads=(8, 2), head_dim=128), **options)
    check_contiguous(*contiguous(PREFILLS, device), **options)


def test_fp16_out(device):
    check_paged(*paged(MIXED, device, head_dim=128), out_dtype=torch.float16)


@pytest.mark.parametrize("lengths", [[(150, 9001)], [(1, 20), (140, 5000), (1, 3000)]], ids=str)
def test_split_contexts(lengths, device):
    check_paged(*paged(lengths, device, heads=(4, 1), head_dim=128))


def test_without_scales(device):
    arguments, scales = contiguous([(150, 200)], device)
    ones = {name: torch.ones_like(x) for name, x in scales.items()}
    options = {"scale": 2e-5}
    assert torch.equal(ops.attention(*arguments, **options), ops.attention(*arguments, **ones, **options))


def test_values_around_a_mean(device):
    """Rounded weights that do not sum to 1 would show in a result far from 0."""
    (q, k, v, cu_q, cu_k), scales = contiguous([(140, 3000)], device)
    v = quantize(dequantize(v, scales["v_scale"]) / 8 + 1, scales["v_scale"])
    out = check_contiguous((q, k, v, cu_q, cu_k), scales)
    wide = [dequantize(x, scales[name]) for x, name in ((q, "q_scale"), (k, "k_scale"), (v, "v_scale"))]
    exact = reference.attention(*wide, cu_q, cu_k)
    assert (out.double() - exact).norm() <= 0.01 * exact.norm()


def test_opcheck_and_compile(device):
    arguments, scales = contiguous([(130, 140), (2, 2)], device)
    q, _, _, cu_q, cu_k = arguments
    plan = ops.AttentionPlan.allocate(
        num_tokens=132, num_seqs=2, num_q_heads=8, num_kv_heads=2, head_dim=128, device=device
    )
    shape = {"num_tokens": 132, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    ops.plan_attention(plan, cu_q, cu_seqlens_k=cu_k, dtype=torch.bfloat16, **shape)
    out = torch.zeros(q.shape, dtype=torch.bfloat16, device=device)
    rest = (plan.work_map, plan.workspace, 0.1, True, 0, 0.0, out, *scales.values())
    checks = (
        "test_faketensor",
        "test_autograd_registration",
    )  # torch's others compute with e4m3, which torch cannot
    torch.library.opcheck(torch.ops.fastkernels.attention.default, (*arguments, *rest), test_utils=checks)
    compiled = torch.compile(lambda *x: ops.attention(*x, **scales), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.attention(*arguments, plan=plan, **scales))


def test_errors(device):
    (q, k, v, *lengths), scales = contiguous([(3, 3)], device)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        ops.attention(q, k.to(torch.bfloat16), v.to(torch.bfloat16), *lengths)
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    for name in ("q_scale", "k_scale", "v_scale"):
        with pytest.raises(ValueError, match=f"{name} is given, but {name[0]} is bf16"):
            ops.attention(*half, *lengths, **{name: scales[name]})
    with pytest.raises(ValueError, match=r"q_scale .*\[num_kv_heads\]"):
        ops.attention(q, k, v, *lengths, q_scale=torch.ones(8, device=device))
    with pytest.raises(
        ValueError, match="out_dtype is fp32, but with q in float8_e4m3fn the op takes bf16 and fp16"
    ):
        ops.attention(q, k, v, *lengths, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_dtype is bf16, but with q in fp16 the op takes fp16"):
        ops.attention(*(x.half() for x in half), *lengths, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out_dtype is not the dtype of out, bf16"):
        ops.attention(q, k, v, *lengths, out=torch.empty_like(half[0]), out_dtype=torch.float16)
    batch, scales = paged([(3, 3)], device)
    rest = (batch.page_table, batch.seq_lens, batch.cu_seqlens_q)
    with pytest.raises(ValueError, match="kv_cache"):
        ops.paged_attention(batch.q, batch.kv_cache.to(torch.float8_e5m2), *rest)
    with pytest.raises(ValueError, match="q_scale is given, but q is bf16"):
        ops.paged_attention(batch.q.to(torch.bfloat16), batch.kv_cache, *rest, q_scale=scales["q_scale"])
