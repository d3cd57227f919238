"""NVIDIA's ModelOpt: FP8 with a scale for all of a weight or a row each, NVFP4, and both in one model.

FP8:   weight float8_e4m3fn [out_size, in_size], weight_scale
NVFP4: weight uint8 [out_size, in_size / 2], the first of two neighbours in the low half; weight_scale
       float8_e4m3fn [out_size, in_size / 16]; weight_scale_2: one, multiplied
Static scales of activations (input_scale) are not used: activations are rounded by the token, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.stored import Module, Parts, StoredLinear, e4m3, one_or_each_row

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION of these")
_ONE = ((), (1,))


def read_modelopt(config: Mapping[str, Any], modules: Iterable[Module]) -> list[StoredLinear]:
    """Those of ``modules`` that are neither excluded by name nor plain.

    config: of either file, without what is around it
    """
    excluded = [str(pattern) for key in ("exclude_modules", "ignore") for pattern in config.get(key) or []]
    found = []
    for module in modules:
        if module.is_plain or any(fnmatchcase(module.name, pattern) for pattern in excluded):
            continue
        found.append(_stored(module, _algorithm(config, module)))
    return found


def _algorithm(config: Mapping[str, Any], module: Module) -> str:
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        algorithm = ((config.get("quantized_layers") or {}).get(module.name) or {}).get("quant_algo")
    if algorithm is None:
        raise module.fail("is quantised, but no quant_algo says how")
    return str(algorithm).upper()


def _stored(module: Module, algorithm: str) -> StoredLinear:
    if "pre_quant_scale" in module:
        raise module.fail("has a pre_quant_scale, which fastkernels does not read")
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return e4m3(module, "weight_scale", one_or_each_row(module), activations=True)
    if algorithm == "NVFP4":
        module.require("weight_scale_2", _ONE, [torch.float32])
        return nvfp4(module, "weight", float(module.read_scales("weight_scale_2", torch.device("cpu"))))
    raise CheckpointError(
        f"{module.tensors.path}: {module.name} is quantised by ModelOpt's {algorithm}; fastkernels reads "
        f"{', '.join(ALGORITHMS)}"
    )


def nvfp4(module: Module, leaf: str, global_scale: float) -> StoredLinear:
    """e2m1 in the tensor ``leaf``, with a scale for 16 in weight_scale and global_scale for all."""
    out_size, groups = module.out_size, module.num_groups(16)
    module.require(leaf, [(out_size, module.in_size // 2)], [torch.uint8])
    module.require("weight_scale", [(out_size, groups)], [torch.float8_e4m3fn])

    def load(device: torch.device) -> Parts:
        # a block that is small against the largest may have a scale of 0
        scales = module.read_scales("weight_scale", device, zero_is_meant=True)
        return {
            "packed": module.read(leaf, device),
            "scales": scales,
            "global_scale": torch.tensor([global_scale], dtype=torch.float32, device=device),
        }

    return StoredLinear(module, "nvfp4", "e2m1", (1, 16), load, global_scale=global_scale)
