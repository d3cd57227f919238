"""Normalisations over the last dimension."""

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

register_mutating_fake("rms_norm", "add_rms_norm", "layer_norm", "rms_norm_quant", "add_rms_norm_quant")


def _check_like_x(op: str, x: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor, (x.dtype,))
        check_shape(op, name, tensor, tuple(x.shape), "the shape of x")


def _check_x_and_weights(op: str, x: torch.Tensor, **weights: torch.Tensor | None) -> None:
    require(x.dim() in (2, 3), f"{op}: x has shape {list(x.shape)}, but the op takes 2 or 3 dimensions")
    check_dtype(op, "x", x, FLOAT_DTYPES)
    for name, weight in weights.items():
        if weight is not None:
            check_dtype(op, name, weight, (x.dtype,))
            check_shape(op, name, weight, (x.shape[-1],), "[size], the last dimension of x")
    check_device(op, x=x, **weights)
    check_last_contiguous(op, x=x, **weights)


def _check_out(op: str, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """out checked against x, or a new one."""
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = as_tensor(out)
    _check_like_x(op, x, out=out)
    check_device(op, x=x, out=out)
    check_last_contiguous(op, out=out)
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    x:      [num_tokens, size] or [num_tokens, num_heads, size] bf16 | fp16 | fp32; last dimension contiguous,
            any stride of the others
    weight: [size], dtype of x
    eps:    added to the mean square
    out:    like x, may be x itself; allocated when None
    Returns out. Accumulates in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Zhang and Sennrich 2019. Kernels: csrc/norm/rms_norm.cu, rms_norm.cpp
    """
    x, weight = as_tensor(x), as_tensor(weight)
    _check_x_and_weights("rms_norm", x, weight=weight)
    out = _check_out("rms_norm", x, out)
    torch.ops.fastkernels.rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x, rounded to its dtype; y = rms_norm(residual, weight, eps).

    x:        [num_tokens, size] or [num_tokens, num_heads, size] bf16 | fp16 | fp32; last dimension
              contiguous, any stride of the others
    residual: like x, with strides of its own; changed in place
    weight:   [size], dtype of x
    eps:      added to the mean square
    out:      like x, may be x itself but not the residual; allocated when None
    Returns out. Accumulates in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Zhang and Sennrich 2019. Kernels: csrc/norm/add_rms_norm.cu, add_rms_norm.cpp
    """
    x, residual, weight = as_tensor(x), as_tensor(residual), as_tensor(weight)
    _check_x_and_weights("add_rms_norm", x, weight=weight)
    _check_like_x("add_rms_norm", x, residual=residual)
    check_device("add_rms_norm", x=x, residual=residual)
    check_last_contiguous("add_rms_norm", residual=residual)
    require(
        out is not residual, "add_rms_norm: out is the residual, but the op writes both: it takes two tensors"
    )
    out = _check_out("add_rms_norm", x, out)
    torch.ops.fastkernels.add_rms_norm(x, residual, weight, eps, out)
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension; var divides by size.

    x:      [num_tokens, size] or [num_tokens, num_heads, size] bf16 | fp16 | fp32; last dimension contiguous,
            any stride of the others
    weight: [size], dtype of x
    bias:   like weight, or None for zero
    eps:    added to the variance
    out:    like x, may be x itself; allocated when None
    Returns out. Accumulates in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Ba, Kiros and Hinton 2016. Kernels: csrc/norm/layer_norm.cu, layer_norm.cpp
    """
    x, weight = as_tensor(x), as_tensor(weight)
    bias = None if bias is None else as_tensor(bias)
    _check_x_and_weights("layer_norm", x, weight=weight, bias=bias)
    out = _check_out("layer_norm", x, out)
    torch.ops.fastkernels.layer_norm(x, weight, bias, eps, out)
    return out


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    per: Per = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize(rms_norm(x, weight, eps)) in one pass, without rounding between the two.

    x:      [num_tokens, size] bf16 | fp16 | fp32; size a multiple of 16, last dimension contiguous, any row
            stride
    weight: [size], dtype of x
    eps:    added to the mean square
    per, scales, dtype, out: as ops.quantize takes them
    Returns (out, scales). Accumulates in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Zhang and Sennrich 2019. Kernels: csrc/norm/rms_norm_quant.cu, rms_norm_quant.cpp
    """
    x, weight = as_tensor(x), as_tensor(weight)
    check_shape("rms_norm_quant", "x", x, (None, None), "[num_tokens, size]")
    _check_x_and_weights("rms_norm_quant", x, weight=weight)
    kind, out, scales = check_quantized("rms_norm_quant", tuple(x.shape), x.device, per, scales, dtype, out)
    torch.ops.fastkernels.rms_norm_quant(x, weight, eps, kind, out, scales)
    return out, scales


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    per: Per = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual += x, rounded to its dtype; then rms_norm_quant(residual, weight, eps).

    x:        [num_tokens, size] bf16 | fp16 | fp32; size a multiple of 16, last dimension contiguous, any
              row stride
    residual: like x, with strides of its own; changed in place
    weight:   [size], dtype of x
    eps:      added to the mean square
    per, scales, dtype, out: as ops.quantize takes them
    Returns (out, scales). Accumulates in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Zhang and Sennrich 2019. Kernels: csrc/norm/add_rms_norm_quant.cu, rms_norm_quant.cpp
    """
    x, residual, weight = as_tensor(x), as_tensor(residual), as_tensor(weight)
    check_shape("add_rms_norm_quant", "x", x, (None, None), "[num_tokens, size]")
    _check_x_and_weights("add_rms_norm_quant", x, weight=weight)
    _check_like_x("add_rms_norm_quant", x, residual=residual)
    check_device("add_rms_norm_quant", x=x, residual=residual)
    check_last_contiguous("add_rms_norm_quant", residual=residual)
    kind, out, scales = check_quantized(
        "add_rms_norm_quant", tuple(x.shape), x.device, per, scales, dtype, out
    )
    torch.ops.fastkernels.add_rms_norm_quant(x, residual, weight, eps, kind, out, scales)
    return out, scales
