"""Matrix products with a quantised weight."""

from __future__ import annotations

from typing import Literal

import torch

from fastkernels.ops.activation import silu_mul
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
from fastkernels.ops.gemm import MAX_IN_SIZE_WITH_ZEROS, matmul
from fastkernels.ops.quant import BYTE_DTYPES, Per, quantize, quantize_zeros
from fastkernels.ops.weight_only import repack_for_cuda, weight_only_linear

register_mutating_fake("quantized_linear", "interleave_rows")

WeightType = Literal["int8", "int4", "e2m1", "e4m3"]
Activation = Literal["int8", "e4m3", "e4m3-block", "int8-zeros", "e5m2"]

WEIGHT_TYPES = {"int8": 0, "int4": 1, "e2m1": 2, "e4m3": 3}
ACTIVATIONS = {None: 0, "int8": 1, "e4m3": 2, "e4m3-block": 3, "int8-zeros": 4, "e5m2": 5}
_STORED = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "e2m1": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8)
_TAKES = {
    "int8": (None, "int8", "int8-zeros"),
    "int4": (None, "e4m3"),
    "e2m1": (None,),
    "e4m3": (None, "e4m3", "e4m3-block", "e5m2"),
}
WITH_ZEROS = "int8-zeros"
"""The activation that has a zero point a token: ``quantize_zeros``'s."""
# activation -> what `quantize`, or `quantize_zeros`, makes of x before a product on CUDA
QUANTIZED: dict[str | None, tuple[Per, torch.dtype]] = {
    "int8": ("token", torch.int8),
    "e4m3": ("token", torch.float8_e4m3fn),
    "e4m3-block": ("block", torch.float8_e4m3fn),
    WITH_ZEROS: ("token", torch.int8),
    "e5m2": ("token", torch.float8_e5m2),
}
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
    weight_sums: torch.Tensor | None = None,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out_scale: torch.Tensor | None = None,
    interleaved: bool = False,
    constant_weight: bool = False,
    tactic: int = -1,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + residual, where W = global_scale * scales * (weight - zeros), of any number of
    tokens; or silu(gate) * up of such a product; and either may be quantised.

    x:      [num_tokens, in_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride; in_size up to
            131072
    weight: contiguous; by weight_type
            "int8": [out_size, in_size] int8
            "int4": [out_size, in_size / 2] uint8: two neighbours of a row a byte, the first in the low half,
                    each 0 to 15
            "e2m1": the same, each a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
            "e4m3": [out_size, in_size] float8_e4m3fn
    block:  (rows, size): how many rows and neighbours in a row share a scale; None: (1, in_size). "int8"
            takes (1, in_size); "int4" and "e2m1" (1, in_size) or one row and 16, 32, 64 or a multiple of 128
            that divides in_size; "e4m3" any
    scales: [ceil(out_size / rows), ceil(in_size / size)] contiguous, fp32 | fp16 | bf16 | e4m3 | uint8, which
            stands for 2^(scale - 127)
    zeros:  "int4": uint8 of the shape of scales, or None: all 8
    global_scale: fp32 [1], or None: 1
    activation: what x is rounded to before: nothing, or, as `quantize` does it, "int8" per token (with int8
            weights), "e4m3" or "e5m2" per token or "e4m3-block" per 128 neighbours (with e4m3 weights; "e4m3"
            with int4 weights too), or,
            as `quantize_zeros` does it, "int8-zeros" (with int8 weights, and an in_size up to 65536)
    weight_sums: int32, one a row of weight, contiguous: with "int8-zeros", ``row_sums`` of weight; computed
            when None, which reads all of weight, and not of interleaved rows
    interleaved: the rows of weight are as ``interleave_rows`` leaves them
    bias:   [out_size], dtype of x, or None
    residual: [num_tokens, out_size], dtype of x, last dimension contiguous, or None; may be out; on CUDA
            out_size is then a multiple of 8, and its rows begin on 16 bytes
    gated:  weight has 2 * out_size rows, a gate's, then up's (and so have scales, zeros and weight_sums), and
            y = silu(x gate^T) * (x up^T); without bias and residual
    out_scale: fp32 [1], or None: out is the bytes of y that ``quantize`` per "tensor" makes with this scale;
            out_size is then a multiple of 16
    constant_weight, tactic, workspace: on CUDA and with an activation, as ``linear`` takes them
    out:    [num_tokens, out_size], dtype of x, or with out_scale e4m3 | int8; last dimension contiguous;
            allocated when None, e4m3 with out_scale
    Returns out; bitwise repeatable.
    On CUDA with an activation and 8-bit weights, residual, gated and out_scale are part of the product's
    kernel, which rounds y once. out_size is with a gate a multiple of 8 (with "e4m3-block" 128). On the CPU
    the product is rounded to the dtype of x, then silu_mul, the addition and quantize follow. Other products
    on CUDA take none of the three.
    On the CPU, products with int8, int4 and e2m1 are of whole numbers, x as 127 * 254 (bf16, fp16) or 127 *
    254^2 (fp32) steps of the largest of 128 neighbours, and exact within a block; sums of blocks, and all of
    e4m3, in fp32. A token's result does not depend on the others.
    On CUDA, where activation is given: bf16 and fp16; scales fp32, 128 x 128 each with "e4m3-block", else a
    row each or one; in_size a multiple of 16. x is quantised into tensors that are allocated. Tactics 0 to 15
    are for Hopper GPUs; of them 0 to 3 add up fp8 with about 14 bits, the others, and -1, at most
    1024 neighbours at a time. A token's result may depend on how many others there are.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    With activation None, or int4 weights, on CUDA weights are repacked at every call, which takes far longer
    than the product; keep what ``repack_for_cuda`` gives and call ``weight_only_linear`` instead.
    Kernels: csrc/gemm/integer_linear.cpp, fp8_linear.cpp, matmul_sm90.cuh, matmul_sm80.cuh, weight_only.cuh.
    Source of the gate: Shazeer 2020 (SwiGLU).
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
    num_rows = _checked_num_rows(op, weight, weight_type, in_size)
    rows, size = _checked_block(op, weight_type, block, in_size)
    check_dtype(op, "scales", scales, _SCALE_DTYPES)
    _check_by_block(op, "scales", scales, num_rows, in_size, rows, size)
    if zeros is not None:
        zeros = as_tensor(zeros)
        require(weight_type == "int4", f"{op}: zeros are given, but {weight_type} weights have none")
        check_dtype(op, "zeros", zeros, (torch.uint8,))
        _check_by_block(op, "zeros", zeros, num_rows, in_size, rows, size)
    if global_scale is not None:
        global_scale = as_tensor(global_scale)
        check_dtype(op, "global_scale", global_scale, (torch.float32,))
        check_shape(op, "global_scale", global_scale, (1,), "[1]")
    weight_sums = _checked_sums(op, weight_sums, weight, activation, interleaved, num_rows, in_size)
    require(not gated or (bias is None and residual is None), f"{op}: gated takes neither bias nor residual")
    if gated and num_rows % 2:
        raise ValueError(f"{op}: weight has {num_rows} rows; gate and up have as many each")
    shape = (num_tokens, num_rows // 2 if gated else num_rows)
    if out is None:
        dtype = x.dtype if out_scale is None else torch.float8_e4m3fn
        out = torch.empty(shape, dtype=dtype, device=x.device)
    out = as_tensor(out)
    check_shape(op, "out", out, shape, "[num_tokens, out_size]")
    check_dtype(op, "out", out, (x.dtype,) if out_scale is None else BYTE_DTYPES)
    if bias is not None:
        bias = as_tensor(bias)
        check_shape(op, "bias", bias, shape[1:], "[out_size]")
        check_dtype(op, "bias", bias, (x.dtype,))
    if residual is not None:
        residual = as_tensor(residual)
        check_shape(op, "residual", residual, shape, "[num_tokens, out_size]")
        check_dtype(op, "residual", residual, (x.dtype,))
    if out_scale is not None:
        out_scale = as_tensor(out_scale)
        check_shape(op, "out_scale", out_scale, (1,), "[1]")
        check_dtype(op, "out_scale", out_scale, (torch.float32,))
        if shape[1] % 16:
            raise ValueError(f"{op}: out_size is {shape[1]}; with an out_scale it must be a multiple of 16")
    check_device(op, x=x, weight=weight, scales=scales, zeros=zeros, global_scale=global_scale, bias=bias)
    check_device(op, x=x, weight_sums=weight_sums, residual=residual, out_scale=out_scale, out=out)
    has_epilogue = gated or residual is not None or out_scale is not None
    require(not (x.is_cuda and interleaved), f"{op} on CUDA: interleaved rows are for the CPU")
    if x.is_cuda and (activation is None or weight_type == "int4"):
        require(
            not has_epilogue,
            f"{op} on CUDA: residual, gated and out_scale go with an activation and weights of int8 or e4m3; "
            "behind other products take silu_mul, add_rms_norm or quantize, or token_weight_only_linear",
        )
        check_contiguous(op, weight=weight, scales=scales, zeros=zeros)
        repacked = repack_for_cuda(
            *(weight, scales),
            weight_type=weight_type,
            block=block,
            zeros=zeros,
            global_scale=global_scale,
            activation=activation,
        )
        x_scales = None
        if activation is not None:
            x, x_scales = round_to(x, activation)
        return weight_only_linear(x, repacked, bias, x_scales=x_scales, out=out)
    check_last_contiguous(op, x=x, bias=bias, residual=residual, out=out)
    check_contiguous(op, weight=weight, scales=scales, zeros=zeros, weight_sums=weight_sums)
    require(not interleaved or interleaves(weight), f"{op}: interleaved {_INTERLEAVED}")
    if x.is_cuda:
        weight_scales = _scales_on_cuda(op, activation, scales, global_scale, num_rows, in_size, rows, size)
        check_dtype(f"{op} on CUDA", "x", x, (torch.bfloat16, torch.float16))
        bytes_, x_scales, *x_zeros = round_to(x, activation)
        matmul(
            *(op, bytes_, weight, x_scales, weight_scales, bias, constant_weight, tactic, workspace, out),
            x_zeros=x_zeros[0] if x_zeros else None,
            weight_sums=weight_sums,
            residual=residual,
            out_scale=out_scale,
            gated=gated,
        )
        return out
    product = x.new_empty(num_tokens, num_rows) if has_epilogue else out
    torch.ops.fastkernels.quantized_linear(
        x,
        weight,
        scales,
        zeros,
        global_scale,
        weight_sums,
        bias,
        WEIGHT_TYPES[weight_type],
        rows,
        size,
        ACTIVATIONS[activation],
        interleaved,
        product,
    )
    if has_epilogue:
        _finish(product, residual, gated, out_scale, out)
    return out


def _finish(
    product: torch.Tensor,
    residual: torch.Tensor | None,
    gated: bool,
    out_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """On the CPU, what the GPU's kernel does before it rounds."""
    if gated:
        product = silu_mul(product)
    if residual is not None:
        product = product + residual
    if out_scale is None:
        out.copy_(product)
    else:
        quantize(product, per="tensor", scales=out_scale, dtype=out.dtype, out=out)


def round_to(x: torch.Tensor, activation: str | None) -> tuple[torch.Tensor, ...]:
    """x as a product on CUDA takes it: bytes, scales, and with "int8-zeros" zero points."""
    if activation == WITH_ZEROS:
        return quantize_zeros(x)
    per, byte = QUANTIZED[activation]
    return quantize(x, per=per, dtype=byte)


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """int32 [out_size]: what the rows of an int8 weight, not interleaved, add up to."""
    return weight.sum(1, dtype=torch.int32)


_INTERLEAVED = "rows are of int8 or uint8 elements, a multiple of 64 of them"


def interleaves(weight: torch.Tensor) -> bool:
    """Whether ``interleave_rows`` takes it."""
    return weight.dtype in (torch.int8, torch.uint8) and weight.dim() == 2 and weight.shape[1] % 64 == 0


def interleave_rows(weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The order in which the CPU reads a weight of int8, int4 or e2m1 fastest: memory as it lies.

    weight: [out_size, row_bytes] int8 | uint8, contiguous, row_bytes a multiple of 64
    out:    like weight; allocated when None, and then in large pages where the system has them
    Returns out: of every 8 rows, the first 64 bytes of each in turn, then the next; what is left of the rows
    stays as it is. Raises ValueError for a dtype, shape, stride or device it does not take, naming what it
    does.
    Kernel: csrc/gemm/interleave_rows.cpp
    """
    op = "interleave_rows"
    weight = as_tensor(weight)
    if not interleaves(weight):
        raise ValueError(f"{op}: weight is {weight.dtype} {list(weight.shape)}, but its {_INTERLEAVED}")
    out = torch.empty_like(weight) if out is None else as_tensor(out)
    check_shape(op, "out", out, tuple(weight.shape), "the shape of weight")
    check_dtype(op, "out", out, (weight.dtype,))
    check_device(op, weight=weight, out=out)
    require(not weight.is_cuda, f"{op}: weight is on {weight.device}, but the op is for the CPU")
    check_contiguous(op, weight=weight, out=out)
    torch.ops.fastkernels.interleave_rows(weight, out)
    return out


def _scales_on_cuda(
    op: str,
    activation: str | None,
    scales: torch.Tensor,
    global_scale: torch.Tensor | None,
    num_rows: int,
    in_size: int,
    rows: int,
    size: int,
) -> torch.Tensor:
    """scales as ``matmul`` takes them."""
    op = f"{op} on CUDA"
    check_dtype(op, "scales", scales, (torch.float32,))
    require(global_scale is None, f"{op}: global_scale is given, but the op takes none")
    if activation == "e4m3-block":
        if (rows, size) != (128, 128):
            raise ValueError(
                f"{op}: block is {(rows, size)}, but with {activation!r} the op takes (128, 128)"
            )
        return scales
    if size < in_size or (rows != 1 and rows < num_rows):
        raise ValueError(f"{op}: block is {(rows, size)}, but the op takes a scale a row, or one for all")
    return scales.view(-1)


# Sentences with sizes are put together where they are raised: torch.compile, with sizes that vary, cannot.


def _checked_num_rows(op: str, weight: torch.Tensor, weight_type: str, in_size: int) -> int:
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


def _checked_sums(
    op: str,
    weight_sums: torch.Tensor | None,
    weight: torch.Tensor,
    activation: str | None,
    interleaved: bool,
    num_rows: int,
    in_size: int,
) -> torch.Tensor | None:
    if activation != WITH_ZEROS:
        require(weight_sums is None, f"{op}: weight_sums are given, but they go with activation 'int8-zeros'")
        return None
    if in_size > MAX_IN_SIZE_WITH_ZEROS:
        raise ValueError(
            f"{op}: in_size is {in_size}, but with activation 'int8-zeros' the op takes up to "
            f"{MAX_IN_SIZE_WITH_ZEROS}"
        )
    if weight_sums is None:
        require(not interleaved, f"{op}: with activation 'int8-zeros' interleaved rows take weight_sums")
        return row_sums(weight)
    weight_sums = as_tensor(weight_sums)
    check_dtype(op, "weight_sums", weight_sums, (torch.int32,))
    check_shape(op, "weight_sums", weight_sums, (num_rows,), "[out_size], with a gate [2 * out_size]")
    return weight_sums


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
    op: str, name: str, x: torch.Tensor, num_rows: int, in_size: int, rows: int, size: int
) -> None:
    expected = (-(-num_rows // rows), -(-in_size // size))
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)}, but the op takes {list(expected)} for blocks of "
            f"{rows} x {size}"
        )
