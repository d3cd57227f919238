"""One token's product with what stands about it in a decode step: a norm before it, an addition or a gate
behind it."""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    register_mutating_fake,
    require,
)
from fastkernels.ops.weight_only import MAX_IN_SIZE, PACKED_FORMATS, RepackedWeight, takes_e4m3

TOKEN_LINEAR_MAX_SIZE = 8192
"""in_size where the op normalises; kTokenLinearMaxSize in csrc/include/fastkernels/token_linear.h."""

_BYTES = (torch.float8_e4m3fn, torch.int8)
_HALVES = (torch.bfloat16, torch.float16)

register_mutating_fake("token_linear")
register_mutating_fake("token_weight_only_linear")


def token_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    *,
    out: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    adds: bool = False,
    constant_weight: bool = False,
) -> torch.Tensor:
    """out = x weight^T + bias for one token, or out += that; x may be a row that is normalised first.

    x:             [1, in_size], in_size a multiple of 16: e4m3 | int8 with x_scales, or of the dtype of out
                   with norm_weight, in_size then up to TOKEN_LINEAR_MAX_SIZE
    x_scales:      [1] fp32: x times this is what is multiplied
    norm_weight:   [in_size], dtype of out: what is multiplied is ``rms_norm_quant(x, norm_weight, eps,
                   per="token")``
    weight:        [out_size, in_size] e4m3 | int8, last dimension contiguous
    weight_scales: [out_size] or [1], fp32
    bias:          [out_size], dtype of out, or None
    adds:          the product is rounded, as where a norm adds it, and added to what out holds
    constant_weight: promises that no kernel still running in the stream writes weight or norm_weight: on
                   Hopper they are then read while the kernel before this one ends
    out:           [1, out_size] bf16 | fp16, not x, last dimension contiguous
    Returns out. CUDA only. Accumulates in fp32 (int8: int32); bitwise repeatable; safe in a CUDA graph. The
    norm's sum is added up in an order of its own, so a byte may be one away from ``rms_norm_quant``'s.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernel: csrc/gemm/linear.cuh
    """
    op = "token_linear"
    x, weight, weight_scales, out = (as_tensor(t) for t in (x, weight, weight_scales, out))
    check_dtype(op, "out", out, _HALVES)
    check_dtype(op, "weight", weight, _BYTES)
    require(
        (x_scales is None) != (norm_weight is None),
        f"{op}: x takes x_scales or a norm_weight, one of the two",
    )
    check_dtype(op, "x", x, (weight.dtype if norm_weight is None else out.dtype,))
    check_shape(op, "x", x, (1, None), "[1, in_size]")
    in_size = x.shape[1]
    check_shape(op, "weight", weight, (None, in_size), "[out_size, in_size], with the in_size of x")
    check_shape(op, "out", out, (1, weight.shape[0]), "[1, out_size]")
    require(in_size > 0 and in_size % 16 == 0, f"{op}: in_size is {in_size}; it must be a multiple of 16")
    require(
        weight_scales.dim() == 1 and weight_scales.numel() in (1, weight.shape[0]),
        f"{op}: weight_scales has shape {list(weight_scales.shape)}, but the op takes [out_size] or [1]",
    )
    if x_scales is not None:
        check_shape(op, "x_scales", x_scales, (1,), "[1]")
        check_dtype(op, "x_scales", x_scales, (torch.float32,))
    if norm_weight is not None:
        check_shape(op, "norm_weight", norm_weight, (in_size,), "[in_size]")
        check_dtype(op, "norm_weight", norm_weight, (out.dtype,))
        require(
            in_size <= TOKEN_LINEAR_MAX_SIZE,
            f"{op}: in_size is {in_size}, but the op normalises at most {TOKEN_LINEAR_MAX_SIZE}",
        )
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "[out_size]")
        check_dtype(op, "bias", bias, (out.dtype,))
    check_dtype(op, "weight_scales", weight_scales, (torch.float32,))
    check_last_contiguous(op, x=x, weight=weight, out=out)
    check_contiguous(op, weight_scales=weight_scales, norm_weight=norm_weight, bias=bias)
    check_device(op, x=x, weight=weight, weight_scales=weight_scales, norm_weight=norm_weight, out=out)
    check_device(op, x=x, x_scales=x_scales, bias=bias)
    torch.ops.fastkernels.token_linear(
        x, x_scales, norm_weight, eps, weight, weight_scales, bias, constant_weight, adds, out
    )
    return out


