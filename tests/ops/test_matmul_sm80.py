"""matmul's kernel for any GPU, every tile, by quantized_linear. Hopper takes it only when asked to."""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops.gemm import (
    FIRST_FEW_TACTIC,
    FIRST_SM80_TACTIC,
    LINEAR_TACTIC,
    matmul,
    matmul_workspace,
)
from fastkernels.ops.quantized_gemm import round_to
from tests.conftest import CUDA_REASON
from tests.ops.matmul_cases import (
    SCHEMES,
    check_quantized,
    exact_quantized,
    operands,
    quantized_operands,
)
from tests.tolerances import assert_similar, poisoned

pytestmark = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))

IS_HOPPER = CUDA_REASON is None and torch.cuda.get_device_capability() == (9, 0)
TACTICS = [*range(FIRST_SM80_TACTIC, FIRST_FEW_TACTIC), *(() if IS_HOPPER else (-1, LINEAR_TACTIC))]
TOKENS = [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000]
SIZES = [
    (8, 16),
    (72, 64),
    (136, 1040),
    (1000, 528),
]  # out_size, in_size; tiles are 64 and 128, chunks of K 128
MOST_STREAMED = 8  # tokens


@pytest.fixture(scope="module")
def workspace():
    return matmul_workspace(torch.device("cuda"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tactic", TACTICS)
def test_matches_reference(tactic, scheme, workspace):
    for index, (out_size, in_size) in enumerate(SIZES):
        for num_tokens in TOKENS[index % 2 :: 2]:
            if tactic == LINEAR_TACTIC and num_tokens > MOST_STREAMED:
                continue
            check_quantized(
                *(scheme, num_tokens, out_size, in_size),
                torch.bfloat16 if index < 2 else torch.float16,
                tactic=tactic,
                workspace=workspace,
            )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tactic", TACTICS)
def test_long_rows(tactic, scheme, workspace):
    """K = 16k: what sums of 14 bits would cost, shows."""
    given = quantized_operands(scheme, 8, 264, 16384, torch.float16)
    out = ops.quantized_linear(**given, tactic=tactic, workspace=workspace)
    assert_similar(out, exact_quantized(given), 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tactic", TACTICS)
def test_strides_and_rows_that_end_within_16_bytes(tactic, scheme, workspace):
    given = quantized_operands(scheme, 8, 203, 256, torch.bfloat16)
    wide_out = poisoned(8, 256, dtype=torch.bfloat16, device="cuda")
    wide_x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    given["x"] = wide_x[:, 64:320]
    exact = exact_quantized(given)
    ops.quantized_linear(**given, tactic=tactic, workspace=workspace, out=wide_out[:, 16:219])
    assert_similar(wide_out[:, 16:219], exact, 1e-5)
    assert wide_out[:, :16].isnan().all() and wide_out[:, 219:].isnan().all()


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block", "fp8-e5m2"])
@pytest.mark.parametrize("tactic", TACTICS)
def test_nan_stays_in_its_token_and_row(tactic, scheme, workspace):
    num_tokens = 8 if tactic == LINEAR_TACTIC else 129
    given = quantized_operands(scheme, num_tokens, 264, 256, torch.bfloat16)
    clean = ops.quantized_linear(**given, tactic=tactic, workspace=workspace)
    token, row = num_tokens - 2, 130
    given["x"][token, 3] = torch.nan
    for code in (0x7F, 0xFF):
        given["weight"].view(torch.uint8)[row, 5:201:7] = code
        out = ops.quantized_linear(**given, tactic=tactic, workspace=workspace)
        assert out[token].isnan().all() and out[:, row].isnan().all()
        keep = torch.ones(num_tokens, 264, dtype=torch.bool, device="cuda")
        keep[token], keep[:, row] = False, False
        assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("weight_type", ["e4m3", "int8"])
def test_every_code(weight_type, tactic, workspace):
    """x picks one element of a row, so that the result is the weight itself."""
    codes = torch.arange(256, device="cuda").to(torch.uint8)
    if weight_type == "e4m3":
        codes[codes & 127 == 127] = 0
    weight = codes.view(torch.int8 if weight_type == "int8" else torch.float8_e4m3fn).repeat(8, 1)
    x = torch.eye(256, device="cuda", dtype=torch.float16)[:: 32 if tactic == LINEAR_TACTIC else 1]
    expected = weight.float()[:, :: 32 if tactic == LINEAR_TACTIC else 1].t()
    for activation in ("int8", "int8-zeros") if weight_type == "int8" else ("e4m3", "e5m2"):
        y = ops.quantized_linear(
            *(x, weight, torch.ones(8, 1, device="cuda")),
            weight_type=weight_type,
            activation=activation,
            tactic=tactic,
            workspace=workspace,
        )
        torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tactic", TACTICS)
def test_in_a_graph_behind_the_kernel_that_writes_x(tactic, workspace):
    given = quantized_operands("fp8", 8, 256, 256, torch.bfloat16)
    x = given.pop("x")
    expected = ops.quantized_linear(x, **given, tactic=tactic, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.quantized_linear(x, **given, constant_weight=True, tactic=tactic, workspace=workspace)
    for _ in range(10):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("tactic", [tactic for tactic in TACTICS if tactic != LINEAR_TACTIC])
def test_more_than_2_31_elements(tactic, workspace):
    num_tokens, out_size = 80_000, 27_136
    given = quantized_operands("fp8", num_tokens, out_size, 64, torch.bfloat16)
    given["bias"] = None
    out = poisoned(num_tokens, out_size, dtype=torch.bfloat16, device="cuda")
    ops.quantized_linear(**given, tactic=tactic, workspace=workspace, out=out)
    x, scales = (part.double() for part in round_to(given["x"], "e4m3"))
    weight = given["weight"].double() * given["scales"].double()
    for rows in (slice(0, 200), slice(79_134, 79_150), slice(num_tokens - 200, num_tokens)):
        assert_similar(out[rows], (x[rows] * scales[rows, None]) @ weight.t(), 1e-5)
    assert torch.isfinite(out[::997]).all()


def test_nothing_to_do(workspace):
    given = quantized_operands("fp8", 5, 64, 64, torch.bfloat16)
    none = {**given, "x": given["x"][:0]}
    assert ops.quantized_linear(**none, tactic=FIRST_SM80_TACTIC, workspace=workspace).shape == (0, 64)


def test_refuses(workspace):
    x, weight, _ = operands(40, 64, 64, torch.bfloat16)
    with pytest.raises(Exception, match="bf16 and fp16 have tiles for Hopper GPUs alone"):
        ops.linear(x, weight, tactic=FIRST_SM80_TACTIC, workspace=workspace)
    given = quantized_operands("int8", 3, 64, 64, torch.bfloat16)
    bytes_, scales = round_to(given["x"], "int8")
    rest = (given["weight"], scales, given["scales"].view(-1), None, False)
    out = torch.empty(3, 64, device="cuda", dtype=torch.bfloat16)
    short = (bytes_[:, :40], given["weight"][:, :40], *rest[1:])
    with pytest.raises(Exception, match="in_size is 40; with this tactic it must be a multiple of 16"):
        matmul("matmul", *short, FIRST_SM80_TACTIC, workspace, out)
    zeros, sums = torch.zeros(3, device="cuda", dtype=torch.int32), ops.row_sums(given["weight"])
    with pytest.raises(Exception, match="x_zeros are for int8, and go with weight_sums"):
        matmul("matmul", bytes_, *rest, -1, workspace, out, x_zeros=zeros)
    with pytest.raises(Exception, match=r"x_zeros must be contiguous int32 \[num_tokens\]"):
        matmul("matmul", bytes_, *rest, -1, workspace, out, x_zeros=zeros[1:], weight_sums=sums)
    with pytest.raises(Exception, match=r"weight_sums must be contiguous int32, one a row of weight"):
        matmul("matmul", bytes_, *rest, -1, workspace, out, x_zeros=zeros, weight_sums=sums[1:])
    if not IS_HOPPER:
        with pytest.raises(Exception, match="tactics 0 to 15, and bf16 and fp16, are for Hopper GPUs"):
            ops.quantized_linear(**given, tactic=0, workspace=workspace)
