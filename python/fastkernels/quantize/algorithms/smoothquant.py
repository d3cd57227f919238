"""SmoothQuant: move what is hard to round from the activations into the weights.

Activations have columns many times larger than the others, and a token shares one scale. Inputs over s,
columns of the weight times s, with s = max|x|^strength / max|w|^(1 - strength): the product is the same, and
both sides are easier to round. The strength is searched, by the error of the output with both sides rounded.
Source: Xiao, Lin, Seznec, Wu, Demouth and Han 2022, SmoothQuant, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkernels.ops.reference import round_activation
from fastkernels.quantize.algorithms.grid import choose_grid
from fastkernels.quantize.scheme import Scheme

STRENGTHS = tuple(i / 10 for i in range(1, 10))


def smooth_scales(
    weights: Sequence[Tensor],
    largest: Tensor,
    sample: Tensor,
    scheme: Scheme,
    tie: Callable[[Tensor], Tensor] = lambda s: s,
) -> tuple[Tensor, float]:
    """What the columns of ``weights``, which read one input, are multiplied by: fp32 [in_size], and the
    strength, 0 where it is best to leave them alone.

    largest: [in_size], of the input's magnitudes; sample: some inputs, [rows, in_size]
    tie:     makes the scales of columns equal that must be
    """
    by_weight = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(1e-5)
    candidates = [(torch.ones_like(largest), 0.0)]
    for strength in STRENGTHS:
        scales = tie(largest).clamp_min(1e-5) ** strength / tie(by_weight) ** (1 - strength)
        candidates.append((scales / (scales.amax() * scales.amin()).sqrt(), strength))
    exact = [sample @ weight.T for weight in weights]
    best, best_error = candidates[0], float("inf")
    for scales, strength in candidates:
        inputs = round_activation(sample / scales, scheme.activation, torch.float32)
        error = 0.0
        for weight, output in zip(weights, exact, strict=True):
            scaled = weight * scales
            rounded = choose_grid(scheme, scaled, search=False).round(scaled)
            error += (inputs @ rounded.T - output).square().sum().item()
        if error < best_error:
            best, best_error = (scales, strength), error
    return best
