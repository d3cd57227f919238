"""--target-bits: which linears are worth more bits, by what coarse ones cost the hidden states.

Every group of linears that read one input is rounded alone, and the error of its layer's output measured.
Then the groups with the most error a bit become fine until the bits are spent.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastkernels.quantize.algorithms.round_to_nearest import round_to_nearest
from fastkernels.quantize.decoder_layers import GROUPS, DecoderLayers, round_inputs
from fastkernels.quantize.methods import Method, Shape
from fastkernels.quantize.scheme import QuantizationError


def measure_sensitivity(
    layers: DecoderLayers,
    index: int,
    parameters: Mapping[str, Tensor],
    hidden: Tensor,
    coarse: Mapping[str, Method],
) -> dict[str, float]:
    """By group's first linear, full name: the mean square error of the layer's output, which the layers
    behind add to and the last norm divides by the same for all.

    hidden: what the layer reads; coarse: methods by full name
    """
    exact = layers.run(layers.layer(index, parameters), hidden)
    found = {}
    for group in GROUPS:
        prefix = f"model.layers.{index}."
        if prefix + group.name not in coarse:
            continue
        method = coarse[prefix + group.name]
        changed = dict(parameters)
        for linear in group.linears:
            changed[f"{linear}.weight"] = round_to_nearest(method.scheme, parameters[f"{linear}.weight"])[1]
        layer = layers.layer(index, changed)
        for linear in group.linears:
            round_inputs(layer.get_submodule(linear), method.scheme)
        difference = layers.run(layer, hidden).float() - exact.float()
        found[prefix + group.name] = difference.square().mean().item()
    return found


def spend_bits(
    sensitivity: Mapping[str, float],
    coarse: Mapping[str, Method],
    fine: Mapping[str, Method],
    shapes: Mapping[str, Shape],
    target_bits: float,
) -> dict[str, Method]:
    """The methods, coarse or fine, whose weights have at most target_bits on average.

    Raises QuantizationError for a target below all coarse.
    """
    sizes = {name: shapes[name][0] * shapes[name][1] for name in coarse}
    total = sum(sizes.values())
    spent = sum(coarse[name].bits(shapes[name]) * sizes[name] for name in coarse)
    if spent > target_bits * total:
        raise QuantizationError(
            f"target_bits is {target_bits:g}; the coarsest there is takes {spent / total:.3f} bits a weight"
        )
    chosen = dict(coarse)
    worth = {}
    for name, error in sensitivity.items():
        prefix, members = _members(name)
        extra = sum(
            (fine[prefix + m].bits(shapes[prefix + m]) - coarse[prefix + m].bits(shapes[prefix + m]))
            * sizes[prefix + m]
            for m in members
        )
        if extra > 0:
            worth[name] = (error / extra, extra)
    for name, (_, extra) in sorted(worth.items(), key=lambda item: -item[1][0]):
        if spent + extra <= target_bits * total:
            prefix, members = _members(name)
            chosen |= {prefix + m: fine[prefix + m] for m in members}
            spent += extra
    return chosen


def average_bits(methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> float:
    sizes = {name: shapes[name][0] * shapes[name][1] for name in methods}
    return sum(methods[name].bits(shapes[name]) * sizes[name] for name in methods) / sum(sizes.values())


def _members(name: str) -> tuple[str, tuple[str, ...]]:
    group = next(group for group in GROUPS if name.endswith("." + group.name))
    return name.removesuffix(group.name), group.linears
