"""The product of one token with the norm before it and the addition behind it. CUDA only."""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.gemm import LINEAR_TACTIC
from tests.conftest import CUDA_REASON
from tests.ops.matmul_cases import exact_quantized, quantized_operands
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

pytestmark = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))

EPS = 1e-5
BYTES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
DTYPES = [torch.bfloat16, torch.float16]
SIZES = [  # out_size, in_size; a block has 16 rows, a warp chunks of 128, a block 8 of them
    (1, 16),
    (15, 128),
    (17, 144),
    (1003, 1040),
    (64, 2048),
    (160, 4096),
    (4240, 1024),  # more than two blocks an SM
    (96, 8192),
]


def of_weight(given):
    return {"weight": given["weight"], "weight_scales": given["scales"].view(-1), "bias": given["bias"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", BYTES)
@pytest.mark.parametrize("out_size, in_size", [*SIZES, (48, 14336)])
def test_bytes(out_size, in_size, scheme, dtype):
    given = quantized_operands(scheme, 1, out_size, in_size, dtype)
    if out_size % 2:
        given["bias"] = None
    x, x_scales = ops.quantize(given["x"], per="token", dtype=BYTES[scheme])
    out = poisoned(1, out_size, dtype=dtype, device="cuda")
    assert ops.token_linear(x, **of_weight(given), x_scales=x_scales, out=out) is out
    exact = exact_quantized(given)
    assert_as_good_as_torch(out, exact_quantized(given, dtype), exact)
    assert torch.equal(out, ops.quantized_linear(**given, tactic=LINEAR_TACTIC))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", BYTES)
@pytest.mark.parametrize("out_size, in_size", SIZES)
def test_a_row_that_is_normalised(out_size, in_size, scheme, dtype):
    given = quantized_operands(scheme, 1, out_size, in_size, dtype)
    given["x"] *= 5
    if out_size % 2:
        given["bias"] = None
    norm = torch.randn(in_size, device="cuda", dtype=dtype)
    how = {**of_weight(given), "norm_weight": norm, "eps": EPS}
    out = poisoned(1, out_size, dtype=dtype, device="cuda")
    ops.token_linear(given["x"], **how, out=out)
    again = poisoned(1, out_size, dtype=dtype, device="cuda")
    assert torch.equal(out, ops.token_linear(given["x"], **how, constant_weight=True, out=again)), (
        "two runs differ"
    )

    row = reference.rms_norm(given["x"].double(), norm.double(), EPS)
    weight = given["weight"].double() * given["scales"].double()
    bias = 0.0 if given["bias"] is None else given["bias"].double()
    if in_size >= 1024:  # of a few products the rounding of each shows
        assert_similar(out, row @ weight.t() + bias, 1e-3)
    x, x_scales = reference.quantize(row, "token", None, BYTES[scheme])
    exact = (x.double() * x_scales.double().view(-1, 1)) @ weight.t() + bias
    assert_as_good_as_torch(out, exact.to(dtype), exact)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", BYTES)
def test_adds(scheme, dtype, normed):
    for out_size, in_size in ((17, 144), (4096, 1024), (4240, 512)):
        given = quantized_operands(scheme, 1, out_size, in_size, dtype)
        if normed:
            x, how = given["x"], {"norm_weight": torch.randn(in_size, device="cuda", dtype=dtype)}
        else:
            x, scales = ops.quantize(given["x"], per="token", dtype=BYTES[scheme])
            how = {"x_scales": scales}
        before = torch.randn(1, out_size, device="cuda", dtype=dtype) * 3
        product = ops.token_linear(x, **of_weight(given), **how, out=torch.empty_like(before))
        added = ops.token_linear(x, **of_weight(given), **how, adds=True, out=before.clone())
        assert torch.equal(added, before + product)


def test_what_lies_beside_out_stays():
    given = quantized_operands("fp8", 1, 100, 256, torch.bfloat16)
    wide = poisoned(1, 128, dtype=torch.bfloat16, device="cuda")
    norm = torch.ones(256, device="cuda", dtype=torch.bfloat16)
    ops.token_linear(given["x"], **of_weight(given), norm_weight=norm, out=wide[:, 8:108])
    assert wide[:, :8].isnan().all() and wide[:, 108:].isnan().all() and wide[:, 8:108].isfinite().all()


def test_zeros_and_nan():
    given = quantized_operands("fp8", 1, 32, 256, torch.bfloat16)
    how = {**of_weight(given), "norm_weight": torch.ones(256, device="cuda", dtype=torch.bfloat16)}
    out = poisoned(1, 32, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(ops.token_linear(torch.zeros_like(given["x"]), **how, out=out), given["bias"][None])
    given["x"][0, 7] = float("nan")
    assert ops.token_linear(given["x"], **how, out=out).isnan().all()


def test_behind_other_kernels_of_a_graph():
    """Products that read what the kernel before them writes, as dependent launches."""
    given = quantized_operands("fp8", 1, 1024, 1024, torch.bfloat16)
    norm = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    rows = [torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def run():
        for i in range(8):
            ops.token_linear(
                rows[i % 2],
                **of_weight(given),
                norm_weight=norm,
                adds=True,
                constant_weight=True,
                out=rows[(i + 1) % 2],
            )

    start = [row.clone() for row in rows]
    run()
    expected = [row.clone() for row in rows]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        for row, first in zip(rows, start, strict=True):
            row.copy_(first)
        graph.replay()
        assert all(map(torch.equal, rows, expected))


def test_opcheck_and_compile():
    given = quantized_operands("int8", 1, 64, 128, torch.bfloat16)
    norm = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)
    scales = given["scales"].view(-1)
    arguments = (given["x"], None, norm, EPS, given["weight"], scales, given["bias"], False, False, out)
    torch.library.opcheck(torch.ops.fastkernels.token_linear.default, arguments)

    def call(x):
        return ops.token_linear(x, **of_weight(given), norm_weight=norm, out=torch.empty_like(out)) + 1

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(given["x"]), call(given["x"]))


def test_refuses_what_it_does_not_take():
    given = quantized_operands("fp8", 2, 64, 128, torch.bfloat16)
    x, out = given["x"][:1], torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)
    norm = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    bytes_, scales = ops.quantize(x, per="token")
    how = {**of_weight(given), "out": out}
    for arguments, message in (
        ({"x": given["x"], "norm_weight": norm}, r"x has shape \[2, 128\], but the op takes \[1, in_size\]"),
        ({"x": x}, "x takes x_scales or a norm_weight, one of the two"),
        ({"x": x, "x_scales": scales}, "x is bf16, but the op takes float8_e4m3fn"),
        ({"x": bytes_, "norm_weight": norm}, "x is float8_e4m3fn, but the op takes bf16"),
        ({"x": bytes_, "x_scales": scales, "weight": given["weight"][:, :64]}, "weight has shape"),
        ({"x": bytes_, "x_scales": scales, "weight": x.expand(64, -1)}, "weight is bf16, but the op takes"),
        ({"x": bytes_, "x_scales": scales, "weight_scales": scales.expand(3)}, "weight_scales has shape"),
        ({"x": bytes_, "x_scales": scales, "out": out.float()}, "out is fp32, but the op takes bf16, fp16"),
        ({"x": x, "norm_weight": norm.half()}, "norm_weight is fp16, but the op takes bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.token_linear(**{**how, **arguments})
    long = quantized_operands("fp8", 1, 8, 8208, torch.bfloat16)
    ones = torch.ones(8208, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="in_size is 8208, but the op normalises at most 8192"):
        ops.token_linear(long["x"], **of_weight(long), norm_weight=ones, out=out[:, :8])
