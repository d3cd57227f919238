"""From values seen to the range that codes are spread over: min-max, percentile, least squared error,
entropy.

Values come as rows, each of which gets a range: one row for a whole tensor, a row a channel, token or group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastkernels.quantize.algorithms.grid import nearest
from fastkernels.quantize.scheme import QuantizationError, divide, usable

Estimator = Literal["min-max", "percentile", "mse", "entropy"]
ESTIMATORS: tuple[Estimator, ...] = ("min-max", "percentile", "mse", "entropy")
PERCENTILE = 99.99
_SHRINKS = tuple(1 - 0.02 * i for i in range(40))
_BINS, _LEVELS = 2048, 128


def estimate_range(
    values: Tensor, estimator: Estimator = "min-max", *, weight_type: str = "int8", symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """values [rows, count] -> low and high, fp32 [rows] each; symmetric: low is -high.

    percentile: PERCENTILE of the values lie within
    mse:     of some shares of min-max, the one whose codes lie nearest to the values
    entropy: the one whose histogram, cut and put into 128 bins, tells least from the values' own
    Raises QuantizationError for no values, NaN or infinity, and an unknown estimator.
    """
    values = values.float()
    if values.dim() != 2 or values.shape[1] == 0 or not torch.isfinite(values).all():
        raise QuantizationError(f"a range takes finite values [rows, count]; these are {list(values.shape)}")
    low, high = values.amin(1), values.amax(1)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    if estimator == "min-max":
        return low, high
    if estimator == "percentile":
        return _percentile(values, symmetric)
    if estimator == "mse":
        return _least_squares(values, low, high, weight_type, symmetric)
    if estimator == "entropy":
        shares = torch.stack([_entropy_share(row) for row in values])
        return low * shares, high * shares
    raise QuantizationError(f"no range estimator is called {estimator!r}; there are {', '.join(ESTIMATORS)}")


def scale_of(high: Tensor, weight_type: str) -> Tensor:
    """Of a symmetric range: what a code of 1 stands for."""
    return usable(divide(high, 448.0 if weight_type == "e4m3" else 127.0))


def _percentile(values: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    count = values.shape[1]
    outside = min(round(count * (1 - PERCENTILE / 100)), count - 1)
    if symmetric:
        high = values.abs().sort(1).values[:, count - 1 - outside]
        return -high, high
    ordered = values.sort(1).values
    half = outside // 2
    return ordered[:, half], ordered[:, count - 1 - half]


def _least_squares(
    values: Tensor, low: Tensor, high: Tensor, weight_type: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    best, best_error = torch.ones_like(high), torch.full_like(high, float("inf"))
    for share in _SHRINKS:
        if symmetric:
            step = scale_of(high * share, weight_type)[:, None]
            rounded = nearest(values / step, weight_type) * step
        else:
            step = usable(divide((high - low) * share, 255))[:, None]
            zero = (-low[:, None] * share / step).round()
            rounded = ((values / step + zero).round().clamp(0, 255) - zero) * step
        error = (rounded - values).square().sum(1)
        best = torch.where(error < best_error, share, best)
        best_error = torch.minimum(error, best_error)
    return low * best, high * best


def _entropy_share(row: Tensor) -> Tensor:
    """Source: Migacz 2017, 8-bit Inference with TensorRT."""
    magnitudes = row.abs()
    largest = magnitudes.amax()
    if largest == 0:
        return torch.ones_like(largest)
    histogram = torch.histc(magnitudes, _BINS, 0, largest.item())
    best, best_divergence = _BINS, float("inf")
    for kept in range(_LEVELS, _BINS + 1, 16):
        reference = histogram[:kept].clone()
        inside = reference > 0
        reference[-1] += histogram[kept:].sum()  # what is cut off lands on the last code
        level = (torch.arange(kept, device=row.device) * _LEVELS) // kept
        filled = torch.zeros(_LEVELS, device=row.device)
        mass = filled.index_add(0, level, histogram[:kept])
        count = filled.index_add(0, level, inside.float())
        quantised = (mass / count.clamp_min(1))[level] * inside
        p, q = reference / reference.sum(), quantised / quantised.sum().clamp_min(1e-30)
        here = p > 0
        divergence = (p[here] * (p[here] / q[here].clamp_min(1e-10)).log()).sum().item()
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return torch.tensor(best / _BINS, device=row.device)
