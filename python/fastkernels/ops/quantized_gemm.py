"""Matrix products with a quantised weight."""

from __future__ import annotations

from typing import Literal

import torch

from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    register_mutating_fake,
    require,
)
from fastkernels.ops.weight_only import repack_for_cuda, weight_only_linear

register_mutating_fake("quantized_linear")

WeightType = Literal["int8", "int4", "e2m1", "e4m3"]
Activation = Literal["int8", "e4m3", "e4m3-block"]

WEIGHT_TYPES = {"int8": 0, "int4": 1, "e2m1": 2, "e4m3": 3}
ACTIVATIONS = {None: 0, "int8": 1, "e4m3": 2, "e4m3-block": 3}
_STORED = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "e2m1": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8)
_TAKES = {"int8": (None, "int8"), "int4": (None,), "e2m1": (None,), "e4m3": (None, "e4m3", "e4m3-block")}
_MAX_IN_SIZE = 1 << 17


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_type: WeightType,
    block: tuple[int, int] | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    activation: Activation | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias, where W = global_scale * scales * (weight - zeros), of any number of tokens.

    x:      [num_tokens, in_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride; in_size up to
            131072
    weight: contiguous; by weight_type
            "int8": [out_size, in_size] int8
            "int4": [out_size, in_size / 2] uint8: two neighbours of a row a byte, the first in the low half,
                    each 0 to 15
            "e2m1": the same, each a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
            "e4m3": [out_size, in_size] float8_e4m3fn
    block:  (rows, size): how many rows and neighbours in a row share a scale; None: (1, in_size). "int8" takes
            (1, in_size); "int4" and "e2m1" (1, in_size) or one row and 16, 32, 64 or a multiple of 128 that
            divides in_size; "e4m3" any
    scales: [ceil(out_size / rows), ceil(in_size / size)] contiguous, fp32 | fp16 | bf16 | e4m3 | uint8, which
            stands for 2^(scale - 127)
    zeros:  "int4": uint8 of the shape of scales, or None: all 8
    global_scale: fp32 [1], or None: 1
    activation: what x is rounded to before: nothing, or, as `quantize` does it, "int8" per token (with int8
            weights), "e4m3" per token or "e4m3-block" per 128 neighbours (with e4m3 weights)
    bias:   [out_size], dtype of x, or None
    out:    [num_tokens, out_size], dtype of x, last dimension contiguous; allocated when None
    Returns out. Products with int8, int4 and e2m1 are of whole numbers, x as 127 * 254 (bf16, fp16) or 127 *
    254^2 (fp32) steps of the largest of 128 neighbours, and exact within a block; sums of blocks, and all of
    e4m3, in fp32. Bitwise repeatable, and a token's result does not depend on the others.
    On CUDA: weights are repacked at every call, which takes far longer than the product; keep what
    ``repack_for_cuda`` makes and call ``weight_only_linear``, whose docstring says what differs (activation
    None, products of floats).
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/gemm/integer_linear.cpp, fp8_linear.cpp, weight_only.cuh
    """
    op = "quantized_linear"
    x, weight, scales = as_tensor(x), as_tensor(weight), as_tensor(scales)
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"{op}: weight_type is {weight_type!r}, but the op takes {', '.join(WEIGHT_TYPES)}")
    if activation not in _TAKES[weight_type]:
        takes = ", ".join(map(repr, _TAKES[weight_type]))
        raise ValueError(
            f"{op}: activation is {activation!r}, but with {weight_type} weights the op takes {takes}"
        )
    check_dtype(op, "x", x, FLOAT_DTYPES)
    check_shape(op, "x", x, (None, None), "[num_tokens, in_size]")
    check_dtype(op, "weight", weight, (_STORED[weight_type],))
    num_tokens, in_size = x.shape
    out_size = _checked_out_size(op, weight, weight_type, in_size)
    rows, size = _checked_block(op, weight_type, block, in_size)
    check_dtype(op, "scales", scales, _SCALE_DTYPES)
    _check_by_block(op, "scales", scales, out_size, in_size, rows, size)
    if zeros is not None:
        zeros = as_tensor(zeros)
        require(weight_type == "int4", f"{op}: zeros are given, but {weight_type} weights have none")
        check_dtype(op, "zeros", zeros, (torch.uint8,))
        _check_by_block(op, "zeros", zeros, out_size, in_size, rows, size)
    if global_scale is not None:
        global_scale = as_tensor(global_scale)
        check_dtype(op, "global_scale", global_scale, (torch.float32,))
        check_shape(op, "global_scale", global_scale, (1,), "[1]")
    out = torch.empty(num_tokens, out_size, dtype=x.dtype, device=x.device) if out is None else as_tensor(out)
    check_shape(op, "out", out, (num_tokens, out_size), "[num_tokens, out_size]")
    check_dtype(op, "out", out, (x.dtype,))
    if bias is not None:
        bias = as_tensor(bias)
        check_shape(op, "bias", bias, (out_size,), "[out_size]")
        check_dtype(op, "bias", bias, (x.dtype,))
    check_device(
        op, x=x, weight=weight, scales=scales, zeros=zeros, global_scale=global_scale, bias=bias, out=out
    )
    if x.is_cuda:
        require(
            activation is None,
            f"{op}: activation is {activation!r}, but on CUDA the op takes None so far",
        )
        check_contiguous(op, weight=weight, scales=scales, zeros=zeros)
        repacked = repack_for_cuda(
            weight, scales, weight_type=weight_type, block=block, zeros=zeros, global_scale=global_scale
        )
        return weight_only_linear(x, repacked, bias, out=out)
    check_last_contiguous(op, x=x, bias=bias, out=out)
    check_contiguous(op, weight=weight, scales=scales, zeros=zeros)
    torch.ops.fastkernels.quantized_linear(
        x,
        weight,
        scales,
        zeros,
        global_scale,
        bias,
        WEIGHT_TYPES[weight_type],
        rows,
        size,
        ACTIVATIONS[activation],
        out,
    )
    return out


# Sentences with sizes are put together where they are raised: torch.compile, with sizes that vary, cannot.


def _checked_out_size(op: str, weight: torch.Tensor, weight_type: str, in_size: int) -> int:
    if not 0 < in_size <= _MAX_IN_SIZE:
        raise ValueError(f"{op}: in_size is {in_size}, but the op takes 1 to {_MAX_IN_SIZE}")
    half_bytes = weight_type in ("int4", "e2m1")
    if half_bytes and in_size % 2:
        raise ValueError(f"{op}: in_size is {in_size}; with 4 bits it must be even")
    stored = in_size // 2 if half_bytes else in_size
    if weight.dim() != 2 or weight.shape[1] != stored:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, but the op takes [out_size, {stored}], by the "
            "in_size of x"
        )
    return weight.shape[0]


def _checked_block(op: str, weight_type: str, block: tuple[int, int] | None, in_size: int) -> tuple[int, int]:
    rows, size = block or (1, in_size)
    if rows < 1 or size < 1:
        raise ValueError(f"{op}: block is {block}, but its sizes are positive")
    if weight_type == "int8" and (rows != 1 or size < in_size):
        raise ValueError(f"{op}: block is {block}, but int8 weights have a scale a row")
    if weight_type in ("int4", "e2m1"):
        if rows != 1 or not (size >= in_size or size in (16, 32, 64) or size % 128 == 0):
            raise ValueError(
                f"{op}: block is {block}, but {weight_type} weights take 1 row and 16, 32, 64, a multiple of "
                "128 or all of in_size"
            )
        if size < in_size and in_size % size:
            raise ValueError(f"{op}: in_size is {in_size}, which blocks of {size} do not divide")
    return rows, size


def _check_by_block(
    op: str, name: str, x: torch.Tensor, out_size: int, in_size: int, rows: int, size: int
) -> None:
    expected = (-(-out_size // rows), -(-in_size // size))
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)}, but the op takes {list(expected)} for blocks of "
            f"{rows} x {size}"
        )
