"""quantize, and the ops that end in it: rms_norm, add_rms_norm, silu_mul and gelu_mul with _quant."""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.float8_e4m3fn, torch.int8]
LARGEST = {torch.float8_e4m3fn: 448, torch.int8: 127, torch.float8_e5m2: 57344}
PERS = ["tensor", "token", "block"]
SHAPES = [
    (1, 128),
    (3, 256),
    (0, 128),
    (7, 4096),
    (1, 14336),
    (64, 1152),
    (2, 20480),
    (300, 384),
    (16, 8320),
    (66, 8320),
    (67, 8320),
]
EPS = 1e-5


def weighted(shape, dtype, device):
    return torch.randn(shape[1], device=device, dtype=dtype)


def gate_and_up(shape, dtype, device):
    return torch.randn(shape[0], 2 * shape[1], device=device, dtype=dtype) * 2


def plain_case(shape, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    return lambda **how: ops.quantize(x, **how), x.double()


def rms_norm_case(shape, dtype, device):
    x, weight = torch.randn(shape, device=device, dtype=dtype) * 3, weighted(shape, dtype, device)
    exact = reference.rms_norm(x.double(), weight.double(), EPS)
    return lambda **how: ops.rms_norm_quant(x, weight, EPS, **how), exact


def add_rms_norm_case(shape, dtype, device):
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype) * 3
    weight, updated = weighted(shape, dtype, device), residual.clone()

    def call(**how):
        updated.copy_(residual)
        result = ops.add_rms_norm_quant(x, updated, weight, EPS, **how)
        assert torch.equal(updated, residual + x), "the residual is not the rounded sum"
        return result

    return call, reference.rms_norm((residual + x).double(), weight.double(), EPS)


def silu_mul_case(shape, dtype, device):
    x = gate_and_up(shape, dtype, device)
    return lambda **how: ops.silu_mul_quant(x, **how), reference.silu_mul(x.double())


def gelu_mul_case(shape, dtype, device):
    x = gate_and_up(shape, dtype, device)
    return lambda **how: ops.gelu_mul_quant(x, **how), reference.gelu_mul(x.double())


def gelu_tanh_mul_case(shape, dtype, device):
    x = gate_and_up(shape, dtype, device)
    return lambda **how: ops.gelu_mul_quant(x, True, **how), reference.gelu_mul(x.double(), True)


CASES = [plain_case, rms_norm_case, add_rms_norm_case, silu_mul_case, gelu_mul_case, gelu_tanh_mul_case]


def steps_between(a, b):
    """How many values of the type lie between two of it, at most."""
    if a.dtype == torch.int8:
        return (a.int() - b.int()).abs().max().item()
    order = [x.view(torch.uint8).int() for x in (a, b)]
    order = [torch.where(x >= 128, 128 - x, x) for x in order]
    return (order[0] - order[1]).abs().max().item()


