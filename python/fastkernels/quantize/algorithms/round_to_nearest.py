"""Round to nearest: the base line, with scales from the largest magnitudes or, searched, of the least error.

A scale below the one that the largest weight asks for clips that weight and rounds all others more finely;
which is better depends on the block, so every block is tried with a few. What a squared error weighs is the
mean square of the column's input where calibration gave it.
"""

from __future__ import annotations

from torch import Tensor

from fastkernels.quantize.algorithms.grid import Grid, choose_grid
from fastkernels.quantize.scheme import Scheme


def round_to_nearest(
    scheme: Scheme,
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    search: bool = True,
    largest: float | None = None,
) -> tuple[Grid, Tensor]:
    """The grid and weight fp32 [out_size, in_size] on it; arguments as of ``choose_grid``."""
    grid = choose_grid(scheme, weight, hessian, search=search, largest=largest)
    return grid, grid.round(weight)
