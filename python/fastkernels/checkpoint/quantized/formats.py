"""Which format a checkpoint is in, by config.json or the file that its tool writes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.checkpoint.quantized.awq import read_awq
from fastkernels.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from fastkernels.checkpoint.quantized.deepseek_fp8 import read_fp8
from fastkernels.checkpoint.quantized.gptq import read_gptq
from fastkernels.checkpoint.quantized.kv_cache import is_kv_scale
from fastkernels.checkpoint.quantized.modelopt import read_modelopt
from fastkernels.checkpoint.quantized.stored import Module, StoredLinear
from fastkernels.models import build

if TYPE_CHECKING:
    from fastkernels.checkpoint.reader import Checkpoint

Reader = Callable[[Mapping[str, Any], Iterable[Module]], list[StoredLinear]]

# quant_method -> the format's name in sentences, and its reader
METHODS: dict[str, tuple[str, Reader]] = {
    "compressed-tensors": ("compressed-tensors", read_compressed_tensors),
    "awq": ("AWQ", read_awq),
    "gptq": ("GPTQ", read_gptq),
    "modelopt": ("ModelOpt", read_modelopt),
    "modelopt_fp4": ("ModelOpt", read_modelopt),
    "fp8": ("FP8", read_fp8),
}
# Of a linear, beside its weight and bias; those of activations are not used (see docs/quantization.md).
_LEAVES = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
    *("weight_zero_point", "weight_g_idx", "weight_shape", "qweight", "qzeros", "scales", "g_idx"),
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
)


@dataclass(frozen=True)
class QuantizedWeights:
    """method: the format's name; linears: by module name, those whose weights are quantised"""

    method: str
    linears: Mapping[str, StoredLinear]

    def holds(self, name: str) -> bool:
        """Whether a tensor that the model does not name belongs to a quantised linear, or is a scale of the
        KV cache. Some tools write a bias of zeros where the model has none."""
        module, _, leaf = name.rpartition(".")
        if module not in self.linears:
            return is_kv_scale(name)
        if leaf == "bias":
            return not bool(self.linears[module].module.tensors.tensor(name).any())
        return leaf in _LEAVES or is_kv_scale(name)


def open_quantized(checkpoint: Checkpoint) -> QuantizedWeights | None:
    """None where the checkpoint is not quantised. Looks at names, shapes and the smallest tensors only.

    Raises CheckpointError for a format that is not read, naming those that are, and, naming the module, for
    tensors that are missing or of the wrong shape or dtype.
    """
    config = quantization_config(checkpoint.path, checkpoint.config_dict)
    if config is None:
        return None
    key = str(config.get("quant_method", "unnamed")).lower()
    if key not in METHODS:
        raise CheckpointError(
            f"{checkpoint.path}: quant_method is {key!r}; fastkernels reads {', '.join(METHODS)}"
        )
    method, read = METHODS[key]
    with torch.device("meta"):
        model = build(checkpoint.config)
    modules = [
        Module(checkpoint, name, linear.out_features, linear.in_features, method)
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and f"{name}.weight" not in model.aliases
    ]
    return QuantizedWeights(method, {linear.module.name: linear for linear in read(config, modules)})


def quantization_config(folder: Path, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """With its quant_method; from config.json, which is hf, ModelOpt's hf_quant_config.json or AutoGPTQ's
    quantize_config.json. None where there is none. Raises CheckpointError where it is no object."""
    found = hf.get("quantization_config") or hf.get("compression_config")
    if found is None and (folder / "hf_quant_config.json").exists():
        found = read_json_object(folder / "hf_quant_config.json").get("quantization")
        return _object({"quant_method": "modelopt", **_object(found)})
    if found is None and (folder / "quantize_config.json").exists():
        return {"quant_method": "gptq", **read_json_object(folder / "quantize_config.json")}
    if found is None:
        return None
    found = _object(found)
    if found.get("quant_method") is None and "config_groups" in found:
        found = {**found, "quant_method": "compressed-tensors"}
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"the quantization_config is {value!r}; it must be an object")
    return value


def dense_weight(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """The weight of a quantised linear in fp32, by the name it would have unquantised, else None."""
    quantized = checkpoint.quantized
    linear = quantized.linears.get(name.removesuffix(".weight")) if quantized is not None else None
    return linear.dense() if linear is not None and name.endswith(".weight") else None
