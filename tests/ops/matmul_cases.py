"""Operands of matmul's kernels, and what their products are exactly."""

from functools import cache
from typing import NamedTuple

import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.gemm import matmul
from fastkernels.ops.quantized_gemm import round_to
from tests.tolerances import assert_as_good_as_torch, assert_rounded, assert_similar, poisoned

# scheme -> weight_type, rows of a block (0: all), its size (0: all), activation
SCHEMES = {
    "fp8": ("e4m3", 1, 0, "e4m3"),
    "fp8-one-scale": ("e4m3", 0, 0, "e4m3"),
    "fp8-block": ("e4m3", 128, 128, "e4m3-block"),
    "fp8-e5m2": ("e4m3", 1, 0, "e5m2"),
    "int8": ("int8", 1, 0, "int8"),
    "int8-zeros": ("int8", 1, 0, "int8-zeros"),
}

# Tactics of Hopper's tiles
FAST_FP8 = (0, 1, 2, 3)  # tiles of 256 columns: sums of e4m3 with about 14 bits
NOT_BY_BLOCKS = (0, 1, 2, 3, 14, 15)
ONLY_FP8 = (4, 5)  # tiles of 192 columns
NOT_OF_E5M2 = (0, 1, 2, 3, 6, 7, 14, 15)
NO_TILE = {"fp8-block": NOT_BY_BLOCKS, "fp8-e5m2": NOT_OF_E5M2, "int8": ONLY_FP8, "int8-zeros": ONLY_FP8}


def operands(num_tokens, out_size, in_size, dtype):
    x = torch.randn(num_tokens, in_size, device="cuda", dtype=dtype)
    weight = torch.randn(out_size, in_size, device="cuda", dtype=dtype) * in_size**-0.5
    return x, weight, torch.randn(out_size, device="cuda", dtype=dtype)


