"""One token's product with a weight of 4 or 8 bits and what stands about it in a decode step. CUDA only."""

from functools import cache
from typing import Any

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.conftest import CUDA_REASON
from tests.ops.test_weight_only import DTYPES, FORMATS, moved, operands, repack, takes
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

pytestmark = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))

EPS = 1e-5
# out_size, in_size: fewer chunks of 128 than warps, more, with tails (of schemes with a scale a row), more
# tiles of 16 rows than SMs, and so many chunks that two blocks share them
SIZES = [(1, 128), (17, 256), (129, 2304), (50, 1160), (4100, 512), (24, 12544)]
GATED = [(16, 128), (48, 2304), (16, 1160), (2160, 512), (32, 12544)]  # of the result


def tactics() -> tuple[int, ...]:
    return (0, 1, 2) if torch.cuda.get_device_capability() >= (9, 0) else (0, 1)


@cache
def prepared(
    name: str, rows: int, in_size: int, dtype: torch.dtype
) -> tuple[dict[str, Any], ops.RepackedWeight, torch.Tensor]:
    """Operands, the weight, and what it stands for in float64, on the GPU."""
    given = moved(operands(FORMATS[name], 1, rows, in_size, dtype))
    full = {key: value for key, value in given.items() if key not in ("x", "bias", "activation")}
    return given, repack(given), reference.dequantize_weight(**full).double()


