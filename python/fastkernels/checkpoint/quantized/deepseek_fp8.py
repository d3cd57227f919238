"""quant_method "fp8": e4m3 with a scale for 128 x 128 weights, as DeepSeek publishes, or with one for all.

weight: float8_e4m3fn [out_size, in_size]; weight_scale_inv: a scale a block, which weights are multiplied by,
whatever its name says; without weight_block_size, weight_scale: one for all, or a row each.
Source: DeepSeek-AI 2024, DeepSeek-V3 Technical Report, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.stored import Module, StoredLinear, blocks, e4m3, one_or_each_row


def read_fp8(config: Mapping[str, Any], modules: Iterable[Module]) -> list[StoredLinear]:
    """Those of ``modules`` whose weight is e4m3."""
    block = config.get("weight_block_size")
    sound = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if block is not None and not sound:
        raise CheckpointError(
            f"the FP8 quantization_config has weight_block_size = {block!r}; it must be two sizes"
        )
    found = []
    for module in modules:
        name = f"{module.name}.weight"
        if name not in module.tensors or module.tensors.dtype(name) != torch.float8_e4m3fn:
            continue
        if block is None:
            found.append(e4m3(module, "weight_scale", one_or_each_row(module), activations=True))
        else:
            found.append(e4m3(module, "weight_scale_inv", blocks(module, *block), activations=True))
    return found
