"""Matrix products with a weight of 4 or 8 bits that was repacked for the GPU's tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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

register_mutating_fake("weight_only_linear")

# In the order of PackedFormat in csrc/include/fastkernels/gemm.h; the bytes of a unit's scales
PACKED_FORMATS: dict[str, int] = {
    "int4-g128": 32,
    "int4-g64": 64,
    "int4-g32": 128,
    "int4-g128-zeros": 48,
    "int4-g64-zeros": 96,
    "int4-g32-zeros": 192,
    "int8": 0,
    "e4m3": 0,
    "e4m3-block": 16,
    "nvfp4": 128,
    "mxfp4": 64,
    "int4-e4m3-g128": 32,
    "int4-e4m3-g64": 64,
    "int4-e4m3-g32": 128,
}
# Tokens of a tile, and blocks that share what is no whole round: the tactics of the kernel for more tokens,
# after those of the one for few, in the order of kWeightOnlyTiles in csrc/gemm/weight_only_sm90.h
WEIGHT_ONLY_TILES = tuple((tokens, blocks) for tokens in (16, 32, 64, 128, 256) for blocks in (1, 2, 3))
WEIGHT_ONLY_FEW_TACTICS = 2
WEIGHT_ONLY_TACTICS = WEIGHT_ONLY_FEW_TACTICS + len(WEIGHT_ONLY_TILES)
ROWS, SIZE = 16, 128  # of a unit
MAX_IN_SIZE = 1 << 17
_CHUNK = 1 << 24  # elements that are repacked at once
_ONE_E8M0 = 245  # the code of the row's largest MXFP4 scale
_E2M1_BITS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))  # of a half: sign, magnitude


@dataclass(frozen=True)
class RepackedWeight:
    """What ``repack_for_cuda`` makes; csrc/gemm/weight_only.h draws it.

    packed:      uint8 [ceil(out_size / 16), ceil(in_size / 128), unit_bytes(packed_format)]
    row_factors: fp32 [out_size]
    permutation: int64 [in_size], or None: column i of the weight is for column permutation[i] of x
    """

    packed: Tensor
    row_factors: Tensor
    packed_format: str
    out_size: int
    in_size: int
    permutation: Tensor | None = None


def unit_bytes(packed_format: str) -> int:
    data = 2048 if packed_format.startswith(("int8", "e4m3")) else 1024
    return data + PACKED_FORMATS[packed_format]


def takes_e4m3(packed_format: str) -> bool:
    """Whether the products of a format take x in e4m3 with a scale a token."""
    return packed_format.startswith("int4-e4m3")


def has_tile(packed_format: str, tokens: int) -> bool:
    """As has_weight_tile of csrc/gemm/weight_only_sm90.h: whether there are tiles of so many tokens."""
    return tokens <= 128 or not packed_format.startswith(("int8", "e4m3", "int4-e4m3-g64", "int4-e4m3-g32"))


def packed_shape(packed_format: str, out_size: int, in_size: int) -> tuple[int, int, int]:
    return -(-out_size // ROWS), -(-in_size // SIZE), unit_bytes(packed_format)


def packed_format_of(
    weight_type: str,
    block: tuple[int, int],
    in_size: int,
    has_zeros: bool,
    scale_dtype: torch.dtype,
    activation: str | None = None,
) -> str:
    """The layout for a weight that ``quantized_linear`` takes. Raises ValueError for one that has none."""
    op, (rows, size) = "repack_for_cuda", block
    whole = rows == 1 and size >= in_size
    if activation is not None and (activation != "e4m3" or weight_type != "int4" or has_zeros):
        raise ValueError(
            f"{op}: weight is {weight_type}{' with zeros' if has_zeros else ''} for activations in "
            f"{activation}, but the op takes int4 without zeros for e4m3"
        )
    if weight_type == "int4" and (whole or (rows == 1 and (size in (32, 64) or size % 128 == 0))):
        group = 128 if whole else min(size, 128)
        return f"int4-{'e4m3-' if activation else ''}g{group}{'-zeros' if has_zeros else ''}"
    if weight_type == "int8" and whole:
        return "int8"
    if weight_type == "e4m3" and whole:
        return "e4m3"
    if weight_type == "e4m3" and block == (128, 128):
        return "e4m3-block"
    if weight_type == "e2m1" and block == (1, 16) and scale_dtype == torch.float8_e4m3fn:
        return "nvfp4"
    if weight_type == "e2m1" and block == (1, 32) and scale_dtype == torch.uint8:
        return "mxfp4"
    raise ValueError(
        f"{op}: weight is {weight_type} with blocks of {rows} x {size} and {scale_dtype} scales, but the op "
        "takes int4 with a scale a row or for 32, 64 or a multiple of 128 neighbours, int8 with a scale a "
        "row, e4m3 with a scale a row or for 128 x 128, and e2m1 with an e4m3 scale for 16 or an exponent "
        "for 32"
    )


def repack_for_cuda(
    weight: Tensor,
    scales: Tensor,
    *,
    weight_type: str,
    block: tuple[int, int] | None = None,
    zeros: Tensor | None = None,
    global_scale: Tensor | None = None,
    activation: str | None = None,
    permutation: Tensor | None = None,
) -> RepackedWeight:
    """The weight in the order that the GPU's kernel streams it; arguments as ``quantized_linear`` takes them.

    activation: None, or "e4m3" with int4 without zeros: for x in e4m3 with a scale a token
    permutation: int64 [in_size]: column i of the weight is for column permutation[i] of x (activation order)
    Every value stays what it is, but scales of groups of int4 are rounded to 11 bits (those in bf16 and fp16
    have no more), and to multiples of 2^-25 of the row's largest; MXFP4 blocks below 2^-244 of the row's
    largest become zero. Runs where the weight is, once, at load; it waits for the GPU.
    Raises ValueError for a format that the kernel has not, and for NaN or infinity in scales or weights.
    """
    codes_a_byte = 2 if weight_type in ("int4", "e2m1") else 1
    out_size, in_size = weight.shape[0], weight.shape[1] * codes_a_byte
    rows, size = block or (1, in_size)
    packed_format = packed_format_of(
        weight_type, (rows, size), in_size, zeros is not None, scales.dtype, activation
    )
    bad = scales == 255 if scales.dtype == torch.uint8 else ~torch.isfinite(scales.float())
    bad = bad.any() | (weight_type == "e4m3" and (weight.view(torch.uint8) & 127 == 127).any())
    require(
        not bool(bad), "repack_for_cuda: weight or scales hold NaN or infinity, but the op takes finite ones"
    )

    step = max(_CHUNK // max(in_size, 1) // 128, 1) * 128  # rows at once: what the copies take stays small
    packed = torch.empty(
        packed_shape(packed_format, out_size, in_size), dtype=torch.uint8, device=weight.device
    )
    row_factors = torch.empty(out_size, dtype=torch.float32, device=weight.device)
    whole = 1.0 if global_scale is None else global_scale.double()
    for begin in range(0, out_size, step):
        part = slice(begin, begin + step)
        some = weight[part].view(torch.uint8)
        of_scales = scales[begin // rows : -(-(begin + step) // rows)]
        if weight_type == "int4":
            data, factors = _int4(
                some, of_scales, None if zeros is None else zeros[part], size, packed_format
            )
        elif weight_type == "e2m1":
            data, factors = _e2m1(some, of_scales)
        else:
            data, factors = _bytes(some, of_scales, packed_format)
        packed[begin // ROWS : begin // ROWS + len(data)] = data
        row_factors[part] = (factors * whole).float()
    return RepackedWeight(packed, row_factors, packed_format, out_size, in_size, permutation)


def weight_only_linear(
    x: Tensor,
    weight: RepackedWeight,
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    tactic: int = 0,
    constant_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias on a GPU, W in 4 or 8 bits and x as it is, or of int4 in e4m3: few tokens at the speed
    of reading W, many on Hopper at that of its tensor cores.

    x:      [num_tokens, in_size] bf16 | fp16; last dimension contiguous, rows begin on 16 bytes, in_size a
            multiple of 8 up to 131072. Of a weight repacked for "e4m3": float8_e4m3fn, in_size a multiple of
            16
    x_scales: of e4m3: fp32 [num_tokens], contiguous, as ``quantize`` per token gives them; x is x * x_scales
    weight: of ``repack_for_cuda``; with a permutation x is gathered first, by torch
    bias:   [out_size], dtype of out, or None
    tactic: 0: chosen by shape; 1 to WEIGHT_ONLY_TACTICS: how many blocks share K in the kernels for few
            tokens, then WEIGHT_ONLY_TILES; all but 1 are Hopper's. Tiles of 256 tokens are for
            formats that ``has_tile`` names, and of them int4 with x as it is multiplies weights by their
            scales before the product, rounded to the dtype of x
    constant_weight: promises that no kernel still running in the stream writes the weight; on Hopper its
            first units are then read while the kernel before this one ends
    out:    [num_tokens, out_size], dtype of x, or with e4m3 bf16 | fp16; last dimension contiguous; allocated
            when None, with e4m3 in the dtype of bias, or bf16
    Returns out. Weights are exact in registers but as said above, sums in fp32, of e4m3 in tiles with about
    14 bits within a group, rounded once; up to 4 tokens times int4 or int8 x, as it is, is rounded to 16 bits
    of the largest of 128 neighbours, and to NaN where that is not finite; bitwise repeatable; with a given
    tactic a token's result does not depend on the others, as long as there are 1 to 4, 5 to 8 (of e4m3 1 to
    8), 9 to 16, 17 to 32 or more (few), or no more than fill a tile; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride, alignment or device it does not take, naming what it does.
    Kernels: csrc/gemm/weight_only_few.cuh, weight_only.cuh, weight_only_sm90.cuh
    """
    op = "weight_only_linear"
    x = as_tensor(x)
    in_size, out_size = weight.in_size, weight.out_size
    require(
        x.is_cuda, f"{op}: x is on {x.device}, but the op runs on CUDA only; quantized_linear on the CPU too"
    )
    rounded = takes_e4m3(weight.packed_format)
    half = (torch.bfloat16, torch.float16)
    check_dtype(op, "x", x, (torch.float8_e4m3fn,) if rounded else half)
    check_shape(op, "x", x, (None, in_size), f"[num_tokens, {in_size}], by the weight")
    multiple = 16 if rounded else 8
    require(
        in_size % multiple == 0 and 0 < in_size <= MAX_IN_SIZE,
        f"{op}: in_size is {in_size}, but the op takes multiples of {multiple} up to {MAX_IN_SIZE}",
    )
    shape = (x.shape[0], out_size)
    require(
        (x_scales is not None) == rounded,
        f"{op}: x_scales go with x in e4m3, and with weights repacked for it",
    )
    if x_scales is not None:
        x_scales = as_tensor(x_scales)
        check_dtype(op, "x_scales", x_scales, (torch.float32,))
        check_shape(op, "x_scales", x_scales, shape[:1], "[num_tokens]")
        check_contiguous(op, x_scales=x_scales)
    if weight.permutation is not None:
        x = (
            x.view(torch.uint8).index_select(1, weight.permutation).view(x.dtype)
            if rounded
            else (x.index_select(1, weight.permutation))
        )
    bias = None if bias is None else as_tensor(bias)
    if out is None:
        dtype = x.dtype if not rounded else torch.bfloat16 if bias is None else bias.dtype
        out = torch.empty(shape, dtype=dtype, device=x.device)
    out = as_tensor(out)
    check_shape(op, "out", out, shape, "[num_tokens, out_size]")
    check_dtype(op, "out", out, half if rounded else (x.dtype,))
    if bias is not None:
        check_shape(op, "bias", bias, (out_size,), "[out_size]")
        check_dtype(op, "bias", bias, (out.dtype,))
    check_device(
        op, x=x, x_scales=x_scales, packed=weight.packed, row_factors=weight.row_factors, bias=bias, out=out
    )
    check_last_contiguous(op, x=x, bias=bias, out=out)
    check_contiguous(op, packed=weight.packed, row_factors=weight.row_factors)
    require(
        0 <= tactic <= WEIGHT_ONLY_TACTICS,
        f"{op}: tactic is {tactic}, but there are 1 to {WEIGHT_ONLY_TACTICS}, and 0 chooses",
    )
    torch.ops.fastkernels.weight_only_linear(
        x,
        x_scales,
        weight.packed,
        weight.row_factors,
        bias,
        list(PACKED_FORMATS).index(weight.packed_format),
        tactic,
        constant_weight,
        out,
    )
    return out