def of_format(name: str, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [size for size in sizes if takes(name, size[1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_as_it_is(name, dtype):
    for out_size, in_size in of_format(name, SIZES):
        given, weight, _ = prepared(name, out_size, in_size, dtype)
        for tactic in tactics():
            out = poisoned(1, out_size, dtype=dtype, device="cuda")
            how = {"bias": given["bias"], "tactic": tactic}
            assert ops.token_weight_only_linear(given["x"], weight, **how, out=out) is out
            assert torch.equal(out, ops.weight_only_linear(given["x"], weight, **how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_that_is_normalised(name, dtype):
    for out_size, in_size in of_format(name, SIZES):
        given, weight, full = prepared(name, out_size, in_size, dtype)
        x, bias = given["x"] * 5, given["bias"] if out_size % 2 else None
        norm = torch.randn(in_size, device="cuda", dtype=dtype)
        row = reference.rms_norm(x.double(), norm.double(), EPS)
        exact = row @ full.t() + (0.0 if bias is None else bias.double())
        plain = row.to(dtype).double() @ full.t() + (0.0 if bias is None else bias.double())
        for tactic in tactics():
            how = {"bias": bias, "norm_weight": norm, "eps": EPS, "tactic": tactic}
            out = poisoned(1, out_size, dtype=dtype, device="cuda")
            ops.token_weight_only_linear(x, weight, **how, out=out)
            assert_as_good_as_torch(out, plain.to(dtype), exact)
            if out_size >= 1000:  # of a few results the rounding of each shows
                assert_similar(out, exact, 1e-5)
            again = poisoned(1, out_size, dtype=dtype, device="cuda")
            ops.token_weight_only_linear(x, weight, **how, constant_weight=True, out=again)
            assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_adds(name, dtype, normed):
    for out_size, in_size in of_format(name, SIZES):
        given, weight, _ = prepared(name, out_size, in_size, dtype)
        how: dict[str, Any] = {"bias": given["bias"]}
        if normed:
            how["norm_weight"] = torch.randn(in_size, device="cuda", dtype=dtype)
        before = torch.randn(1, out_size, device="cuda", dtype=dtype) * 3
        for tactic in tactics():
            how["tactic"] = tactic
            product = ops.token_weight_only_linear(given["x"], weight, **how, out=torch.empty_like(before))
            added = ops.token_weight_only_linear(given["x"], weight, **how, adds=True, out=before.clone())
            assert torch.equal(added, before + product)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_gate(name, dtype, normed):
    for out_size, in_size in of_format(name, GATED):
        given, weight, full = prepared(name, 2 * out_size, in_size, dtype)
        row, norm = given["x"].double(), None
        if normed:
            norm = torch.randn(in_size, device="cuda", dtype=dtype)
            row = reference.rms_norm(row, norm.double(), EPS)
        for bias in (None, given["bias"]):
            products = row.to(dtype).double() @ full.t() + (0.0 if bias is None else bias.double())
            gate, up = (row @ full.t() + (0.0 if bias is None else bias.double())).chunk(2, 1)
            exact = torch.nn.functional.silu(gate) * up
            gate, up = products.to(dtype).double().chunk(2, 1)
            plain = (torch.nn.functional.silu(gate) * up).to(dtype)
            for tactic in tactics():
                out = poisoned(1, out_size, dtype=dtype, device="cuda")
                how = {"bias": bias, "norm_weight": norm, "eps": EPS, "tactic": tactic, "gated": True}
                ops.token_weight_only_linear(given["x"], weight, **how, out=out)
                assert_as_good_as_torch(out, plain, exact)
                if out_size >= 1000:
                    assert_similar(out, exact, 1e-5)


def test_what_lies_beside_out_stays():
    given, weight, _ = prepared("int4-g128", 100, 256, torch.bfloat16)
    wide = poisoned(1, 128, dtype=torch.bfloat16, device="cuda")
    ops.token_weight_only_linear(
        given["x"], weight, norm_weight=torch.ones_like(given["x"][0]), out=wide[:, 8:108]
    )
    assert wide[:, :8].isnan().all() and wide[:, 108:].isnan().all() and wide[:, 8:108].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4-g128", "nvfp4"])
def test_zeros_large_numbers_and_nan(name, dtype):
    given, weight, full = prepared(name, 32, 256, dtype)
    x, norm = torch.zeros_like(given["x"]), torch.full((256,), 30.0, device="cuda", dtype=dtype)
    how = {"bias": given["bias"], "norm_weight": norm}
    out = poisoned(1, 32, dtype=dtype, device="cuda")
    assert torch.equal(ops.token_weight_only_linear(x, weight, **how, out=out), given["bias"][None])
    x[0, 5:9] = 60000.0  # times the norm's weight more than fp16 holds
    row = reference.rms_norm(x.double(), norm.double(), 1e-6)
    exact = row @ full.t() + given["bias"].double()
    ops.token_weight_only_linear(x, weight, **how, out=out)
    assert_as_good_as_torch(out, exact.to(dtype), exact)
    x[0, 7] = float("nan")
    assert ops.token_weight_only_linear(x, weight, **how, out=out).isnan().all()


def test_behind_other_kernels_of_a_graph():
    """A layer's four products, which read what the one before them writes, as dependent launches."""
    sizes = {"qkv": (1024, 1024), "o": (1024, 1024), "gate_up": (4096, 1024), "down": (1024, 2048)}
    weights = {key: prepared("int4-g128", *size, torch.bfloat16)[1] for key, size in sizes.items()}
    norm = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    between, wide = torch.empty_like(residual), torch.empty(1, 2048, device="cuda", dtype=torch.bfloat16)

    def run():
        run_one = ops.token_weight_only_linear
        for _ in range(4):
            run_one(residual, weights["qkv"], norm_weight=norm, constant_weight=True, out=between)
            run_one(between, weights["o"], adds=True, constant_weight=True, out=residual)
            run_one(
                residual, weights["gate_up"], norm_weight=norm, gated=True, constant_weight=True, out=wide
            )
            run_one(wide, weights["down"], adds=True, constant_weight=True, out=residual)

    start = residual.clone()
    run()
    expected = residual.clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, expected)


def test_opcheck_and_compile():
    given, weight, _ = prepared("int4-g128", 64, 128, torch.bfloat16)
    x, norm = given["x"], torch.randn(128, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(1, 32, device="cuda", dtype=torch.bfloat16)
    arguments = (x, norm, EPS, weight.packed, weight.row_factors, None, 0, 0, False, False, True, out)
    torch.library.opcheck(torch.ops.fastkernels.token_weight_only_linear.default, arguments)

    def call(x):
        how = {"norm_weight": norm, "gated": True, "out": torch.empty_like(out)}
        return ops.token_weight_only_linear(x, weight, **how) + 1

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_refuses_what_it_does_not_take():
    given, weight, _ = prepared("int4-g128", 48, 128, torch.bfloat16)
    x, out = given["x"], torch.empty(1, 48, device="cuda", dtype=torch.bfloat16)
    parts = {name: given[name] for name in ("weight", "scales", "weight_type", "block")}
    e4m3 = ops.repack_for_cuda(**parts, activation="e4m3")
    for arguments, message in (
        ({"x": x.expand(2, -1)}, r"x has shape \[2, 128\], but the op takes \[1, 128\]"),
        ({"x": x.float()}, "x is fp32, but the op takes"),
        ({"weight": e4m3}, "the weight is for x in e4m3, or of another order along K"),
        ({"gated": True}, "weight has 48 rows; of a gate and up it takes a multiple of 32"),
        ({"out": out[:, :16]}, r"out has shape \[1, 16\], but the op takes \[1, out_size\]"),
        ({"out": out.half()}, "out is fp16, but the op takes bf16"),
        ({"norm_weight": x[0, :64]}, r"norm_weight has shape \[64\], but the op takes \[128\]"),
        ({"norm_weight": x[0].half()}, "norm_weight is fp16, but the op takes bf16"),
        ({"bias": out[0, :16]}, r"bias has shape \[16\], but the op takes \[48\]"),
        ({"x": x.cpu()}, "is on c"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.token_weight_only_linear(**{"x": x, "weight": weight, "out": out, **arguments})
    with pytest.raises((ValueError, RuntimeError), match="takes one token, x as it is, and tactics up to 2"):
        ops.token_weight_only_linear(x, weight, out=out, tactic=3)
