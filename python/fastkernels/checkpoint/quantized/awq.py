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
    as_bytes,
    group_size_of,
    integer_of,
    integers,
    unpack_words,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
    if module.in_size % 2:
        raise module.fail(f"has rows of {module.in_size}; fastkernels reads AWQ of an even number")
    hint = ", eight outputs a word; is it another version than gemm?"
    module.require("qweight", [(module.in_size, words)], [torch.int32], hint)
    module.require("scales", [(groups, module.out_size)], FLOATS)
    if has_zeros:
        module.require("qzeros", [(groups, words)], [torch.int32])

    def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = _zeros(module.read("qzeros", device), module.out_size) if has_zeros else None
        packed = _packed(module.read("qweight", device), module.out_size)
        return packed, module.read_scales("scales", device).t(), zeros

    scale_dtype = module.tensors.dtype(f"{module.name}.scales")
    return integers(module, 4, group_size, has_zeros, scale_dtype, None, load)


def _zeros(words: Tensor, out_size: int) -> Tensor:
    """int32 [num_groups, out_size / 8] -> uint8 [out_size, num_groups]"""
    place = [ORDER.index(output) for output in range(8)]
    return unpack_words(words, 4).unflatten(1, (-1, 8))[:, :, place].flatten(1)[:, :out_size].t()


def _packed(words: Tensor, out_size: int) -> Tensor:
    """int32 [in_size, out_size / 8] -> uint8 [out_size, in_size / 2], two neighbours of a row a byte."""
    pairs = as_bytes(words).unflatten(0, (-1, 2)).unflatten(2, (-1, 4))  # in_size / 2, 2, out_size / 8, 4
    first, second = pairs[:, 0], pairs[:, 1]
    halves = (first & 15 | second << 4, first >> 4 | second & 240)
    packed = torch.empty(words.shape[1], 8, len(pairs), dtype=torch.uint8, device=words.device)
    for nibble, output in enumerate(ORDER):
        packed[:, output] = halves[nibble % 2][:, :, nibble // 2].t()
    return packed.flatten(0, 1)[:out_size]
