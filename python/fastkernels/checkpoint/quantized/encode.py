"""The parts of a scheme as the compressed-tensors format has them, and the group that describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.stored import pack_nibbles

_INT4 = re.compile(r"int4(?:-(g32|g64|g128|channel))?(-zeros)?(?:-fp16|-fp32)?(-fp8)?")
_BY_TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}
_BY_TOKEN_WITH_ZEROS = {"strategy": "token", "symmetric": False, "dynamic": True}
_BY_BLOCK = {"strategy": "group", "group_size": 128, "symmetric": True, "dynamic": True}


@dataclass(frozen=True)
class Encoding:
    """How the format says a scheme. weights, input_activations: its QuantizationArgs"""

    format: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None = None

    def group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": self.weights,
            "input_activations": self.input_activations,
            "output_activations": None,
            "format": self.format,
        }


def encoding_of(scheme: str) -> Encoding:
    """Raises CheckpointError for a scheme that is not written."""

    def args(kind: str, bits: int, **rest: Any) -> dict[str, Any]:
        return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **rest}

    def activations(kind: str, by: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_bits": 8, "type": kind, **by}

    by_row = {"strategy": "channel"}
    by_block = {"strategy": "block", "block_structure": [128, 128]}
    known = {
        "fp8": Encoding("float-quantized", args("float", 8, **by_row), activations("float", _BY_TOKEN)),
        "fp8-weight": Encoding("naive-quantized", args("float", 8, **by_row)),
        "fp8-block": Encoding(
            "float-quantized", args("float", 8, **by_block), activations("float", _BY_BLOCK)
        ),
        "fp8-block-weight": Encoding("naive-quantized", args("float", 8, **by_block)),
        "int8": Encoding("int-quantized", args("int", 8, **by_row), activations("int", _BY_TOKEN)),
        "int8-zeros": Encoding(
            "int-quantized", args("int", 8, **by_row), activations("int", _BY_TOKEN_WITH_ZEROS)
        ),
        "int8-weight": Encoding("pack-quantized", args("int", 8, **by_row)),
        "nvfp4": Encoding("nvfp4-pack-quantized", args("float", 4, strategy="tensor_group", group_size=16)),
        "mxfp4": Encoding("mxfp4-pack-quantized", args("float", 4, strategy="group", group_size=32)),
    }
    if scheme in known:
        return known[scheme]
    int4 = _INT4.fullmatch(scheme)
    if int4 is None:
        raise CheckpointError(
            f"the scheme {scheme!r} is not written; there are {', '.join(known)} and int4 with its endings"
        )
    group = int4[1] or "g128"
    by: dict[str, Any] = (
        by_row if group == "channel" else {"strategy": "group", "group_size": int(group.removeprefix("g"))}
    )
    inputs = activations("float", _BY_TOKEN) if int4[3] else None
    return Encoding("pack-quantized", {**args("int", 4, **by), "symmetric": int4[2] is None}, inputs)


def encode(scheme: str, parts: Mapping[str, Tensor], out_size: int, in_size: int) -> dict[str, Tensor]:
    """The tensors of a module, by the last part of their names. Raises KeyError for a missing part."""
    packed, scales = parts["packed"], parts["scales"]
    encoding = encoding_of(scheme)
    if scheme == "mxfp4":
        return {"weight_packed": packed, "weight_scale": scales}
    if scheme == "nvfp4":
        divisor = parts["global_scale"].float().reciprocal()
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor.view(1)}
    if encoding.format != "pack-quantized":
        return {"weight": packed, "weight_scale": scales}
    if packed.dtype == torch.int8:
        packed = packed.view(torch.uint8) ^ 128
    tensors = {
        "weight_packed": _words(packed),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out_size, in_size]),
    }
    if not encoding.weights["symmetric"]:
        by_group = parts["zeros"].t()  # an odd number of outputs ends in half a byte
        zeros = pack_nibbles(pad(by_group, (0, by_group.shape[1] % 2)))
        tensors["weight_zero_point"] = _words(zeros).t()
    return tensors


def _words(data: Tensor) -> Tensor:
    """uint8 [rows, size] -> int32 [rows, ceil(size / 4)]"""
    whole = pad(data, (0, -data.shape[1] % 4))
    return whole.flatten().view(torch.int32).view(len(data), -1)  # flat: the strides of one row mean nothing
