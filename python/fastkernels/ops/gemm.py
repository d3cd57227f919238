"""Matrix products with a weight."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

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


class MatmulTile(NamedTuple):
    """Tile t of Hopper's kernel, kMatmulTiles in csrc/gemm/matmul_sm90.h: tactic 2 t takes tiles whole,
    2 t + 1 shares out K too. 128 rows x columns: of x times the weight, or the other way round."""

    tokens_are_a: bool
    columns: int
    cluster: int


MATMUL_TILES = (
    MatmulTile(True, 256, 2),
    MatmulTile(True, 256, 1),
    MatmulTile(True, 192, 2),
    MatmulTile(True, 128, 2),
    MatmulTile(True, 128, 1),
    MatmulTile(False, 32, 1),
    MatmulTile(False, 64, 1),
    MatmulTile(False, 128, 2),
)
LINEAR_TACTIC = 2 * len(MATMUL_TILES)
"""Of ``matmul``: the kernel of ``linear``, for few tokens of bytes."""
MATMUL_SM80_TILES = (128, 64)
"""Of the kernel for any GPU, kMatmulSm80Tiles in csrc/gemm/matmul_sm80.h: so many tokens and rows of the
weight. Tile t is the tactic FIRST_SM80_TACTIC + t; of bytes alone."""
FIRST_SM80_TACTIC = LINEAR_TACTIC + 1


class MatmulFewTile(NamedTuple):
    """Tile t of Hopper's kernel for few tokens, kMatmulFewTiles in csrc/gemm/matmul_sm90.h, is the tactic
    FIRST_FEW_TACTIC + t: 64 rows of the weight times ``columns`` tokens, K shared out over a cluster."""

    columns: int
    cluster: int


MATMUL_FEW_TILES = (MatmulFewTile(32, 2), MatmulFewTile(32, 4), MatmulFewTile(64, 2), MatmulFewTile(64, 4))
FIRST_FEW_TACTIC = FIRST_SM80_TACTIC + len(MATMUL_SM80_TILES)
NUM_MATMUL_TACTICS = FIRST_FEW_TACTIC + len(MATMUL_FEW_TILES)
MAX_IN_SIZE_WITH_ZEROS = 1 << 16

register_mutating_fake("linear")
register_mutating_fake("linear_silu_mul")
register_mutating_fake("matmul")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    constant_weight: bool = False,
    tactic: int | None = None,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x weight^T + bias + residual for a decode step's few tokens, at the speed of reading the weight.

    x:      [num_tokens, in_size] bf16 | fp16 | fp32 (fp32 on the CPU only), up to LINEAR_MAX_TOKENS (16)
            tokens unless tactic is given; last dimension contiguous, any row stride; on CUDA rows begin on 16
            bytes and in_size is a multiple of 8
    weight: [out_size, in_size], dtype of x; last dimension contiguous
    bias:   [out_size], dtype of x, or None
    residual: [num_tokens, out_size], dtype of x, or None; last dimension contiguous, rows begin on 16 bytes;
            may be out. By Hopper's kernels, which it makes of no tactic -1, it is added in fp32 before y is
            rounded, out_size is a multiple of 8, and rows of weight and out begin on 16 bytes too; elsewhere
            the sum is rounded once more
    constant_weight: promises that no kernel still running in the stream writes the weight; on Hopper its
            first rows are then read while the kernel before this one ends
    tactic: given, any number of tokens go through Hopper's kernels of ``matmul``: 0 to LINEAR_TACTIC - 1, a
            tile and a way to share out the work, FIRST_FEW_TACTIC and above, tiles for few tokens, or -1,
            which chooses by shape
    workspace: of the Hopper kernel, from ``matmul_workspace``, one for calls that may run at the same time;
            None: one kept for the current stream, or made when that is being captured
    out:    [num_tokens, out_size], dtype of x, last dimension contiguous; allocated when None
    Returns out. Accumulates in fp32 and rounds once; bitwise repeatable, and a token's result does not depend
    on the others (with a tactic: on those of other tiles); safe in a CUDA graph. More tokens without a tactic
    are torch.nn.functional.linear's.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernels: csrc/gemm/linear.cuh, linear.cpp, matmul_sm90.cuh, matmul_sm90_few.cuh
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
    if residual is not None:
        residual = as_tensor(residual)
        check_shape(op, "residual", residual, shape, "[num_tokens, out_size]")
        check_dtype(op, "residual", residual, (x.dtype,))
    check_dtype(op, "weight", weight, (x.dtype,))
    check_dtype(op, "out", out, (x.dtype,))
    check_device(op, x=x, weight=weight, bias=bias, residual=residual, out=out)
    check_last_contiguous(op, x=x, weight=weight, bias=bias, residual=residual, out=out)
    if residual is not None and tactic is None and x.is_cuda and is_hopper(x.device):
        tactic = -1
    require(
        num_tokens <= LINEAR_MAX_TOKENS or tactic is not None,
        f"{op}: num_tokens is {num_tokens}, but the op takes at most {LINEAR_MAX_TOKENS}",
    )
    if x.is_cuda:
        check_dtype(f"{op} on CUDA", "x", x, (torch.bfloat16, torch.float16))
        require(in_size % 8 == 0, f"{op} on CUDA: in_size is {in_size}; it must be a multiple of 8")
    if tactic is not None:
        matmul(*(op, x, weight, None, None, bias, constant_weight, tactic, workspace, out), residual=residual)
        return out
    if residual is None:
        torch.ops.fastkernels.linear(x, weight, bias, constant_weight, out)
        return out
    product = torch.empty(shape, dtype=x.dtype, device=x.device)
    torch.ops.fastkernels.linear(x, weight, bias, constant_weight, product)
    return torch.add(product, residual, out=out)


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    constant_weight: bool = False,
    tactic: int | None = None,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = silu(x gate^T) * (x up^T) for the few tokens of a decode step; weight is gate's rows, then up's.

    x:      [num_tokens, in_size], up to LINEAR_MAX_TOKENS (16) tokens unless tactic is given, as ``linear``
            takes it
    weight: [2 * out_size, in_size], dtype of x; last dimension contiguous
    constant_weight, tactic, workspace: as of ``linear``; with a tactic out_size is a multiple of 8
    out:    [num_tokens, out_size], dtype of x, last dimension contiguous; allocated when None
    Returns out. Both products stay in fp32, and the result is rounded once, where ``silu_mul(linear(x,
    weight))`` rounds them too; bitwise repeatable; a token's result does not depend on the others (with a
    tactic: on those of other tiles); safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernels: csrc/gemm/linear.cuh, linear.cpp, matmul_sm90.cuh, matmul_sm90_few.cuh. Source: Shazeer 2020
    (SwiGLU).
    """
    op = "linear_silu_mul"
    x, weight = as_tensor(x), as_tensor(weight)
    check_dtype(op, "x", x, FLOAT_DTYPES)
    require(x.dim() == 2, f"{op}: x has shape {list(x.shape)}, but the op takes [num_tokens, in_size]")
    num_tokens, in_size = x.shape
    check_shape(op, "weight", weight, (None, in_size), "[2 * out_size, in_size], with the in_size of x")
    require(
        weight.shape[0] % 2 == 0, f"{op}: weight has {weight.shape[0]} rows; gate and up have as many each"
    )
    shape = (num_tokens, weight.shape[0] // 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else as_tensor(out)
    check_shape(op, "out", out, shape, "[num_tokens, out_size]")
    check_dtype(op, "weight", weight, (x.dtype,))
    check_dtype(op, "out", out, (x.dtype,))
    check_device(op, x=x, weight=weight, out=out)
    check_last_contiguous(op, x=x, weight=weight, out=out)
    require(
        num_tokens <= LINEAR_MAX_TOKENS or tactic is not None,
        f"{op}: num_tokens is {num_tokens}, but the op takes at most {LINEAR_MAX_TOKENS}",
    )
    if x.is_cuda:
        check_dtype(f"{op} on CUDA", "x", x, (torch.bfloat16, torch.float16))
        require(in_size % 8 == 0, f"{op} on CUDA: in_size is {in_size}; it must be a multiple of 8")
    if tactic is not None:
        matmul(op, x, weight, None, None, None, constant_weight, tactic, workspace, out, gated=True)
        return out
    torch.ops.fastkernels.linear_silu_mul(x, weight, constant_weight, out)
    return out


def matmul_workspace_bytes(num_sms: int) -> int:
    """The same in csrc/include/fastkernels/gemm.h."""
    return 16384 + num_sms * 2 * 128 * 256 * 4


def matmul_workspace(device: torch.device) -> torch.Tensor:
    """What the Hopper kernel keeps sums of parts in: uint8, zeros; every call leaves it fit for the next.
    Empty on other GPUs."""
    return torch.zeros(matmul_workspace_bytes_on(device), dtype=torch.uint8, device=device)


def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def matmul_workspace_bytes_on(device: torch.device) -> int:
    if not is_hopper(device):
        return 0
    return matmul_workspace_bytes(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _kept_workspace(device: torch.device, stream: int) -> torch.Tensor:
    return matmul_workspace(device)


def matmul(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant_weight: bool,
    tactic: int,
    workspace: torch.Tensor | None,
    out: torch.Tensor,
    *,
    x_zeros: torch.Tensor | None = None,
    weight_sums: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    gated: bool = False,
) -> None:
    """out = ((x - x_zeros) * x_scales) (weight * weight_scales)^T + bias + residual, for the op of that name.

    gated: weight has the rows of a gate, then those of up, and out = silu(gate) * up
    Types and scales: MatmulParams in csrc/include/fastkernels/gemm.h.
    """
    require(x.is_cuda, f"{op}: a tactic is given, but x is on {x.device}; tactics are of GPUs")
    require(
        -1 <= tactic < NUM_MATMUL_TACTICS,
        f"{op}: tactic is {tactic}, but the op takes 0 to {NUM_MATMUL_TACTICS - 1}, and -1",
    )
    out_size = out.shape[1]
    if gated and out_size % 8:
        raise ValueError(f"{op}: out_size is {out_size}; with a gate it must be a multiple of 8")
    if residual is not None and out_size % 8:
        raise ValueError(f"{op}: out_size is {out_size}; with a residual it must be a multiple of 8")
    if out_scale is not None and out_size % 16:
        raise ValueError(f"{op}: out_size is {out_size}; with out in bytes it must be a multiple of 16")
    if gated and x_scales is not None and x_scales.dim() == 2 and out_size % 128:
        raise ValueError(
            f"{op}: out_size is {out_size}; with a gate and scales of blocks it must be a multiple of 128"
        )
    if workspace is None and torch.cuda.is_current_stream_capturing():
        workspace = matmul_workspace(x.device)
    elif workspace is None:
        workspace = _kept_workspace(x.device, torch.cuda.current_stream(x.device).cuda_stream)
    torch.ops.fastkernels.matmul(
        *(x, weight, x_scales, weight_scales, x_zeros, weight_sums, bias, residual, out_scale),
        *(constant_weight, gated, tactic, workspace, out),
    )
