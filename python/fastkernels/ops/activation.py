"""Gated activations of a merged gate and up projection."""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    as_tensor,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    register_mutating_fake,
    require,
)
from fastkernels.ops.quant import Per, check_quantized

register_mutating_fake("silu_mul", "gelu_mul", "silu_mul_quant", "gelu_mul_quant")


def _check_x(op: str, x: torch.Tensor) -> tuple[int, int]:
    """The shape of the result."""
    check_dtype(op, "x", x, FLOAT_DTYPES)
    require(
        x.dim() == 2 and x.shape[-1] % 2 == 0,
        f"{op}: x has shape {list(x.shape)}, but the op takes [num_tokens, 2 * size]",
    )
    check_device(op, x=x)
    check_last_contiguous(op, x=x)
    return x.shape[0], x.shape[1] // 2


def _check(op: str, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """out checked against x, or a new one."""
    shape = _check_x(op, x)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else as_tensor(out)
    check_dtype(op, "out", out, (x.dtype,))
    check_shape(op, "out", out, shape, "[num_tokens, size], half the width of x")
    check_device(op, x=x, out=out)
    check_last_contiguous(op, out=out)
    return out


def silu_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """y = silu(gate) * up, with silu(g) = g / (1 + e^-g) and x the gate and up side by side (SwiGLU).

    x:   [num_tokens, 2 * size] bf16 | fp16 | fp32, the gate in the first half of a row; last dimension
         contiguous, any row stride
    out: [num_tokens, size], dtype of x, may be the gate half of x; allocated when None
    Returns out. Computes in fp32 and rounds once; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Shazeer 2020. Kernels: csrc/activation/silu_mul.cu, silu_mul.cpp
    """
    x = as_tensor(x)
    out = _check("silu_mul", x, out)
    torch.ops.fastkernels.silu_mul(x, out)
    return out


def gelu_mul(
    x: torch.Tensor, approximate_tanh: bool = False, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = gelu(gate) * up, with x the gate and up side by side (GEGLU).

    x:   [num_tokens, 2 * size] bf16 | fp16 | fp32, the gate in the first half of a row; last dimension
         contiguous, any row stride
    approximate_tanh: False: gelu(g) = g Phi(g), Phi the standard normal's cumulative distribution.
         True: gelu(g) = g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))
    out: [num_tokens, size], dtype of x, may be the gate half of x; allocated when None
    Returns out. Computes in fp32 and rounds once; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Hendrycks and Gimpel 2016; Shazeer 2020. Kernels: csrc/activation/gelu_mul.cu, gelu_mul.cpp
    """
    x = as_tensor(x)
    out = _check("gelu_mul", x, out)
    torch.ops.fastkernels.gelu_mul(x, approximate_tanh, out)
    return out


def silu_mul_quant(
    x: torch.Tensor,
    *,
    per: Per = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize(silu_mul(x)) in one pass, without rounding between the two.

    x: [num_tokens, 2 * size] bf16 | fp16 | fp32, the gate in the first half of a row; size a multiple of 16,
       last dimension contiguous, any row stride
    per, scales, dtype, out: as ops.quantize takes them
    Returns (out, scales). Computes in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Shazeer 2020. Kernels: csrc/activation/silu_mul.cu, silu_mul.cpp
    """
    x = as_tensor(x)
    shape = _check_x("silu_mul_quant", x)
    kind, out, scales = check_quantized("silu_mul_quant", shape, x.device, per, scales, dtype, out)
    torch.ops.fastkernels.silu_mul_quant(x, kind, out, scales)
    return out, scales


def gelu_mul_quant(
    x: torch.Tensor,
    approximate_tanh: bool = False,
    *,
    per: Per = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize(gelu_mul(x, approximate_tanh)) in one pass, without rounding between the two.

    x: [num_tokens, 2 * size] bf16 | fp16 | fp32, the gate in the first half of a row; size a multiple of 16,
       last dimension contiguous, any row stride
    approximate_tanh: as gelu_mul takes it
    per, scales, dtype, out: as ops.quantize takes them
    Returns (out, scales). Computes in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Hendrycks and Gimpel 2016; Shazeer 2020. Kernels: csrc/activation/gelu_mul.cu, gelu_mul.cpp
    """
    x = as_tensor(x)
    shape = _check_x("gelu_mul_quant", x)
    kind, out, scales = check_quantized("gelu_mul_quant", shape, x.device, per, scales, dtype, out)
    torch.ops.fastkernels.gelu_mul_quant(x, approximate_tanh, kind, out, scales)
    return out, scales