def token_weight_only_linear(
    x: torch.Tensor,
    weight: RepackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    adds: bool = False,
    gated: bool = False,
    tactic: int = 0,
    constant_weight: bool = False,
) -> torch.Tensor:
    """``weight_only_linear`` of one token: of a row that is normalised first, added to what out holds, or
    with the gate of ``silu_mul`` behind it.

    x:           [1, in_size] bf16 | fp16, in_size a multiple of 8 up to 131072; begins on 16 bytes
    weight:      of ``repack_for_cuda``, neither for "e4m3" nor with a permutation; gated: the rows of the
                 gate, then as many of up
    bias:        of as many numbers as weight has rows, dtype of x, or None
    norm_weight: [in_size], dtype of x: what is multiplied is ``rms_norm(x, norm_weight, eps)``; or None
    adds:        the result is rounded, as where a norm adds it, and added to what out holds
    gated:       the result is silu(gate) * up, not rounded in between; its size is a multiple of 16
    tactic:      0: chosen by shape; 1 or 2: how many blocks share K, 2 on Hopper
    constant_weight: promises that no kernel still running in the stream writes weight or norm_weight: on
                 Hopper they are then read while the kernel before this one ends
    out:         [1, out_size], dtype of x, not x, last dimension contiguous
    Returns out. CUDA only; bitwise repeatable; safe in a CUDA graph. The norm's sum is added up in an order
    of its own, and in bf16 x is divided by its root mean square behind the product.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernel: csrc/gemm/weight_only_few.cuh
    """
    op = "token_weight_only_linear"
    x, out = as_tensor(x), as_tensor(out)
    in_size, rows = weight.in_size, weight.out_size
    check_dtype(op, "x", x, _HALVES)
    check_shape(op, "x", x, (1, in_size), f"[1, {in_size}], by the weight")
    require(
        in_size % 8 == 0 and 0 < in_size <= MAX_IN_SIZE,
        f"{op}: in_size is {in_size}, but the op takes multiples of 8 up to {MAX_IN_SIZE}",
    )
    require(
        not takes_e4m3(weight.packed_format) and weight.permutation is None,
        f"{op}: the weight is for x in e4m3, or of another order along K; weight_only_linear takes those",
    )
    require(
        not gated or rows % 32 == 0,
        f"{op}: weight has {rows} rows; of a gate and up it takes a multiple of 32",
    )
    check_dtype(op, "out", out, (x.dtype,))
    check_shape(op, "out", out, (1, rows // 2 if gated else rows), "[1, out_size], by the weight")
    for name, tensor, size in (("norm_weight", norm_weight, in_size), ("bias", bias, rows)):
        if tensor is not None:
            check_shape(op, name, tensor, (size,), f"[{size}], by the weight")
            check_dtype(op, name, tensor, (x.dtype,))
    check_last_contiguous(op, x=x, out=out)
    check_contiguous(op, norm_weight=norm_weight, bias=bias)
    check_device(op, x=x, packed=weight.packed, norm_weight=norm_weight, bias=bias, out=out)
    torch.ops.fastkernels.token_weight_only_linear(
        x,
        norm_weight,
        eps,
        weight.packed,
        weight.row_factors,
        bias,
        list(PACKED_FORMATS).index(weight.packed_format),
        tactic,
        constant_weight,
        adds,
        gated,
        out,
    )
    return out