def assert_quantized(result, scales, exact, per, given):
    expected, expected_scales = reference.quantize(exact, per, given, result.dtype)
    if per != "tensor":
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    if result.numel() == 0:
        return
    assert steps_between(result.cpu(), expected.cpu()) <= 1
    equal = (result.view(torch.uint8) == expected.view(torch.uint8)) | (result.float() == expected.float())
    assert equal.float().mean() >= 0.999 - 2 / result.numel(), f"{equal.float().mean():.5f} are equal"


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("byte", BYTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removesuffix("_case"))
def test_matches_reference(case, dtype, byte, per, device):
    for shape in SHAPES:
        call, exact = case(shape, dtype, device)
        how = {"per": per, "dtype": byte}
        if per == "tensor":  # some values are cut off
            how["scales"] = torch.tensor([2.5 / LARGEST[byte]], device=device)
        out = poisoned(*shape, dtype=torch.int8, device=device).view(byte)
        result, scales = call(out=out, **how)
        assert result is out
        assert_quantized(result, scales, exact, per, how.get("scales"))
        again, again_scales = call(**how)
        assert torch.equal(result.view(torch.uint8), again.view(torch.uint8)), "two runs differ"
        assert torch.equal(scales, again_scales)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_alone_gives_e5m2(dtype, per, device):
    test_matches_reference(plain_case, dtype, torch.float8_e5m2, per, device)
    weight = torch.ones(128, device=device, dtype=dtype)
    with pytest.raises(ValueError, match=r"rms_norm_quant: dtype is torch\.float8_e5m2, but the op takes"):
        ops.rms_norm_quant(torch.ones(1, 128, device=device, dtype=dtype), weight, dtype=torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_points(dtype, device):
    for shape in [*SHAPES, (5, 16), (2, 48)]:
        for shift in (0.0, 2.0, -40.0):
            x = (torch.randn(shape, device=device) * 3 + shift).to(dtype)
            out = poisoned(*shape, dtype=torch.int8, device=device)
            result, scales, zeros = ops.quantize_zeros(x, out=out)
            assert result is out
            expected, expected_scales, expected_zeros = reference.quantize_zeros(x)
            assert torch.equal(result, expected) and torch.equal(zeros, expected_zeros)
            assert torch.equal(scales, expected_scales)
            back = (result.double() - zeros[:, None]) * scales[:, None].double()
            assert ((back - x.double()).abs() <= 0.501 * scales[:, None]).all()


def test_zero_points_of_extremes(device):
    x = torch.zeros(6, 256, device=device)
    x[1, 7], x[2, 3], x[2, 200], x[3], x[4, 255], x[5, 0] = 1e-38, 3e38, -3e38, 5.0, torch.nan, torch.inf
    result, scales, zeros = ops.quantize_zeros(x)
    assert torch.isfinite(scales[:4]).all() and (scales[:4] > 0).all() and scales[4:].isnan().all()
    assert (result[0] == zeros[0]).all() and (result[3] == 127).all() and zeros[3].item() == -127
    assert result[2, 3].item() == 127 and result[2, 200].item() == -127 and zeros[2].item() == 0
    wide = torch.randn(5, 768, device=device, dtype=torch.bfloat16)
    dense = ops.quantize_zeros(wide[:, 256:512].contiguous())
    for one, other in zip(ops.quantize_zeros(wide[:, 256:512]), dense, strict=True):
        assert torch.equal(one, other)


def test_zero_points_opcheck_compile_and_refusals(device):
    x = torch.randn(3, 64, device=device)
    parts = ops.quantize_zeros(x)
    torch.library.opcheck(torch.ops.fastkernels.quantize_zeros.default, (x, *parts))
    compiled = torch.compile(lambda a: ops.quantize_zeros(a)[2] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), parts[2] + 1)
    with pytest.raises(ValueError, match="a row has 40 elements, but the op takes a multiple of 16"):
        ops.quantize_zeros(x[:, :40])
    with pytest.raises(ValueError, match="zeros is fp32, but the op takes int32"):
        ops.quantize_zeros(x, zeros=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"zeros has shape \[2\]"):
        ops.quantize_zeros(x, zeros=torch.zeros(2, device=device, dtype=torch.int32))
    with pytest.raises(ValueError, match="out is uint8, but the op takes int8"):
        ops.quantize_zeros(x, out=torch.zeros(3, 64, device=device, dtype=torch.uint8))


