"""The values that a weight may take once its scales are chosen, and the choice of scales by squared error.

Every algorithm works on the same two things: ``choose_grid`` picks the scales, ``Grid.round`` rounds any
columns to them. What differs between int4, int8, e4m3 and e2m1 is in this file alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkernels.ops.quantized_gemm import row_sums
from fastkernels.quantize.fp8 import LARGEST, to_e4m3
from fastkernels.quantize.scheme import Scheme, divide, pack_nibbles, to_e2m1, usable

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_E4M3 = 2.0**-9
_LARGEST_CODE = {"int8": 127.0, "int4": 7.5, "e4m3": LARGEST, "e2m1": 6.0}

# Shares of the largest magnitude that a scale is tried for. e2m1 also tries 3/2, which maps the largest to 4
# instead of 6: the gap below 6 is the widest.
SHRINKS: tuple[float, ...] = tuple(1 - 0.025 * i for i in range(20))
_E2M1_SHRINKS = (1.5, 1.4, 1.3, 1.2, 1.1, *SHRINKS[:14])
_POWERS_OF_TWO: tuple[float, ...] = (2.0, 1.0, 0.5)
_ENDS = (1.0, 0.93, 0.86, 0.78, 0.7)  # of both ends on their own, where there is a zero point


@dataclass(frozen=True)
class Grid:
    """stored: the scheme's parts but ``packed``
    step:   fp32 [block rows, blocks], what a code of 1 stands for
    zero:   fp32 like step, the code that stands for 0; None where 0 does (int4's codes are then -8 to 7)
    """

    scheme: Scheme
    in_size: int
    stored: dict[str, Tensor]
    step: Tensor
    zero: Tensor | None = None

    def round(self, weight: Tensor, columns: Tensor | None = None) -> Tensor:
        """weight fp32 [out_size, in_size], or [out_size, len(columns)] where it is these columns -> the
        nearest values of the grid, fp32."""
        step = self._spread(self.step, weight, columns)
        zero = None if self.zero is None else self._spread(self.zero, weight, columns)
        return nearest(weight / step, self.scheme.weight_type, zero) * step

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """The scheme's parts of a weight, rounded to the grid if it does not lie on it."""
        step = self._spread(self.step, weight, None)
        units = weight / step
        zero = None if self.zero is None else self._spread(self.zero, weight, None)
        kind = self.scheme.weight_type
        if kind == "e4m3":
            packed = to_e4m3(units)
        elif kind == "e2m1":
            packed = pack_nibbles(to_e2m1(units))
        else:
            codes = nearest(units, kind, zero)
            packed = (
                codes.to(torch.int8)
                if kind == "int8"
                else pack_nibbles(codes + (8 if zero is None else zero))
            )
        parts = {"packed": packed.contiguous(), **self.stored}
        if self.scheme.activation == "int8-zeros":
            parts["sums"] = row_sums(parts["packed"])
        return parts

    def _spread(self, by_block: Tensor, weight: Tensor, columns: Tensor | None) -> Tensor:
        rows, size = self.scheme.block(self.in_size)
        if columns is not None:
            by_block = by_block[:, columns // size]
        elif by_block.shape[1] > 1:
            by_block = by_block.repeat_interleave(size, 1)
        return by_block.repeat_interleave(rows, 0)[: weight.shape[0]] if rows > 1 else by_block


def nearest(units: Tensor, weight_type: str, zero: Tensor | None = None) -> Tensor:
    """Values in units of their scale -> the nearest that the type has, as fp32."""
    if weight_type == "e4m3":
        return to_e4m3(units).float()
    if weight_type == "int8":
        return units.round().clamp_(-127, 127)
    if weight_type == "int4":
        if zero is None:
            return units.round().clamp_(-8, 7)
        return (units + zero).round_().clamp_(0, 15) - zero
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=units.device)
    return table[to_e2m1(units).int()]


def choose_grid(
    scheme: Scheme,
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    search: bool = True,
    largest: float | None = None,
) -> Grid:
    """Scales for weight fp32 [out_size, in_size].

    hessian:    [in_size, in_size], the mean of x x^T over the inputs: a block's error is then that of the
                output, as if no other block had one; None: the squared error of the weights
    search:     take the scale of least error for every block; otherwise that of the largest magnitude
    largest:    of all weights that share the scheme's scale for all (nvfp4's); None: this weight's
    """
    scheme.checked(weight)
    in_size = weight.shape[1]
    rows, size = scheme.block(in_size)
    whole = pad(weight, (0, 0, 0, -len(weight) % rows)).unflatten(1, (-1, size)).unflatten(0, (-1, rows))
    low, high = whole.amin((1, 3)), whole.amax((1, 3))  # [block rows, blocks]
    shared = weight.abs().amax().item() if largest is None else largest
    best: Grid | None = None
    if not search:
        return _grid(scheme, in_size, low, high, shared)
    weighting = None if hessian is None else _diagonal_blocks(hessian, size)
    best_error = torch.empty(0)
    for below, above in _shrinks(scheme):
        grid = _grid(scheme, in_size, low * below, high * above, shared)
        rounded = grid.round(weight)
        rounded = (
            pad(rounded, (0, 0, 0, -len(weight) % rows)).unflatten(1, (-1, size)).unflatten(0, (-1, rows))
        )
        difference = rounded - whole
        if weighting is None:
            error = difference.square_().sum((1, 3))
        else:
            by_block = difference.flatten(0, 1).transpose(0, 1)  # [blocks, rows, size]
            error = (by_block @ weighting * by_block).sum(2).T.unflatten(0, (-1, rows)).sum(1)
        if best is None:
            best, best_error = grid, error
            continue
        better = error < best_error
        best = _merged(best, grid, better)
        best_error = torch.where(better, error, best_error)
    assert best is not None
    return best


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[n * size, n * size] -> [n, size, size]"""
    return (
        matrix.unflatten(0, (-1, size))
        .unflatten(2, (-1, size))
        .diagonal(0, 0, 2)
        .permute(2, 0, 1)
        .contiguous()
    )


def _shrinks(scheme: Scheme) -> Sequence[tuple[float, float]]:
    """Shares of the smallest and of the largest weight of a block that its scale is tried for."""
    parts = scheme.parts(128, 1280)
    if "zeros" in parts:
        return list(itertools.product(_ENDS, _ENDS))
    if parts["scales"].dtype == "uint8":
        shares = _POWERS_OF_TWO
    else:
        shares = _E2M1_SHRINKS if scheme.weight_type == "e2m1" else SHRINKS
    return [(share, share) for share in shares]


def _merged(grid: Grid, other: Grid, where: Tensor) -> Grid:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != where.shape:
            return a  # one for all blocks
        if a.dtype == torch.float8_e4m3fn:
            return torch.where(where, b.view(torch.uint8), a.view(torch.uint8)).view(a.dtype)
        return torch.where(where, b, a)

    zero = None if grid.zero is None or other.zero is None else pick(grid.zero, other.zero)
    stored = {name: pick(part, other.stored[name]) for name, part in grid.stored.items()}
    return Grid(grid.scheme, grid.in_size, stored, pick(grid.step, other.step), zero)


def _grid(scheme: Scheme, in_size: int, low: Tensor, high: Tensor, largest: float) -> Grid:
    """For blocks whose weights lie from low to high, scales as the scheme stores them."""
    specs = scheme.parts(len(low) * scheme.block(in_size)[0], in_size)
    magnitude = torch.maximum(low.abs(), high.abs())
    if "zeros" in specs:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = usable(divide(high - low, 15).to(specs["scales"].torch_dtype))
        zeros = (-low / scales.float()).round_().clamp_(0, 15)
        return Grid(
            scheme, in_size, {"scales": scales, "zeros": zeros.to(torch.uint8)}, scales.float(), zeros
        )
    raw = divide(magnitude, _LARGEST_CODE[scheme.weight_type])
    if specs["scales"].dtype == "uint8":
        # The smallest power of two that leaves the largest magnitude at most 7, which becomes 6.
        mantissa, exponent = torch.frexp(usable(magnitude))
        exponent = (exponent - 3 + (mantissa > 0.875)).clamp_(-127, 127)
        step = torch.ldexp(torch.ones_like(raw), exponent)
        return Grid(scheme, in_size, {"scales": (exponent + 127).to(torch.uint8)}, step)
    if "global_scale" in specs:
        global_scale = usable(divide(torch.tensor(largest, device=raw.device), 6.0 * LARGEST))
        # An e4m3 scale of 0 would leave nothing of a block: the smallest there is in its place.
        scales = to_e4m3((raw / global_scale).clamp_min(_SMALLEST_E4M3))
        stored = {"scales": scales, "global_scale": global_scale.view(1)}
        return Grid(scheme, in_size, stored, scales.float() * global_scale)
    scales = usable(raw.to(specs["scales"].torch_dtype))
    return Grid(scheme, in_size, {"scales": scales}, scales.float())
