"""The Hopper kernel of large products: linear with a tactic, and quantized_linear on CUDA, every tactic."""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.gemm import FIRST_FEW_TACTIC, LINEAR_TACTIC, NUM_MATMUL_TACTICS, matmul_workspace
from tests.conftest import CUDA_REASON
from tests.ops.matmul_cases import (
    FAST_FP8,
    NO_TILE,
    ONLY_FP8,
    SCHEMES,
    check_quantized,
    exact_quantized,
    operands,
    quantized_operands,
)
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

pytestmark = [
    pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON)),
    pytest.mark.skipif(
        CUDA_REASON is None and torch.cuda.get_device_capability() != (9, 0),
        reason="the kernel is for Hopper GPUs",
    ),
]

FEW = list(range(FIRST_FEW_TACTIC, NUM_MATMUL_TACTICS))
TACTICS = [*range(-1, LINEAR_TACTIC + 1), *FEW]  # those between: test_matmul_sm80.py
TACTICS_16_BITS = [tactic for tactic in TACTICS if tactic not in (*ONLY_FP8, LINEAR_TACTIC)]
MOST_STREAMED = 8  # tokens
TOKENS = [1, 3, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 256, 300]
SIZES = [  # out_size, in_size; tiles are 32 to 256, chunks of K 64 or 128
    (8, 16),
    (72, 64),
    (136, 1040),
    (1000, 528),
    (4104, 1024),
]