@pytest.mark.parametrize("byte", [*BYTES, torch.float8_e5m2], ids=str)
def test_every_value_rounds_as_torch_does(byte, device):
    one = torch.ones(1, device=device)
    values = torch.arange(-60000, 60000, 16, device=device).bfloat16().unique().float()
    x = torch.cat([values / 128, values / 2**20, values * 2.0**-24]).float()
    x = x[: len(x) // 16 * 16].view(-1, 16)
    result, _ = ops.quantize(x, per="tensor", scales=one, dtype=byte)
    expected, _ = reference.quantize(x, "tensor", one, byte)
    assert torch.equal(result.float(), expected.float())


@pytest.mark.parametrize("per", ["token", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_round_as_on_the_cpu(per, dtype, device):
    """Of 11 bits and fewer many lie on ties once scaled, where a last bit of the scale's inverse decides."""
    x = torch.randn(64, 4096).to(dtype)
    expected, expected_scales = reference.quantize(x, per)
    result, scales = ops.quantize(x.to(device), per=per)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(result.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_zeros_and_extremes(device):
    x = torch.zeros(4, 256, device=device)
    x[1, 7], x[2, 3], x[2, 200], x[3] = 1e-38, 3e38, -1.0, 5.0
    for per in ("token", "block"):
        result, scales = ops.quantize(x, per=per)
        assert torch.isfinite(result.float()).all() and torch.isfinite(scales).all() and (scales > 0).all()
        assert (
            (result[0].float() == 0).all() and result[2, 3].item() == 448 and (result[3].float() == 448).all()
        )


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("byte", BYTES, ids=str)
@pytest.mark.parametrize("size", [256, 4096, 5120, 20480])
def test_zeros_stay_zeros_in_the_norms(size, byte, per, device):
    """A padded row, and zeros beside tiny elements, whose norm is so small that it is scaled up."""
    x = torch.zeros(3, size, device=device, dtype=torch.bfloat16)
    x[1, 5], x[2, :128] = 1e-4, torch.randn(128, device=device).bfloat16()
    weight = torch.randn(size, device=device, dtype=torch.bfloat16)
    given = {"scales": torch.full((1,), 2.0**-126, device=device)} if per == "tensor" else {}
    norms = [
        lambda **how: ops.rms_norm_quant(x, weight, EPS, **how),
        lambda **how: ops.add_rms_norm_quant(x, torch.zeros_like(x), weight, EPS, **how),
    ]
    for norm in norms:
        result, scales = norm(per=per, dtype=byte, **given)
        assert torch.isfinite(scales).all() and (scales > 0).all()
        assert (result.float()[x == 0] == 0).all() and result.float()[1, 5] != 0


def test_strided(device):
    wide = torch.randn(5, 3 * 256, device=device, dtype=torch.bfloat16)
    x, out = wide[:, 256:512], torch.zeros(5, 512, dtype=torch.int8, device=device)
    dense, dense_scales = ops.quantize(x.contiguous(), dtype=torch.int8)
    result, scales = ops.quantize(x, dtype=torch.int8, out=out[:, 128:384])
    assert torch.equal(result, dense) and torch.equal(scales, dense_scales)
    assert (out[:, :128] == 0).all() and (out[:, 384:] == 0).all()
    weight = torch.randn(256, device=device, dtype=torch.bfloat16)
    strided, _ = ops.rms_norm_quant(x, weight, dtype=torch.int8)
    assert torch.equal(strided, ops.rms_norm_quant(x.contiguous(), weight, dtype=torch.int8)[0])


def test_opcheck_and_compile(device):
    x, residual, weight = (torch.randn(s, device=device) for s in ((3, 256), (3, 256), (256,)))
    library = torch.ops.fastkernels

    def outputs(size=256):
        return torch.empty(3, size, dtype=torch.int8, device=device), torch.empty(3, device=device)

    torch.library.opcheck(library.quantize.default, (x, 1, *outputs()))
    torch.library.opcheck(library.rms_norm_quant.default, (x, weight, EPS, 1, *outputs()))
    torch.library.opcheck(library.add_rms_norm_quant.default, (x, residual, weight, EPS, 1, *outputs()))
    torch.library.opcheck(library.silu_mul_quant.default, (x, 1, *outputs(128)))
    torch.library.opcheck(library.gelu_mul_quant.default, (x, False, 1, *outputs(128)))

    def layer(a):
        result, scales = ops.rms_norm_quant(a * 2, weight, per="block", dtype=torch.int8)
        return result.float() * scales.repeat_interleave(128, 1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_refuses_what_it_does_not_take():
    x, weight = torch.randn(3, 256), torch.randn(256)
    with pytest.raises(ValueError, match="x is float64, but the op takes bf16, fp16, fp32"):
        ops.quantize(x.double())
    with pytest.raises(ValueError, match=r"x has shape \[256\], but the op takes \[num_tokens, size\]"):
        ops.quantize(x[0])
    with pytest.raises(ValueError, match="a row has 250 elements, but the op takes a multiple of 16"):
        ops.quantize(x[:, :250])
    with pytest.raises(ValueError, match="a row has 240 elements, but per 'block' takes a multiple of 128"):
        ops.quantize(x[:, :240], per="block")
    with pytest.raises(ValueError, match="per is 'row', but the op takes 'tensor', 'token' and 'block'"):
        ops.quantize(x, per="row")
    with pytest.raises(ValueError, match="per 'tensor' takes the scale"):
        ops.quantize(x, per="tensor")
    with pytest.raises(ValueError, match=r"scales has shape \[3\], but the op takes \[3, 2\] per 'block'"):
        ops.rms_norm_quant(x, weight, per="block", scales=torch.empty(3))
    with pytest.raises(ValueError, match=r"dtype is torch\.float16, but the op takes float8_e4m3fn, int8"):
        ops.silu_mul_quant(x, dtype=torch.float16)
    with pytest.raises(ValueError, match="out is int8, but the op takes float8_e4m3fn"):
        ops.gelu_mul_quant(x, out=torch.empty(3, 128, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"x has shape \[3, 2, 128\], but the op takes \[num_tokens, size\]"):
        ops.rms_norm_quant(x.view(3, 2, 128), weight)
    with pytest.raises(ValueError, match="residual is fp16, but the op takes fp32"):
        ops.add_rms_norm_quant(x, x.half(), weight)
    with pytest.raises(ValueError, match="scales is on meta, but out is on cpu"):
        ops.quantize(x, scales=torch.empty(3, device="meta"))
