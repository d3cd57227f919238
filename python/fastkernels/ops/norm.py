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

register_mutating_fake("rms_norm")


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
    require(x.dim() in (2, 3), f"rms_norm: x has shape {list(x.shape)}, but the op takes 2 or 3 dimensions")
    check_dtype("rms_norm", "x", x, FLOAT_DTYPES)
    check_dtype("rms_norm", "weight", weight, (x.dtype,))
    check_shape("rms_norm", "weight", weight, (x.shape[-1],), "[size], the last dimension of x")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_dtype("rms_norm", "out", out, (x.dtype,))
    check_shape("rms_norm", "out", out, tuple(x.shape), "the shape of x")
    check_device("rms_norm", x=x, weight=weight, out=out)
    check_last_contiguous("rms_norm", x=x, weight=weight, out=out)
    torch.ops.fastkernels.rms_norm(x, weight, eps, out)
    return out
