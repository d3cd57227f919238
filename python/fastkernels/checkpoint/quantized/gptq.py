"""GPTQ as AutoGPTQ and GPTQModel write it: 4 or 8 bits, words along the input, activation order by g_idx.

qweight: int32 [in_size * bits / 32, out_size], the first input in the lowest bits; scales: [num_groups,
out_size]; qzeros: int32 [num_groups, out_size * bits / 32]; g_idx: int32 [in_size], the group of each input.
A weight is scale * (code - zero). Format "gptq" stores zero points less one, the words being whole numbers,
"gptq_v2" as they are.
Source: Frantar et al. 2022, GPTQ; the packing of AutoGPTQ's and GPTQModel's linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.awq import quantised
from fastkernels.checkpoint.quantized.stored import (
    FLOATS,
    Module,
    StoredLinear,
    as_bytes,
    group_order,
    group_size_of,
    integer_of,
    integers,
    unpack_words,
)

FORMATS = ("gptq", "gptq_v2")
_ONES = {4: 0x11111111, 8: 0x01010101}
_WHAT = "the GPTQ quantization_config"


def read_gptq(config: Mapping[str, Any], modules: Iterable[Module]) -> list[StoredLinear]:
    """Those of ``modules`` that have a qweight; the others have a weight as they are."""
    form = config.get("checkpoint_format") or ("marlin" if config.get("is_marlin_format") else "gptq")
    if form not in FORMATS:
        raise CheckpointError(
            f"{_WHAT} has checkpoint_format {form!r}; fastkernels reads {', '.join(FORMATS)}"
        )
    return [
        _stored(module, {**config, **_override(config, module.name)}, form == "gptq")
        for module in modules
        if quantised(module)
    ]


def _override(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What GPTQModel's ``dynamic`` says of a module; "-:" in front says that it is not quantised."""
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise CheckpointError(f"{_WHAT} has dynamic = {rules!r}; it must be an object of rules")
    for pattern, rule in rules.items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return dict(rule)
    return {}


def _stored(module: Module, config: Mapping[str, Any], less_one: bool) -> StoredLinear:
    bits, group_size = integer_of(config, "bits", _WHAT), group_size_of(config, _WHAT)
    if bits not in _ONES:
        raise module.fail(f"is quantised to {bits} bits; fastkernels reads GPTQ of 4 and 8")
    a_word, symmetric = 32 // bits, bool(config.get("sym", True))
    if group_size is not None and group_size >= module.in_size:
        group_size = None
    groups = module.num_groups(group_size)
    if module.in_size % a_word:
        raise module.fail(f"has rows of {module.in_size}, which words of {a_word} do not divide")
    words = -(-module.out_size // a_word)
    hint = f", {a_word} inputs a word"
    module.require("qweight", [(module.in_size // a_word, module.out_size)], [torch.int32], hint)
    module.require("scales", [(groups, module.out_size)], FLOATS)
    module.require("qzeros", [(groups, words)], [torch.int32])
    permutation = None
    if "g_idx" in module and group_size is not None:
        permutation = group_order(module, "g_idx", group_size)
    elif config.get("desc_act") and group_size is not None:
        raise module.fail("has no g_idx, without which desc_act leaves the groups unknown")

    def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        stored = module.read("qzeros", device)
        # as whole numbers, so that a zero point of 0 borrows from its neighbour as it did when it was written
        stored = stored + _ONES[bits] if less_one else stored
        zeros = unpack_words(stored, bits)[:, : module.out_size].t()
        if symmetric and not bool((zeros == 1 << (bits - 1)).all()):
            raise module.fail(
                f"has zero points other than {1 << (bits - 1)}, but is said to be symmetric; is its format "
                f"another than {FORMATS[not less_one]!r}?"
            )
        codes = as_bytes(module.read("qweight", device).t())  # of 4 bits two each, as the engine has them
        return codes, module.read_scales("scales", device).t(), None if symmetric else zeros

    scale_dtype = module.tensors.dtype(f"{module.name}.scales")
    return integers(module, bits, group_size, not symmetric, scale_dtype, permutation, load)
