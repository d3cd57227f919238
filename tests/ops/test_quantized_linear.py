"""quantized_linear against its own dequantised weights in float64, on every instruction set."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import fastkernels
from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [0, 1, 2, 3, 4, 15, 17, 65, 100]
SIZES = [  # out_size, in_size; rows go by 4 in tasks of 32, in_size by units of 32, 64 or 128
    (1, 128),
    (3, 256),
    (4, 384),
    (33, 640),
    (65, 1920),
    (67, 128),
]
ODD_SIZES = [(5, 2), (7, 34), (12, 200), (37, 1002)]  # of schemes with a scale a row
# name -> weight_type, size of a block (None: a row), rows of a block, dtype of scales, zeros, activation
SCHEMES: dict[str, tuple[str, int | None, int, torch.dtype, bool, str | None]] = {
    "int8-weight": ("int8", None, 1, torch.float32, False, None),
    "int8": ("int8", None, 1, torch.float32, False, "int8"),
    "int8-zeros": ("int8", None, 1, torch.float32, False, "int8-zeros"),
    "int4-channel": ("int4", None, 1, torch.bfloat16, False, None),
    "int4-channel-zeros": ("int4", None, 1, torch.float32, True, None),
    "int4-g16": ("int4", 16, 1, torch.bfloat16, False, None),
    "int4-g32-zeros": ("int4", 32, 1, torch.float16, True, None),
    "int4-g64": ("int4", 64, 1, torch.bfloat16, False, None),
    "int4-g128": ("int4", 128, 1, torch.bfloat16, False, None),
    "int4-g128-zeros": ("int4", 128, 1, torch.bfloat16, True, None),
    "int4-g128-e4m3": ("int4", 128, 1, torch.bfloat16, False, "e4m3"),
    "int4-g32-e4m3": ("int4", 32, 1, torch.float16, False, "e4m3"),
    "int4-channel-zeros-e4m3": ("int4", None, 1, torch.bfloat16, True, "e4m3"),
    "nvfp4": ("e2m1", 16, 1, torch.float8_e4m3fn, False, None),
    "mxfp4": ("e2m1", 32, 1, torch.uint8, False, None),
    "fp8": ("e4m3", None, 1, torch.float32, False, "e4m3"),
    "fp8-e5m2": ("e4m3", None, 1, torch.float32, False, "e5m2"),
    "fp8-weight": ("e4m3", None, 1, torch.bfloat16, False, None),
    "fp8-block": ("e4m3", 128, 128, torch.float32, False, "e4m3-block"),
    "fp8-block-weight": ("e4m3", 48, 5, torch.float32, False, None),
}


Schemes = dict[str, tuple[str, int | None, int, torch.dtype, bool, str | None]]


def operands(
    scheme: str,
    num_tokens: int,
    out_size: int,
    in_size: int,
    dtype: torch.dtype,
    schemes: Schemes = SCHEMES,
) -> dict[str, Any]:
    """Every code there is but NaN; scales such that the result is of size 1."""
    weight_type, size, rows, scale_dtype, has_zeros, activation = schemes[scheme]
    size = in_size if size is None else size
    if weight_type == "int8":
        weight, spread = torch.randint(-128, 128, (out_size, in_size)).to(torch.int8), 74.0
    elif weight_type == "e4m3":
        weight, spread = torch.randn(out_size, in_size).mul(20).to(torch.float8_e4m3fn), 20.0
    else:
        weight = torch.randint(0, 256, (out_size, in_size // 2)).to(torch.uint8)
        spread = 4.6 if weight_type == "int4" else 3.0
    shape = (-(-out_size // rows), -(-in_size // size))
    options: dict[str, Any] = {}
    scales = torch.rand(shape).add(0.5) / (spread * in_size**0.5)
    if scale_dtype == torch.uint8:
        scales = torch.randint(120, 124, shape)
    elif scale_dtype == torch.float8_e4m3fn:
        scales, options["global_scale"] = scales * 1000, torch.tensor([1e-3])
    if has_zeros:
        options["zeros"] = torch.randint(0, 16, shape).to(torch.uint8)
    return {
        "x": torch.randn(num_tokens, in_size).to(dtype),
        "weight": weight,
        "scales": scales.to(scale_dtype),
        "bias": torch.randn(out_size).to(dtype),
        "weight_type": weight_type,
        "block": (rows, size),
        "activation": activation,
        **options,
    }


ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPCHECKS = ALL[1:3]  # the others compare inputs by arithmetic that torch has not for fp8 on the CPU


def takes(scheme: str, in_size: int) -> bool:
    size = SCHEMES[scheme][1]
    return size is None or SCHEMES[scheme][0] == "e4m3" or in_size % size == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_matches_reference(scheme, dtype):
    for out_size, in_size in SIZES + ODD_SIZES:
        if not takes(scheme, in_size):
            continue
        for num_tokens in TOKENS:
            given = operands(scheme, num_tokens, out_size, in_size, dtype)
            for bias in (None, given["bias"]):
                given["bias"] = bias
                out = poisoned(num_tokens, out_size, dtype=dtype, device="cpu")
                assert ops.quantized_linear(**given, out=out) is out
                exact = reference.quantized_linear(**given)
                plain = reference.quantized_linear(**given, dtype=dtype)
                assert_as_good_as_torch(out, plain, exact)
                assert_similar(out, exact, 1e-5)
                assert torch.equal(out, ops.quantized_linear(**given)), "two runs differ"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_the_others(scheme):
    for dtype in DTYPES:
        given = operands(scheme, 70, 39, 384, dtype)
        together = ops.quantized_linear(**given)
        for count in (1, 3, 4, 66):
            some = ops.quantized_linear(**{**given, "x": given["x"][:count]})
            assert torch.equal(some, together[:count])


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme[0] != "e4m3"])
def test_interleaved_rows_give_the_same(scheme):
    """Whole groups of 8 rows and what is left, rows that end within a unit; one token and tiles of them."""
    for out_size, in_size in ((7, 256), (8, 640), (29, 1920), (64, 128), (41, 64), (24, 192)):
        if not takes(scheme, in_size) or in_size % (64 if SCHEMES[scheme][0] == "int8" else 128):
            continue
        for num_tokens in (1, 2, 9):
            given = operands(scheme, num_tokens, out_size, in_size, torch.bfloat16)
            expected = ops.quantized_linear(**given)
            if given["activation"] == "int8-zeros":
                given["weight_sums"] = ops.row_sums(given["weight"])
            given["weight"] = ops.interleave_rows(given["weight"])
            assert torch.equal(ops.quantized_linear(**given, interleaved=True), expected)


def test_interleave_rows():
    rows = torch.randint(-128, 128, (21, 192)).to(torch.int8)
    out = torch.empty_like(rows)
    assert ops.interleave_rows(rows, out=out) is out
    groups = rows[:16].view(2, 8, 3, 64).transpose(1, 2).reshape(16, 192)
    assert torch.equal(out, torch.cat([groups, rows[16:]]))
    assert ops.interleave_rows(rows[:0]).shape == (0, 192)
    torch.library.opcheck(torch.ops.fastkernels.interleave_rows.default, (rows, out))
    compiled = torch.compile(lambda a: ops.interleave_rows(a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), out + 1)
    with pytest.raises(
        ValueError, match=r"weight is torch.int8 \[21, 191\], but its rows are of int8 or uint8"
    ):
        ops.interleave_rows(rows[:, 1:])
    with pytest.raises(ValueError, match=r"weight is torch\.int32"):
        ops.interleave_rows(rows.int())
    with pytest.raises(ValueError, match="out has shape"):
        ops.interleave_rows(rows, out=out[:3])
    with pytest.raises(ValueError, match="weight must be contiguous"):
        ops.interleave_rows(rows[:, :64])
    with pytest.raises(ValueError, match="interleaved rows are of int8 or uint8 elements, a multiple of 64"):
        given = operands("int8", 1, 8, 96, torch.float32)
        ops.quantized_linear(**given, interleaved=True)


@pytest.mark.parametrize("weight_type", ["int8", "int4", "e2m1", "e4m3"])
def test_every_code(weight_type):
    """x picks one element of each row, so that the result is the weight itself."""
    codes = torch.arange(256).to(torch.uint8)
    if weight_type in ("int4", "e2m1"):
        weight = codes.view(2, 128)  # all pairs of codes
    else:
        weight = codes.view(torch.int8 if weight_type == "int8" else torch.float8_e4m3fn).view(1, 256)
    for row in weight:
        x = torch.eye(256)
        y = ops.quantized_linear(x, row[None], torch.ones(1, 1), weight_type=weight_type)
        exact = reference.dequantize_weight(row[None], torch.ones(1, 1), weight_type)
        # A row of x that meets NaN anywhere is NaN: 0 x NaN.
        expected = torch.where(exact.isnan().any(), torch.nan, exact.t()).float()
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_operands(scheme):
    given = operands(scheme, 5, 40, 256, torch.bfloat16)
    wide_x = torch.randn(5, 512).bfloat16()
    wide_out = poisoned(5, 64, dtype=torch.bfloat16, device="cpu")
    given["x"] = wide_x[:, 64:320]
    ops.quantized_linear(**given, out=wide_out[:, 8:48])
    given["x"] = given["x"].contiguous()
    assert torch.equal(wide_out[:, 8:48], ops.quantized_linear(**given))
    assert wide_out[:, :8].isnan().all() and wide_out[:, 48:].isnan().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outliers_zeros_and_nan_stay_in_their_token(scheme):
    for dtype in DTYPES:
        given = operands(scheme, 8, 24, 384, dtype)
        x = given["x"]
        x[1] *= 1e-3
        x[2, 200] = 3000.0
        x[3] = 0
        x[4, 7], x[5, 380], x[6, 129] = float("nan"), float("inf"), -float("inf")
        result = ops.quantized_linear(**given)
        sound = [0, 1, 2, 3, 7]
        assert not torch.isfinite(result[4:7]).any()
        given["x"] = x[sound]
        exact = reference.quantized_linear(**given)
        plain = reference.quantized_linear(**given, dtype=dtype)
        for row in range(len(sound)):
            assert_as_good_as_torch(result[sound][row : row + 1], plain[row : row + 1], exact[row : row + 1])
        given["bias"] = None
        assert (ops.quantized_linear(**given)[3] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_largest_in_size(scheme):
    given = operands(scheme, 2, 5, 1 << (16 if scheme == "int8-zeros" else 17), torch.float32)
    if SCHEMES[scheme][0] == "int8":  # the largest sum of products there can be, in int32
        given["weight"].fill_(-128)
        given["x"].fill_(1.0)
    result = ops.quantized_linear(**given)
    exact = reference.quantized_linear(**given)
    assert_as_good_as_torch(result, reference.quantized_linear(**given, dtype=torch.float32), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(scheme):
    given = operands(scheme, 3, 24, 256, torch.bfloat16)
    out = torch.empty(3, 24, dtype=torch.bfloat16)
    codes = (
        ops.quantized_gemm.WEIGHT_TYPES[given["weight_type"]],
        *given["block"],
        ops.quantized_gemm.ACTIVATIONS[given["activation"]],
        False,
    )
    sums = ops.row_sums(given["weight"]) if given["activation"] == "int8-zeros" else None
    tensors = (
        given["x"],
        given["weight"],
        given["scales"],
        given.get("zeros"),
        given.get("global_scale"),
        sums,
    )
    torch.library.opcheck(
        torch.ops.fastkernels.quantized_linear.default,
        (*tensors, given["bias"], *codes, out),
        test_utils=OPCHECKS
        if any(t is not None and t.dtype == torch.float8_e4m3fn for t in tensors)
        else ALL,
    )
    x = given.pop("x")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda a: ops.quantized_linear(a, **given) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.quantized_linear(x, **given) + 1)


def test_refuses_what_it_does_not_take():
    given = operands("int4-g128", 3, 24, 256, torch.bfloat16)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops.quantized_linear(**{**given, **changes})

    refused("weight_type is 'int3', but the op takes int8, int4, e2m1, e4m3", weight_type="int3")
    refused("activation is 'int8', but with int4 weights the op takes None, 'e4m3'", activation="int8")
    refused("x is float64, but the op takes bf16, fp16, fp32", x=given["x"].double())
    refused(r"x has shape \[256\], but the op takes \[num_tokens, in_size\]", x=given["x"][0])
    refused("in_size is 255; with 4 bits it must be even", x=given["x"][:, :255])
    refused("in_size is 0, but the op takes 1 to 131072", x=given["x"][:, :0])
    refused("weight is int8, but the op takes uint8", weight=given["weight"].to(torch.int8))
    refused(
        r"weight has shape \[24, 120\], but the op takes \[out_size, 128\]", weight=given["weight"][:, :120]
    )
    refused(
        r"scales has shape \[24, 1\], but the op takes \[24, 2\] for blocks of 1 x 128",
        scales=torch.ones(24, 1),
    )
    refused("scales is int32, but the op takes fp32, fp16", scales=torch.ones(24, 2, dtype=torch.int32))
    refused(r"block is \(1, 48\), but int4 weights take 1 row and 16, 32, 64, a multiple", block=(1, 48))
    refused(r"block is \(2, 128\), but int4 weights take 1 row", block=(2, 128))
    refused("block is .*, but its sizes are positive", block=(0, 128))
    refused(
        "in_size is 192, which blocks of 128 do not divide",
        x=given["x"][:, :192],
        weight=given["weight"][:, :96],
    )
    refused(r"zeros has shape \[24, 1\]", zeros=torch.zeros(24, 1, dtype=torch.uint8))
    refused("zeros is fp32, but the op takes uint8", zeros=torch.zeros(24, 2))
    refused(r"global_scale has shape \[2\], but the op takes \[1\]", global_scale=torch.ones(2))
    refused(r"bias has shape \[23\], but the op takes \[out_size\]", bias=given["bias"][:23])
    refused("bias is fp32, but the op takes bf16", bias=given["bias"].float())
    refused(r"out has shape \[3, 23\]", out=torch.empty(3, 23, dtype=torch.bfloat16))
    refused("out is fp32, but the op takes bf16", out=torch.empty(3, 24))
    refused("weight must be contiguous", weight=torch.zeros(128, 24, dtype=torch.uint8).t())
    refused("the last dimension of x must be contiguous", x=torch.zeros(256, 3, dtype=torch.bfloat16).t())
    refused("scales is on meta", scales=torch.ones(24, 2, device="meta"))
    int8 = operands("int8", 3, 24, 256, torch.bfloat16)
    with pytest.raises(ValueError, match="zeros are given, but int8 weights have none"):
        ops.quantized_linear(**int8, zeros=torch.zeros(24, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"block is \(1, 128\), but int8 weights have a scale a row"):
        ops.quantized_linear(**{**int8, "block": (1, 128)})
    with pytest.raises(ValueError, match="weight_sums are given, but they go with activation 'int8-zeros'"):
        ops.quantized_linear(**int8, weight_sums=ops.row_sums(int8["weight"]))
    zeros = operands("int8-zeros", 3, 24, 256, torch.bfloat16)
    with pytest.raises(ValueError, match="weight_sums is fp32, but the op takes int32"):
        ops.quantized_linear(**zeros, weight_sums=torch.ones(24))
    with pytest.raises(ValueError, match=r"weight_sums has shape \[23\], but the op takes \[out_size\]"):
        ops.quantized_linear(**zeros, weight_sums=ops.row_sums(zeros["weight"])[1:])
    with pytest.raises(ValueError, match="with activation 'int8-zeros' interleaved rows take weight_sums"):
        ops.quantized_linear(**zeros, interleaved=True)
    with pytest.raises(
        ValueError, match="in_size is 65552, but with activation 'int8-zeros' the op takes up"
    ):
        ops.quantized_linear(**operands("int8-zeros", 1, 2, 65552, torch.bfloat16))
    with pytest.raises(ValueError, match="activation is 'e5m2', but with int8 weights the op takes"):
        ops.quantized_linear(**{**int8, "activation": "e5m2"})
    with pytest.raises(ValueError, match="in_size is 131073, but the op takes 1 to 131072"):
        ops.quantized_linear(torch.zeros(1, 131073), int8["weight"], int8["scales"], weight_type="int8")


BEST = fastkernels._C.cpu_isa()
ISAS = ("baseline", "avx2", "avx512", "avx512vnni")


@pytest.mark.skipif("FASTKERNELS_CPU_ISA" in os.environ, reason="the instruction set is given")
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(BEST)])
def test_lower_instruction_sets(isa):
    """The tests above, in a process of their own: the set is chosen once."""
    assert _run_with(isa, "-c", "import fastkernels; print(fastkernels._C.cpu_isa())").strip() == isa
    chosen = "matches_reference or interleaved or depend or every_code or strided or outliers or largest"
    _run_with(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen)


def _run_with(isa: str, *arguments: str) -> str:
    environment = {**os.environ, "FASTKERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
