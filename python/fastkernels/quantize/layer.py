"""One decoder layer quantised: scales moved between neighbours, then every linear rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastkernels.config import ModelConfig
from fastkernels.quantize.algorithms.awq import awq_scales
from fastkernels.quantize.algorithms.gptq import gptq
from fastkernels.quantize.algorithms.grid import Grid, choose_grid
from fastkernels.quantize.algorithms.round_to_nearest import round_to_nearest
from fastkernels.quantize.algorithms.smoothquant import smooth_scales
from fastkernels.quantize.decoder_layers import GROUPS, LinearGroup
from fastkernels.quantize.methods import Method
from fastkernels.quantize.statistics import InputStatistics


@dataclass
class QuantizedLayer:
    """parameters: all of the layer, fp32, the quantised ones as their parts stand for them
    parts:      by linear, as its scheme has them
    changed:    parameters that are not quantised and took up scales of others
    """

    parameters: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


def quantize_layer(
    parameters: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    methods: Mapping[str, Method],
    config: ModelConfig,
) -> QuantizedLayer:
    """parameters: of the layer, fp32, named within it
    statistics: by ``LinearGroup.name``, of the groups whose method needs inputs
    methods:    by linear within the layer; those that are not named stay
    Raises QuantizationError for NaN and infinity.
    """
    result = QuantizedLayer(dict(parameters))
    scaled: dict[str, Tensor] = {}
    for group in GROUPS:
        method = methods.get(group.name)
        if method is not None and method.algorithm in ("smoothquant", "awq"):
            wanted = _column_scales(group, method, result.parameters, statistics[group.name], config)
            scaled[group.name] = _fold(group, wanted, result, methods, config)
    for group in GROUPS:
        method = methods.get(group.name)
        if method is None:
            continue
        hessian = None
        if group.name in statistics and method.algorithm != "smoothquant":
            hessian = statistics[group.name].hessian
            if group.name in scaled:
                hessian = hessian / scaled[group.name] / scaled[group.name][:, None]
        names = [f"{linear}.weight" for linear in group.linears]
        largest = max(result.parameters[name].abs().amax().item() for name in names)
        for linear, name in zip(group.linears, names, strict=True):
            grid, rounded = _round(method, result.parameters[name], hessian, largest)
            result.parts[linear] = grid.parts(rounded)
            result.parameters[name] = rounded
    result.changed -= {f"{linear}.weight" for linear in result.parts}
    return result


def _round(method: Method, weight: Tensor, hessian: Tensor | None, largest: float) -> tuple[Grid, Tensor]:
    if method.algorithm in ("awq", "gptq"):
        assert hessian is not None
        # By the weights' error: that of the output is for the columns behind to make up for.
        grid = choose_grid(method.scheme, weight, largest=largest)
        return grid, gptq(weight, hessian, grid)
    search = method.algorithm != "largest"
    return round_to_nearest(method.scheme, weight, hessian, search=search, largest=largest)


def _column_scales(
    group: LinearGroup,
    method: Method,
    parameters: Mapping[str, Tensor],
    statistics: InputStatistics,
    config: ModelConfig,
) -> Tensor:
    weights = [parameters[f"{linear}.weight"] for linear in group.linears]
    tie = _tie(group, config)
    if method.algorithm == "awq":
        return awq_scales(weights, statistics.hessian, statistics.mean_magnitude, method.scheme, tie)[0]
    return smooth_scales(weights, statistics.largest, statistics.sample, method.scheme, tie)[0]


def _heads(group: LinearGroup, config: ModelConfig) -> tuple[int, int, int] | None:
    """Key-value heads, query heads of each, and head_dim where every query head reads columns of its own
    while v has fewer rows."""
    if group.before != "self_attn.v_proj":
        return None
    return config.num_kv_heads, config.num_q_heads // config.num_kv_heads, config.head_dim


def _tie(group: LinearGroup, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Columns whose scales one row before them takes up get the largest of their scales."""
    heads = _heads(group, config)
    if heads is None:
        return lambda scales: scales
    return lambda scales: scales.view(heads).amax(1, keepdim=True).expand(heads).flatten()


def _fold(
    group: LinearGroup,
    scales: Tensor,
    result: QuantizedLayer,
    methods: Mapping[str, Method],
    config: ModelConfig,
) -> Tensor:
    """Columns of the group times scales, rows of what is before it over them. Returns the scales as they
    became: a norm is kept in the checkpoint's few digits, so the columns take what it really was divided
    by."""
    heads = _heads(group, config)
    parameters, name = result.parameters, f"{group.before}.weight"
    before = parameters[name]
    if before.dim() == 1:
        divided = (before / scales).to(config.torch_dtype).float()
        exact = divided.isfinite() & (divided != 0) & (before != 0)
        divided = torch.where(exact, divided, before)
        scales = torch.where(exact, before / divided, 1.0)
        parameters[name] = divided
    else:
        rows = scales if heads is None else scales.view(heads)[:, 0].flatten()
        divided = before / rows[:, None]
        if group.before not in methods:
            divided = divided.to(config.torch_dtype).float()
        parameters[name] = divided
        bias = f"{group.before}.bias"
        if bias in parameters:
            parameters[bias] = (parameters[bias] / rows).to(config.torch_dtype).float()
            result.changed.add(bias)
    result.changed.add(name)
    for linear in group.linears:
        parameters[f"{linear}.weight"] = parameters[f"{linear}.weight"] * scales
    return scales
