"""compressed-tensors, the format of LLM Compressor, vLLM and QuantizedWriter: a scheme a group of modules.

8 bits:  weight float8_e4m3fn or int8 [out_size, in_size]
4 or 8:  weight_packed int32 [out_size, in_size * bits / 32], the first input in the lowest bits, codes from
         0; weight_zero_point int32 [out_size * bits / 32, num_groups], the first output in the lowest bits
e2m1:    weight_packed uint8 [out_size, in_size / 2], the first of two neighbours in the low half
weight_scale is one, or a row, a group or a block each; weight_global_scale of NVFP4 divides.
Source: the package compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.modelopt import nvfp4
from fastkernels.checkpoint.quantized.stored import (
    FLOATS,
    Module,
    Parts,
    StoredLinear,
    as_bytes,
    blocks,
    e4m3,
    group_order,
    group_size_of,
    integers,
    one_or_each_row,
    unpack_words,
)

_WHAT = "the compressed-tensors quantization_config"
_READS = "float of 8 bits; int of 4 and 8; float of 4 in groups of 16 (NVFP4) and 32 (MXFP4)"
_CLASS = "Linear"  # of every module there is


def read_compressed_tensors(config: Mapping[str, Any], modules: Iterable[Module]) -> list[StoredLinear]:
    """Those of ``modules`` that a group targets, ``ignore`` does not name, and that are not plain."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, Mapping) and isinstance(group.get("targets"), list) for group in groups.values()
    ):
        raise CheckpointError(f"{_WHAT} has no config_groups with their targets")
    for key in ("sparsity_config", "transform_config"):
        rest = config.get(key) or {}
        if rest.get("config_groups") or rest.get("format", "dense") != "dense":
            raise CheckpointError(f"{_WHAT} has a {key}, which fastkernels does not read")
    ignore = config.get("ignore") or []
    found = []
    for module in modules:
        if module.is_plain or _rank(module.name, ignore) is not None:
            continue
        ranked = [(_rank(module.name, group["targets"]), group) for group in groups.values()]
        ranked = [(rank, group) for rank, group in ranked if rank is not None]
        if ranked:
            group = min(ranked, key=lambda pair: pair[0] or 0)[1]
            if group.get("weights") is not None:
                found.append(_stored(module, group["weights"], group.get("input_activations")))
    return found


def _rank(name: str, targets: Iterable[str]) -> int | None:
    """How closely one of the targets names the module: 0 by name, 1 by a pattern, 2 by its class."""
    ranks = [
        0 if target == name else 1 if target.startswith("re:") else 2
        for target in targets
        if target in (name, _CLASS) or (target.startswith("re:") and re.match(target[3:], name))
    ]
    return min(ranks, default=None)


def _stored(module: Module, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> StoredLinear:
    """weights, inputs: QuantizationArgs, inputs those of activations, None where they are left as they are"""
    activations = inputs is not None
    has_zeros = inputs is not None and not inputs.get("symmetric", True)
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if kind == "float" and bits == 8:
        return _float8(module, weights, strategy, activations)
    if kind == "int" and bits == 4:
        activations = inputs is not None and (inputs.get("type"), inputs.get("num_bits")) == ("float", 8)
    if kind == "int" and bits in (4, 8):
        return _integers(module, weights, strategy, activations, has_zeros)
    if kind == "float" and bits == 4 and weights.get("group_size") in (16, 32):
        return _mxfp4(module) if weights["group_size"] == 32 else _nvfp4(module)
    raise module.fail(
        f"is quantised to {kind} of {bits} bits, strategy {strategy}; of compressed-tensors "
        f"fastkernels reads {_READS}"
    )


def _float8(module: Module, weights: Mapping[str, Any], strategy: str, activations: bool) -> StoredLinear:
    if strategy in ("tensor", "channel"):
        shapes = one_or_each_row(module)
    elif strategy == "block":
        block = weights.get("block_structure")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise CheckpointError(f"{_WHAT} has block_structure = {block!r}; it must be two sizes")
        shapes = blocks(module, *block)
    else:
        raise module.fail(f"is FP8 by the {strategy}; fastkernels reads it by the tensor, channel and block")
    return e4m3(module, "weight_scale", shapes, activations=activations)


def _nvfp4(module: Module) -> StoredLinear:
    module.require("weight_global_scale", [(), (1,)], [torch.float32])
    divisor = module.read_scales("weight_global_scale", torch.device("cpu")).view(1)
    return nvfp4(module, "weight_packed", float(divisor.reciprocal()))


def _mxfp4(module: Module) -> StoredLinear:
    groups = module.num_groups(32)
    module.require("weight_packed", [(module.out_size, module.in_size // 2)], [torch.uint8])
    module.require("weight_scale", [(module.out_size, groups)], [torch.uint8, torch.float8_e8m0fnu])

    def load(device: torch.device) -> Parts:
        scales = module.read("weight_scale", device).view(torch.uint8)
        if bool((scales == 255).any()):
            raise module.fail("has NaN in weight_scale; scales are finite")
        return {"packed": module.read("weight_packed", device), "scales": scales}

    return StoredLinear(module, "mxfp4", "e2m1", (1, 32), load)


def _integers(
    module: Module, weights: Mapping[str, Any], strategy: str, activations: bool, activations_have_zeros: bool
) -> StoredLinear:
    bits, out_size = int(weights["num_bits"]) if "num_bits" in weights else 8, module.out_size
    if strategy not in ("tensor", "channel", "group"):
        raise module.fail(
            f"is INT{bits} by the {strategy}; fastkernels reads it by the tensor, channel and group"
        )
    group_size = group_size_of(weights, _WHAT) if strategy == "group" else None
    groups, has_zeros = module.num_groups(group_size), not weights.get("symmetric", True)
    a_word = 32 // bits
    is_packed = "weight_packed" in module
    if is_packed:
        words = -(-module.in_size // a_word)
        hint = f", {a_word} inputs a word"
        module.require("weight_packed", [(out_size, words)], [torch.int32], hint)
    else:
        module.require("weight", [(out_size, module.in_size)], [torch.int8])
    one = [(), (1,), (1, 1)] if groups == 1 else []
    each = [(out_size,)] if groups == 1 else []
    module.require("weight_scale", [*one, *each, (out_size, groups)], FLOATS)
    if has_zeros:
        shapes = [*one, *each, (out_size, groups), (-(-out_size // a_word), groups)]
        module.require("weight_zero_point", shapes, [torch.int8, torch.int32])
    permutation = None
    if "weight_g_idx" in module and group_size is not None:
        permutation = group_order(module, "weight_g_idx", group_size)

    def by_row(values: Tensor) -> Tensor:
        return values.reshape(-1, groups).expand(out_size, groups)

    def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        half = 1 << (bits - 1)
        if is_packed:
            codes = as_bytes(module.read("weight_packed", device))[:, : module.in_size * bits // 8]
        else:
            codes = (module.read("weight", device).short() + half).to(torch.uint8)
        zeros = None
        if has_zeros:
            points = module.read("weight_zero_point", device)
            if points.dtype == torch.int32:
                zeros = unpack_words(points.t(), bits)[:, :out_size].t()
            else:
                zeros = by_row((points.short() + half).to(torch.uint8))
        return codes, by_row(module.read_scales("weight_scale", device)), zeros

    scale_dtype = module.tensors.dtype(f"{module.name}.weight_scale")
    return integers(
        *(module, bits, group_size, has_zeros, scale_dtype, permutation, load),
        activations=activations,
        activations_have_zeros=activations_have_zeros,
    )
