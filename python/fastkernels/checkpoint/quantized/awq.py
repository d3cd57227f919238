"""AutoAWQ, version "gemm": 4 bits with zero points, eight outputs a word, in an order of their own.

qweight: int32 [in_size, out_size / 8]; scales: [num_groups, out_size]; qzeros: int32 [num_groups,
out_size / 8]; nibble i of a word is output ORDER[i] of its eight. A weight is scale * (code - zero).
Source: Lin et al. 2023, AWQ; the packing of AutoAWQ's WQLinear_GEMM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.stored import (
    FLOATS,
    Module,
    StoredLinear,
    group_size_of,
    integer_of,
    integers,
    unpack_words,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = [ORDER.index(column) for column in range(8)]  # of a column: its nibble


def read_awq(config: Mapping[str, Any], modules: Iterable[Module]) -> list[StoredLinear]:
    """Those of ``modules`` that have a qweight; the others have a weight as they are."""
    version, what = str(config.get("version", "gemm")).lower(), "the AWQ quantization_config"
    if version != "gemm":
        raise CheckpointError(f"{what} has version {version!r}; fastkernels reads 'gemm'")
    if integer_of(config, "bits", what) != 4:
        raise CheckpointError(f"{what} has {config['bits']} bits; fastkernels reads AWQ of 4")
    group_size = group_size_of(config, what)
    has_zeros = bool(config.get("zero_point", True))
    return [_stored(module, group_size, has_zeros) for module in modules if quantised(module)]


def quantised(module: Module) -> bool:
    if "qweight" not in module and "weight" not in module:
        raise module.fail("has neither a qweight nor a weight")
    return "qweight" in module


def _stored(module: Module, group_size: int | None, has_zeros: bool) -> StoredLinear:
    groups, words = module.num_groups(group_size), -(-module.out_size // 8)
    hint = ", eight outputs a word; is it another version than gemm?"
    module.require("qweight", [(module.in_size, words)], [torch.int32], hint)
    module.require("scales", [(groups, module.out_size)], FLOATS)
    if has_zeros:
        module.require("qzeros", [(groups, words)], [torch.int32])

    def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = _columns(module.read("qzeros", device), module.out_size) if has_zeros else None
        codes = _columns(module.read("qweight", device), module.out_size)
        return codes, module.read_scales("scales", device).t(), zeros

    scale_dtype = module.tensors.dtype(f"{module.name}.scales")
    return integers(module, 4, group_size, has_zeros, scale_dtype, None, load)


def _columns(words: Tensor, out_size: int) -> Tensor:
    """int32 [rows, out_size / 8] -> uint8 [out_size, rows]"""
    return unpack_words(words, 4).unflatten(1, (-1, 8))[:, :, _PLACE].flatten(1)[:, :out_size].t()