def quantized_operands(scheme, num_tokens, out_size, in_size, dtype):
    weight_type, rows, size, activation = SCHEMES[scheme]
    rows, size = rows or out_size, size or in_size
    if weight_type == "int8":
        weight, spread = torch.randint(-128, 128, (out_size, in_size), device="cuda").to(torch.int8), 74.0
    else:
        weight, spread = torch.randn(out_size, in_size, device="cuda").mul(20).to(torch.float8_e4m3fn), 20.0
    scales = torch.rand(-(-out_size // rows), -(-in_size // size), device="cuda").add(0.5) / (
        spread * in_size**0.5
    )
    x = torch.randn(num_tokens, in_size, device="cuda", dtype=dtype)
    return {
        "x": x.exp() if activation == "int8-zeros" else x,  # zero points pay where 0 is not in the middle
        "weight": weight,
        "scales": scales,
        "bias": torch.randn(out_size, device="cuda", dtype=dtype),
        "weight_type": weight_type,
        "block": (rows, size),
        "activation": activation,
    }


def exact_quantized(given, dtype=torch.float64):
    """In float64 (or dtype) from the bytes that the product is of, which are those of the CPU."""
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    return reference.quantized_linear(**on_cpu, dtype=dtype).cuda()


def check_quantized(scheme, num_tokens, out_size, in_size, dtype, *, tactic, workspace, is_exact=True):
    """quantized_linear by a tactic, with and without bias by the number of tokens; blocks want whole ones.

    is_exact: sums are of fp32; without, of about 14 bits
    """
    in_size = -(-in_size // 128) * 128 if scheme == "fp8-block" else in_size
    given = quantized_operands(scheme, num_tokens, out_size, in_size, dtype)
    if num_tokens % 4 > 1:
        given["bias"] = None
    out = poisoned(num_tokens, out_size, dtype=dtype, device="cuda")
    assert ops.quantized_linear(**given, tactic=tactic, workspace=workspace, out=out) is out
    exact = exact_quantized(given)
    if is_exact:
        assert_as_good_as_torch(out, exact_quantized(given, dtype), exact)
    assert torch.isfinite(out).all()
    assert_similar(out, exact, 1e-5 if is_exact else 1e-3)
    again = ops.quantized_linear(**given, constant_weight=True, tactic=tactic, workspace=workspace)
    assert torch.equal(out, again), "two runs differ"


# --- what is done to a product before it is rounded -------------------------------------------------------


class Epilogue(NamedTuple):
    """residual: None, "own" memory, or "in place" over out; byte: of out, by an out_scale"""

    residual: str | None = None
    gated: bool = False
    byte: torch.dtype | None = None
    has_bias: bool = False


EPILOGUES = (
    Epilogue("own"),
    Epilogue("in place"),
    Epilogue("in place", has_bias=True),
    Epilogue(byte=torch.float8_e4m3fn),
    Epilogue("own", byte=torch.float8_e4m3fn, has_bias=True),
    Epilogue("own", byte=torch.int8, has_bias=True),
    Epilogue(byte=torch.int8, has_bias=True),
    Epilogue(gated=True),
    Epilogue(gated=True, byte=torch.float8_e4m3fn),
    Epilogue(gated=True, byte=torch.int8),
)
LARGEST = {torch.float8_e4m3fn: 448, torch.int8: 127}


class Problem(NamedTuple):
    """A product of many tokens, the first of which are one too. exact: in float64, with its gate."""

    x: torch.Tensor
    x_scales: torch.Tensor | None
    x_zeros: torch.Tensor | None
    weight: torch.Tensor
    weight_scales: torch.Tensor | None
    weight_sums: torch.Tensor | None
    bias: torch.Tensor
    residual: torch.Tensor
    exact: torch.Tensor


@cache
def problem(scheme: str, num_tokens: int, out_size: int, in_size: int, gated: bool) -> Problem:
    """scheme: one of SCHEMES, or "bf16" or "fp16". bias and residual are bf16 values that fp16 has too."""
    rows = out_size * (2 if gated else 1)
    x_scales = x_zeros = weight_scales = weight_sums = None
    if scheme in SCHEMES:
        in_size = -(-in_size // 128) * 128 if scheme == "fp8-block" else in_size
        given = quantized_operands(scheme, num_tokens, rows, in_size, torch.bfloat16)
        activation, weight, weight_scales = (given[name] for name in ("activation", "weight", "scales"))
        x, x_scales, *zeros = round_to(given["x"], activation)
        values = x.double()
        if zeros:
            x_zeros, weight_sums = zeros[0], ops.row_sums(weight)
            values -= x_zeros[:, None]
        values *= x_scales.repeat_interleave(128, 1) if x_scales.dim() == 2 else x_scales[:, None]
        full = reference.dequantize_weight(weight, weight_scales, given["weight_type"], given["block"])
        weight_scales = weight_scales if scheme == "fp8-block" else weight_scales.view(-1)
    else:
        x, weight, _ = operands(num_tokens, rows, in_size, DTYPE_OF[scheme])
        values, full = x.double(), weight.double()
    exact = reference.linear(values, full)
    exact = reference.silu_mul(exact) if gated else exact
    bias = torch.randn(out_size, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(num_tokens, out_size + 24, device="cuda", dtype=torch.bfloat16)
    return Problem(
        x, x_scales, x_zeros, weight, weight_scales, weight_sums, bias, residual[:, 8 : 8 + out_size], exact
    )


DTYPE_OF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def first(x: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    return None if x is None else x[:num_tokens]


def check_epilogue(
    given: Problem,
    epilogue: Epilogue,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    tactic: int,
    workspace: torch.Tensor,
    is_exact: bool = True,
) -> None:
    """Of the first tokens, into a part of a wider out, of which the rest stays as it is.

    dtype: of bias and residual, and of out where that is no bytes
    """
    out_size = given.exact.shape[1]
    out_dtype = epilogue.byte or dtype
    bias = given.bias.to(dtype) if epilogue.has_bias else None
    residual = given.residual[:num_tokens] if epilogue.residual else None
    if residual is not None and dtype != residual.dtype:
        wide = torch.empty(num_tokens, out_size + 24, device="cuda", dtype=dtype)
        residual = wide[:, 8 : 8 + out_size].copy_(residual)
    exact = given.exact[:num_tokens]
    for added in (bias, residual):
        exact = exact if added is None else exact + added.double()
    out_scale = None
    if epilogue.byte is not None:  # the largest values are cut off
        out_scale = (exact.abs().max() * 0.8 / LARGEST[epilogue.byte]).float().view(1)

    def run(out: torch.Tensor, residual: torch.Tensor | None, constant_weight: bool) -> None:
        matmul(
            *("matmul", given.x[:num_tokens], given.weight, first(given.x_scales, num_tokens)),
            *(given.weight_scales, bias, constant_weight, tactic, workspace, out),
            x_zeros=first(given.x_zeros, num_tokens),
            weight_sums=given.weight_sums,
            residual=residual,
            out_scale=out_scale,
            gated=epilogue.gated,
        )

    integer, poison = (torch.uint8, 0x7F) if epilogue.byte else (torch.int16, 0x7FFF)  # NaN, or in int8 127
    whole = torch.full((num_tokens + 3, out_size + 48), poison, device="cuda", dtype=integer)
    untouched = whole.clone()
    out = whole.view(out_dtype)[:num_tokens, 16 : 16 + out_size]
    if epilogue.residual == "in place":
        run(out, out.copy_(residual), False)
    else:
        run(out, residual, False)
    again = torch.empty(num_tokens, out_size, device="cuda", dtype=out_dtype)
    run(again, residual, True)
    found = out.clone(memory_format=torch.contiguous_format)
    assert torch.equal(found.view(integer), again.view(integer)), "two runs differ"
    whole[:num_tokens, 16 : 16 + out_size] = untouched[:num_tokens, 16 : 16 + out_size]
    assert torch.equal(whole, untouched), "something beside out was written"
    if out_scale is not None:
        is_fp8 = given.x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)  # 1024 neighbours in 14 bits
        slack = 1e-2 if not is_exact else 3e-3 if is_fp8 else 1e-3
        assert_rounded(found, exact / out_scale.double(), slack)
        return
    assert torch.isfinite(found).all()
    assert_similar(found, exact, 1e-5 if is_exact else 1e-3)
    if is_exact:
        assert_as_good_as_torch(found, exact.to(dtype), exact)
