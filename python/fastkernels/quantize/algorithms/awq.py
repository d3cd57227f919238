"""AWQ: scale up the columns that matter before rounding, and their inputs down.

Columns times s, inputs over s: the product is the same, but a column with a larger s is rounded more finely
beside its group's others. s = mean|x|^strength, the strength searched by the error of the linear's output, by
the mean of x x^T. Clips, for every group of every row, are ``choose_grid``'s.
Source: Lin, Tang, Tang, Yang, Dang and Han 2023, AWQ, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkernels.quantize.algorithms.grid import choose_grid
from fastkernels.quantize.scheme import Scheme

STRENGTHS = tuple(i / 20 for i in range(20))


def awq_scales(
    weights: Sequence[Tensor],
    hessian: Tensor,
    mean_magnitude: Tensor,
    scheme: Scheme,
    tie: Callable[[Tensor], Tensor] = lambda s: s,
) -> tuple[Tensor, float]:
    """What the columns of ``weights``, which read one input, are multiplied by: fp32 [in_size], and the
    strength.

    tie: makes the scales of columns equal that must be
    """
    best, best_strength, best_error = torch.ones_like(mean_magnitude), 0.0, float("inf")
    for strength in STRENGTHS:
        scales = tie(mean_magnitude).clamp_min(1e-4) ** strength
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        error = 0.0
        for weight in weights:
            scaled = weight * scales
            rounded = choose_grid(scheme, scaled, search=False).round(scaled) / scales
            error += output_error(rounded - weight, hessian)
        if error < best_error:
            best, best_strength, best_error = scales, strength, error
    return best, best_strength


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """The mean square of what an error of the weight, [out_size, in_size], does to the output, summed over
    it.
    """
    return ((difference @ hessian) * difference).sum().item()
