"""8-bit values with scales, value = byte * scale: what the products of 8-bit weights take."""

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

register_mutating_fake("quantize")
register_mutating_fake("quantize_zeros")

BLOCK = 128  # elements that share a scale per "block"
KINDS = {"tensor": 0, "token": 1, "block": 2}
BYTE_DTYPES = (torch.float8_e4m3fn, torch.int8)

Per = Literal["tensor", "token", "block"]


def check_quantized(
    op: str,
    shape: tuple[int, ...],
    device: torch.device,
    per: str,
    scales: torch.Tensor | None,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] = BYTE_DTYPES,
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(kind, out, scales) of an op whose result, `shape`, is quantised to one of dtypes; out and scales made
    when None."""
    require(per in KINDS, f"{op}: per is {per!r}, but the op takes 'tensor', 'token' and 'block'")
    num_tokens, size = shape
    require(size % 16 == 0, f"{op}: a row has {size} elements, but the op takes a multiple of 16")
    require(
        per != "block" or size % BLOCK == 0,
        f"{op}: a row has {size} elements, but per 'block' takes a multiple of {BLOCK}",
    )
    if dtype not in dtypes:
        takes = ", ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise ValueError(f"{op}: dtype is {dtype}, but the op takes {takes}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    out = as_tensor(out)
    check_dtype(op, "out", out, (dtype,))
    check_shape(op, "out", out, shape, "[num_tokens, size]")
    scales_shape = {"tensor": (1,), "token": (num_tokens,), "block": (num_tokens, size // BLOCK)}[per]
    if scales is None:
        require(per != "tensor", f"{op}: per 'tensor' takes the scale, [1] fp32, as scales")
        scales = torch.empty(scales_shape, dtype=torch.float32, device=device)
    scales = as_tensor(scales)
    check_dtype(op, "scales", scales, (torch.float32,))
    check_shape(op, "scales", scales, scales_shape, f"{list(scales_shape)} per '{per}'")
    check_device(op, out=out, scales=scales)
    require(out.device == device, f"{op}: out is on {out.device}, but x is on {device}")
    check_last_contiguous(op, out=out)
    check_contiguous(op, scales=scales)
    return KINDS[per], out, scales


def quantize(
    x: torch.Tensor,
    *,
    per: Per = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = x * (1 / scale) in fp32, rounded to nearest and even, cut off at the type's largest value.

    x:      [num_tokens, size] bf16 | fp16 | fp32; size a multiple of 16, last dimension contiguous, any row
            stride
    per:    what shares a scale. "tensor": all, and the scale is given. "token": a row; "block": 128
            neighbours of a row, size then a multiple of 128; the scale is the largest magnitude / 448 (e4m3),
            127 (int8) or 57344 (e5m2), at least 2^-126
    scales: fp32 contiguous; "tensor": [1], read; "token": [num_tokens], "block": [num_tokens, size / 128],
            written, allocated when None. Row-major; a product with 1x128 scales that wants them column-major,
            so that the scales of neighbouring tokens lie together, takes a transposed copy
    dtype:  float8_e4m3fn | int8 | float8_e5m2
    out:    [num_tokens, size] of dtype, any row stride; allocated when None
    Returns (out, scales). Computes in fp32; bitwise repeatable; safe in a CUDA graph. On CUDA, addresses,
    rows and strides are whole 16 bytes.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/quant/quantize.cu, quantize.cpp
    """
    x = as_tensor(x)
    check_dtype("quantize", "x", x, FLOAT_DTYPES)
    check_shape("quantize", "x", x, (None, None), "[num_tokens, size]")
    check_device("quantize", x=x)
    check_last_contiguous("quantize", x=x)
    dtypes = (*BYTE_DTYPES, torch.float8_e5m2)
    kind, out, scales = check_quantized("quantize", tuple(x.shape), x.device, per, scales, dtype, out, dtypes)
    torch.ops.fastkernels.quantize(x, kind, out, scales)
    return out, scales


def quantize_zeros(
    x: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 with a scale and a zero point a token: x is about (out - zero) * scale.

    x:      [num_tokens, size] bf16 | fp16 | fp32; size a multiple of 16, last dimension contiguous, any row
            stride
    scales: fp32 [num_tokens], contiguous, written: the way from the least to the largest value of the row, 0
            among them, / 254, at least 2^-126; NaN where the row holds NaN or infinity. Allocated when None
    zeros:  int32 [num_tokens], contiguous, written: -127 to 127, what 0 becomes. Allocated when None
    out:    int8 [num_tokens, size], any row stride: -127 to 127. Allocated when None
    Returns (out, scales, zeros), where out = x * (1 / scale) in fp32, rounded to nearest and even, + zero.
    Bitwise repeatable; safe in a CUDA graph. On CUDA, addresses, rows and strides are whole 16 bytes.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/quant/quantize_zeros.cu, quantize_zeros.cpp
    """
    op = "quantize_zeros"
    x = as_tensor(x)
    check_dtype(op, "x", x, FLOAT_DTYPES)
    check_shape(op, "x", x, (None, None), "[num_tokens, size]")
    check_device(op, x=x)
    check_last_contiguous(op, x=x)
    _, out, scales = check_quantized(op, tuple(x.shape), x.device, "token", scales, torch.int8, out)
    if zeros is None:
        zeros = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    zeros = as_tensor(zeros)
    check_dtype(op, "zeros", zeros, (torch.int32,))
    check_shape(op, "zeros", zeros, (x.shape[0],), "[num_tokens]")
    check_device(op, x=x, zeros=zeros)
    check_contiguous(op, zeros=zeros)
    torch.ops.fastkernels.quantize_zeros(x, out, scales, zeros)
    return out, scales, zeros
