"""Matrix products with a weight."""

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

LINEAR_MAX_TOKENS = 16

register_mutating_fake("linear")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    constant_weight: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x weight^T + bias for the few tokens of a decode step, at the speed of reading the weight.

    x:      [num_tokens, in_size] bf16 | fp16 | fp32 (fp32 on the CPU only), up to LINEAR_MAX_TOKENS (16)
            tokens; last dimension contiguous, any row stride; on CUDA rows begin on 16 bytes and in_size is a
            multiple of 8
    weight: [out_size, in_size], dtype of x; last dimension contiguous
    bias:   [out_size], dtype of x, or None
    constant_weight: promises that no kernel still running in the stream writes the weight; on Hopper its
            first rows are then read while the kernel before this one ends
    out:    [num_tokens, out_size], dtype of x, last dimension contiguous; allocated when None
    Returns out. Accumulates in fp32 and rounds once; bitwise repeatable, and a token's result does not depend
    on the others; safe in a CUDA graph. More tokens are torch.nn.functional.linear's.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernels: csrc/gemm/linear.cuh, linear.cpp
    """
    op = "linear"
    x, weight = as_tensor(x), as_tensor(weight)
    check_dtype(op, "x", x, FLOAT_DTYPES)
    require(x.dim() == 2, f"{op}: x has shape {list(x.shape)}, but the op takes [num_tokens, in_size]")
    num_tokens, in_size = x.shape
    check_shape(op, "weight", weight, (None, in_size), "[out_size, in_size], with the in_size of x")
    shape = (num_tokens, weight.shape[0])
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else as_tensor(out)
    check_shape(op, "out", out, shape, "[num_tokens, out_size]")
    if bias is not None:
        bias = as_tensor(bias)
        check_shape(op, "bias", bias, (weight.shape[0],), "[out_size]")
        check_dtype(op, "bias", bias, (x.dtype,))
    check_dtype(op, "weight", weight, (x.dtype,))
    check_dtype(op, "out", out, (x.dtype,))
    check_device(op, x=x, weight=weight, bias=bias, out=out)
    check_last_contiguous(op, x=x, weight=weight, bias=bias, out=out)
    require(
        num_tokens <= LINEAR_MAX_TOKENS,
        f"{op}: num_tokens is {num_tokens}, but the op takes at most {LINEAR_MAX_TOKENS}",
    )
    if x.is_cuda:
        check_dtype(f"{op} on CUDA", "x", x, (torch.bfloat16, torch.float16))
        require(in_size % 8 == 0, f"{op} on CUDA: in_size is {in_size}; it must be a multiple of 8")
    torch.ops.fastkernels.linear(x, weight, bias, constant_weight, out)
    return out
