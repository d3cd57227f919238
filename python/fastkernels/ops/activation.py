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

register_mutating_fake("silu_mul", "gelu_mul")


def _check(op: str, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """out checked against x, or a new one."""
    check_dtype(op, "x", x, FLOAT_DTYPES)
    require(
        x.dim() == 2 and x.shape[-1] % 2 == 0,
        f"{op}: x has shape {list(x.shape)}, but the op takes [num_tokens, 2 * size]",
    )
    shape = (x.shape[0], x.shape[1] // 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else as_tensor(out)
    check_dtype(op, "out", out, (x.dtype,))
    check_shape(op, "out", out, shape, "[num_tokens, size], half the width of x")
    check_device(op, x=x, out=out)
    check_last_contiguous(op, x=x, out=out)
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