@pytest.fixture(scope="module")
def workspace():
    return matmul_workspace(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tactic", TACTICS_16_BITS)
def test_linear_matches_reference(tactic, dtype, workspace):
    for index, (out_size, in_size) in enumerate(SIZES):
        for num_tokens in TOKENS[index % 2 :: 2]:
            x, weight, bias = operands(num_tokens, out_size, in_size, dtype)
            b = bias if num_tokens % 4 < 2 else None
            out = poisoned(num_tokens, out_size, dtype=dtype, device="cuda")
            assert ops.linear(x, weight, b, tactic=tactic, workspace=workspace, out=out) is out
            exact = reference.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_as_good_as_torch(out, reference.linear(x, weight, b), exact)
            assert_similar(out, exact, 1e-5)
            again = ops.linear(x, weight, b, constant_weight=True, tactic=tactic, workspace=workspace)
            assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("tactic", TACTICS_16_BITS)
def test_every_number_of_tokens(tactic, workspace):
    weight = torch.randn(200, 136, device="cuda", dtype=torch.bfloat16)
    every = torch.randn(300, 136, device="cuda", dtype=torch.bfloat16)
    exact = every.double() @ weight.double().t()
    for num_tokens in (*range(1, 70), *range(125, 133), *range(250, 301, 5)):
        out = poisoned(num_tokens, 200, dtype=torch.bfloat16, device="cuda")
        ops.linear(every[:num_tokens], weight, tactic=tactic, workspace=workspace, out=out)
        assert_similar(out, exact[:num_tokens], 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tactic", TACTICS)
def test_quantized_linear_matches_reference(tactic, scheme, workspace):
    if tactic in NO_TILE.get(scheme, ()):
        given = quantized_operands(scheme, 2, 128, 128, torch.bfloat16)
        with pytest.raises(Exception, match="there is no tile"):
            ops.quantized_linear(**given, tactic=tactic, workspace=workspace)
        return
    for index, (out_size, in_size) in enumerate(SIZES):
        for num_tokens in TOKENS[index % 2 :: 2]:
            if tactic == LINEAR_TACTIC and num_tokens > MOST_STREAMED:
                continue
            check_quantized(
                *(scheme, num_tokens, out_size, in_size),
                torch.bfloat16 if num_tokens % 2 else torch.float16,
                tactic=tactic,
                workspace=workspace,
                is_exact=scheme.startswith("int8") or tactic not in FAST_FP8,
            )


def test_the_tactic_of_few_tokens_says_what_it_takes(workspace):
    for scheme, num_tokens, in_size in (("fp8", 9, 128), ("fp8-block", 9, 128), ("fp8-e5m2", 9, 128)):
        given = quantized_operands(scheme, num_tokens, 128, in_size, torch.bfloat16)
        with pytest.raises(Exception, match="the tactic of few tokens takes"):
            ops.quantized_linear(**given, tactic=LINEAR_TACTIC, workspace=workspace)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tactic", FEW)
def test_few_tokens_of_a_layer(tactic, scheme, workspace):
    """Shares of K of many rounds of the ring, and of none: a cluster has blocks without a chunk."""
    for num_tokens, out_size, in_size in ((16, 4096, 4096), (33, 1160, 14336), (64, 264, 128), (9, 72, 256)):
        given = {"tactic": tactic, "workspace": workspace}
        check_quantized(scheme, num_tokens, out_size, in_size, torch.bfloat16, **given)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_long_rows(scheme, mean, workspace):
    """K = 16k: what sums of 14 bits would cost, shows, most of all where no sum is small."""
    for num_tokens in (2, 64, 300):
        given = quantized_operands(scheme, num_tokens, 520, 16384, torch.float16)
        given["x"] += mean
        if given["weight_type"] == "e4m3":
            given["weight"] = (given["weight"].float() + 10 * mean).to(torch.float8_e4m3fn)
        out = ops.quantized_linear(**given, workspace=workspace)
        exact = exact_quantized(given)
        assert_similar(out, exact, 1e-5)


@pytest.mark.parametrize("tactic", [-1, 1, 6, 9, 13, 15, *FEW])
def test_llama_shapes(tactic, workspace):
    for out_size, in_size in ((6144, 4096), (4096, 14336)):
        for num_tokens in (16, 32, 64, 128, 1000):
            x, weight, bias = operands(num_tokens, out_size, in_size, torch.bfloat16)
            out = poisoned(num_tokens, out_size, dtype=torch.bfloat16, device="cuda")
            ops.linear(x, weight, bias, tactic=tactic, workspace=workspace, out=out)
            exact = reference.linear(x.double(), weight.double(), bias.double())
            assert_as_good_as_torch(out, reference.linear(x, weight, bias), exact)
            for _ in range(3):
                again = ops.linear(x, weight, bias, tactic=tactic, workspace=workspace)
                assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("tactic", TACTICS_16_BITS)
def test_strides(tactic, workspace):
    wide_x = torch.randn(70, 512, device="cuda", dtype=torch.bfloat16)
    wide_weight = torch.randn(200, 384, device="cuda", dtype=torch.bfloat16)
    wide_out = poisoned(70, 256, dtype=torch.bfloat16, device="cuda")
    x, weight, out = wide_x[:, 64:320], wide_weight[:, 8:264], wide_out[:, 16:216]
    ops.linear(x, weight, tactic=tactic, workspace=workspace, out=out)
    plain = ops.linear(x.contiguous(), weight.contiguous(), tactic=tactic, workspace=workspace)
    assert torch.equal(out, plain)
    assert wide_out[:, :16].isnan().all() and wide_out[:, 216:].isnan().all()


@pytest.mark.parametrize("tactic", [-1, *FEW])
def test_rows_of_out_that_end_within_16_bytes(tactic, workspace):
    x, weight, bias = operands(70, 187, 1040, torch.bfloat16)
    wide_out = poisoned(70, 256, dtype=torch.bfloat16, device="cuda")
    out = wide_out[:, 16:203]
    ops.linear(x, weight, bias, tactic=tactic, workspace=workspace, out=out)
    exact = reference.linear(x.double(), weight.double(), bias.double())
    assert_as_good_as_torch(out, reference.linear(x, weight, bias), exact)
    assert wide_out[:, :16].isnan().all() and wide_out[:, 203:].isnan().all()
    with pytest.raises(Exception, match="want a multiple of 8"):
        ops.linear(x, weight, bias, tactic=9, workspace=workspace, out=out)


@pytest.mark.parametrize("tactic", TACTICS_16_BITS)
def test_nan_stays_in_its_token_and_row(tactic, workspace):
    x, weight, _ = operands(129, 264, 200, torch.bfloat16)
    clean = ops.linear(x, weight, tactic=tactic, workspace=workspace)
    x[100, 3], weight[130, 5] = torch.nan, torch.inf
    out = ops.linear(x, weight, tactic=tactic, workspace=workspace)
    assert out[100].isnan().all() and not out[:, 130].isfinite().any()
    keep = torch.ones(129, 264, dtype=torch.bool, device="cuda")
    keep[100], keep[:, 130] = False, False
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("tactic", [-1, 0, 9, 13, *FEW])
def test_in_a_graph_behind_other_kernels(tactic, workspace):
    """Dependent launches: x is written by the kernel before, and the workspace used by all of them."""
    x, weight, _ = operands(64, 1024, 1024, torch.bfloat16)
    weights = [torch.randn_like(weight) * 1024**-0.5 for _ in range(6)]

    def chain():
        y = x
        for w in weights:
            y = ops.linear(y, w, constant_weight=True, tactic=tactic, workspace=workspace)
            y = ops.rms_norm(y, norm)
        return y

    norm = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


def test_more_than_2_31_elements(workspace):
    num_tokens, out_size, in_size = 80_000, 27_136, 64
    x, weight, _ = operands(num_tokens, out_size, in_size, torch.bfloat16)
    out = poisoned(num_tokens, out_size, dtype=torch.bfloat16, device="cuda")
    ops.linear(x, weight, tactic=-1, workspace=workspace, out=out)
    for rows in (slice(0, 200), slice(79_134, 79_150), slice(num_tokens - 200, num_tokens)):
        assert_similar(out[rows], x[rows].double() @ weight.double().t(), 1e-5)
    assert torch.isfinite(out[::997]).all()


def test_nothing_to_do(workspace):
    x, weight, _ = operands(5, 64, 64, torch.bfloat16)
    assert ops.linear(x[:0], weight, tactic=-1, workspace=workspace).shape == (0, 64)
    assert ops.linear(x, weight[:0], tactic=-1, workspace=workspace).shape == (5, 0)


def test_refuses(workspace):
    x, weight, _ = operands(40, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=f"tactic is {NUM_MATMUL_TACTICS}, but the op takes 0 to"):
        ops.linear(x, weight, tactic=NUM_MATMUL_TACTICS, workspace=workspace)
    with pytest.raises(Exception, match="rows must be aligned to 16 bytes"):
        ops.linear(x, weight[:60], tactic=-1, workspace=workspace)
    with pytest.raises(Exception, match="workspace must have"):
        ops.linear(x, weight, tactic=-1, workspace=workspace[:1000])
    given = quantized_operands("fp8", 3, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="on CUDA: scales is bf16, but the op takes fp32"):
        ops.quantized_linear(**{**given, "scales": given["scales"].bfloat16()})
    with pytest.raises(ValueError, match=r"block is \(1, 64\), but with 'e4m3-block' the op takes"):
        ops.quantized_linear(**{**given, "activation": "e4m3-block"})