# --- The units' bytes: row 8 half + g; k is 64 u + 32 s + 8 t + 4 j + 2 p + low of int4,
# 64 u + 32 s + 16 h + 4 t + i of int4 for e4m3, 64 u + 16 t + 8 p + 2 j + low of e2m1,
# 32 u + 8 t + 4 j + 2 p + low of 8 bits --------------------------------------------------------------------


def _whole(values: Tensor, size: int, fill: int | float = 0) -> Tensor:
    """Rows to a multiple of 16, and ``size`` columns: [tiles, 2 (half), 8 (g), size]."""
    rows, columns = values.shape
    return pad(values, (0, size - columns, 0, -rows % ROWS), value=fill).unflatten(0, (-1, 2, 8))


def _chunks(in_size: int) -> int:
    return -(-in_size // SIZE)


def _codes(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _as_pieces(values: Tensor) -> Tensor:
    """[tiles, chunk, u, 8 (g), 4 (t), ...] -> [tiles, chunk, bytes]; the lane of g, t is at t ^ g / 2."""
    lane = torch.arange(32, device=values.device)
    place = lane ^ lane // 8  # its own inverse
    by_lane = values.flatten(3, 4).flatten(4).contiguous().view(torch.uint8)
    return by_lane[:, :, :, place].flatten(2)


def _as_bytes(values: Tensor) -> Tensor:
    """[tiles, chunk, ...] -> [tiles, chunk, bytes]"""
    return values.contiguous().view(torch.uint8).flatten(2)


def _int4(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, size: int, packed_format: str
) -> tuple[Tensor, Tensor]:
    codes, scales = _codes(packed), scales.double()
    in_size = codes.shape[1]
    whole, group = _chunks(in_size) * SIZE, int(packed_format.split("-g")[1].removesuffix("-zeros"))
    if size >= in_size:  # a scale a row: groups of 1
        factors, scales, times = scales[:, 0], torch.ones_like(scales), whole // group
    else:
        factors = torch.exp2(torch.frexp(scales.abs().amax(1).clamp_min(2.0**-126))[1].double())
        scales, times = scales / factors[:, None], size // group
    groups = scales.half().repeat_interleave(times, 1)
    points = (
        torch.full_like(groups, 8, dtype=torch.uint8) if zeros is None else zeros.repeat_interleave(times, 1)
    )
    points = pad(points, (0, whole // group - points.shape[1]), value=8)
    full = points.repeat_interleave(
        group, 1
    )  # what is past the end of K stays at the zero point: a weight of 0
    full[:, :in_size] = codes
    if takes_e4m3(packed_format):
        signed = torch.where(full < 8, (7 - full) * 2 + 1, (full - 8) * 2)
        split = _whole(signed, whole).unflatten(3, (-1, 2, 2, 2, 4, 4))  # chunk u s h t i
        nibbles = split.permute(0, 3, 4, 2, 7, 5, 6, 8, 1)  # tiles chunk u g t s h i half
        pieces = [_as_bytes(nibbles[..., 0] | nibbles[..., 1] << 4)]
    else:
        split = _whole(full, whole, 8).unflatten(3, (-1, 2, 2, 4, 2, 2, 2))  # chunk u s t j p low
        by_lane = split.permute(0, 3, 4, 2, 6, 7, 5, 9, 8, 1)  # tiles chunk u g t j s low p half
        nibbles = by_lane.flatten(7).unflatten(7, (4, 2))
        pieces = [_as_pieces(nibbles[..., 0] | nibbles[..., 1] << 4)]
    of_groups = [groups] if zeros is None else [groups, points]
    for values in of_groups:  # [tiles, half, g, chunk, group] -> [tiles, chunk, group, g, half]
        by_row = _whole(values, whole // group).unflatten(3, (-1, SIZE // group))
        pieces.append(_as_bytes(by_row.permute(0, 3, 4, 2, 1)))
    return torch.cat(pieces, 2), factors


def _e2m1(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes = _codes(packed)
    in_size = codes.shape[1]
    whole, is_nvfp4 = _chunks(in_size) * SIZE, scales.dtype == torch.float8_e4m3fn
    if is_nvfp4:
        given = scales.view(torch.uint8)
        bits = given & 127
        spread = (given >> 4 & 8).repeat_interleave(16, 1)  # a scale's sign goes to its weights
        codes = torch.where((bits == 0).repeat_interleave(16, 1), 0, codes ^ spread)
        below = torch.tensor([8, 8, 16, 20, 24, 26, 28, 30], dtype=torch.uint8, device=codes.device)
        bits = torch.where(bits < 8, below[(bits & 7).long()], bits + 24)
        factors = torch.ones(len(codes), dtype=torch.float64, device=codes.device)
        by_block = _whole(bits, whole // 16).unflatten(3, (-1, 2, 4)).permute(0, 3, 4, 2, 5, 1)
    else:
        largest = scales.amax(1, keepdim=True)
        bits = (_ONE_E8M0 - (largest.int() - scales.int())).clamp_min(0).to(torch.uint8)
        factors = torch.exp2(largest[:, 0].double() - 127)
        by_block = _whole(bits, whole // 32).unflatten(3, (-1, 2, 2)).permute(0, 3, 4, 2, 5, 1)
    split = _whole(codes, whole).unflatten(3, (-1, 2, 4, 2, 4, 2))  # chunk u t p j low
    split = split.permute(
        0, 3, 4, 2, 5, 7, 8, 6, 1
    )  # tiles chunk u g t j low p half: pair 2 p + half of a half word
    table = torch.tensor(
        [
            [sum(1 << bit for place, bit in enumerate(bits) if code >> (3 - place) & 1) for code in range(16)]
            for bits in _E2M1_BITS
        ],
        dtype=torch.int32,
        device=codes.device,
    ).view(2, 2, 16)
    words = torch.zeros(split.shape[:-2], dtype=torch.int32, device=codes.device)
    for p in range(2):
        for half in range(2):
            words |= table[p, half][split[..., p, half].int()]
    pieces = [_as_pieces(words.to(torch.uint16)), _as_bytes(by_block)]
    return torch.cat(pieces, 2), factors


def _bytes(codes: Tensor, scales: Tensor, packed_format: str) -> tuple[Tensor, Tensor]:
    rows, in_size = codes.shape
    split = _whole(codes, _chunks(in_size) * SIZE).unflatten(3, (-1, 4, 4, 2, 2, 2))  # chunk u t j p low
    data = _as_pieces(split.permute(0, 3, 4, 2, 5, 6, 7, 8, 1))  # chunk u g t j p low half
    if packed_format != "e4m3-block":
        return data, scales[:, 0].double()
    by_tile = scales.float().repeat_interleave(128 // ROWS, 0)[: len(data)]
    ones = torch.ones(rows, dtype=torch.float64, device=codes.device)
    return torch.cat((data, _as_bytes(pad(by_tile[..., None], (0, 3)))), 2), ones
