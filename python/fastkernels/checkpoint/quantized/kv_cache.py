"""What a checkpoint says about a KV cache of 8 bits: its kind, and a layer's scales of keys and of values.

compressed-tensors: quantization_config.kv_cache_scheme {"num_bits": 8, "type": "float" | "int", ...};
                    self_attn.k_scale, before version 0.9 self_attn.k_proj.output_scale
ModelOpt:           kv_cache_quant_algo "FP8", or kv_cache_scheme as above; self_attn.k_proj.k_scale
AutoFP8 and others: "static" for a scheme, or none; self_attn.kv_scale for both, or k_scale
A key is its code times the scale, which is one number, or one for each key-value head.

Ours may also have OFFSETS_FILE, which its index does not name, so that nobody else reads it: the mean key of
each head, model.layers.0.self_attn.k_offset [num_kv_heads, head_dim], that a cache holds keys without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from fastkernels.checkpoint.reader import Checkpoint

KVKind = Literal["fp8", "int8"]
OFFSETS_FILE = "key_offsets.safetensors"
LARGEST_CODE: Mapping[KVKind, float] = {"fp8": 448.0, "int8": 127.0}
_LEAVES = ("k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale", "k_zero_point", "v_zero_point")
_ATTENTION = (".self_attn", ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.attn")
# Of keys, the x of "k" and "v", as the tools name them; the first that is there counts.
_NAMES = ("{x}_scale", "{x}_proj.{x}_scale", "attn.{x}_scale", "kv_scale", "{x}_proj.output_scale")


def is_kv_scale(name: str) -> bool:
    """Whether a tensor that the model does not name belongs to a quantised KV cache."""
    module, _, leaf = name.rpartition(".")
    return leaf in (*_LEAVES, "output_scale") and module.endswith(_ATTENTION)


@dataclass(frozen=True)
class StoredKV:
    """kind:   of the cache that the checkpoint's scales are for; None: it has none that an engine could use
    unread:    what it asks for instead, in words; None where that is nothing
    names:     "model.layers.0.self_attn.k_scale" and so on -> the tensor that holds it
    offsets:   the file of keys' offsets; None: there is none, or no cache it would be for
    """

    checkpoint: Checkpoint
    kind: KVKind | None
    unread: str | None
    names: Mapping[str, str]
    offsets: Path | None = None

    def read(self, name: str, num_kv_heads: int, kind: KVKind) -> Tensor | None:
        """fp32 [num_kv_heads], by the name of ``names``; None where it holds none.

        kind: of the cache it is wanted for: another's scales are stretched over its codes
        Raises CheckpointError for another shape, and for a scale that is not positive and finite.
        """
        if name not in self.names:
            return None
        stored = self.names[name]
        scale = self.checkpoint.tensor(stored).float().flatten()
        where = f"{self.checkpoint.path}: {stored}"
        if scale.numel() not in (1, num_kv_heads):
            raise CheckpointError(
                f"{where} has shape {list(self.checkpoint.shape(stored))}; a KV cache takes one scale, or "
                f"one for each of {num_kv_heads} heads"
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(f"{where} holds a scale of {scale.min().item():g}; scales are positive")
        scale = scale * (LARGEST_CODE[self.kind or "fp8"] / LARGEST_CODE[kind])
        return scale.expand(num_kv_heads).contiguous()

    def read_offset(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """fp32, from the file of offsets. Raises CheckpointError where it has none, another shape, or one
        that is not finite."""
        assert self.offsets is not None
        file = SafetensorsFile(self.offsets)
        if name not in file.entries:
            raise CheckpointError(f"{self.offsets} has no tensor {name!r}; without the file there are none")
        offset = file.tensor(name).float()
        if tuple(offset.shape) != shape:
            raise CheckpointError(
                f"{self.offsets}: {name} has shape {list(offset.shape)}; the model's is {list(shape)}"
            )
        if not bool(torch.isfinite(offset).all()):
            raise CheckpointError(f"{self.offsets}: {name} holds NaN or infinity")
        return offset


def open_kv(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> StoredKV:
    """config: the quantization_config, of any tool, or None. Looks at names only."""
    names = {}
    for layer in range(checkpoint.config.num_layers):
        attention = f"model.layers.{layer}.self_attn"
        for x in ("k", "v"):
            found = (f"{attention}.{name.format(x=x)}" for name in _NAMES)
            stored = next((name for name in found if name in checkpoint), None)
            if stored is not None:
                names[f"{attention}.{x}_scale"] = stored
    kind, unread = _kind(config or {})
    if kind is None:  # without a scheme, scales of a linear's output are just that
        keep = () if unread else (n for n in names if not names[n].endswith(".output_scale"))
        names = {name: names[name] for name in keep}
        kind = "fp8" if names else None
    offsets = checkpoint.path / OFFSETS_FILE
    return StoredKV(checkpoint, kind, unread, names, offsets if kind and offsets.is_file() else None)


def _kind(config: Mapping[str, Any]) -> tuple[KVKind | None, str | None]:
    """What a configuration asks for: one that an engine has, or, in words, one that it has not."""
    algorithm, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if algorithm is not None:
        known: Mapping[str, KVKind] = {"FP8": "fp8", "INT8": "int8"}
        kind = known.get(str(algorithm).upper())
        return kind, None if kind else f"kv_cache_quant_algo {algorithm!r}"
    if scheme is None:
        return None, None
    if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 and scheme.get("symmetric", True):
        types: Mapping[Any, KVKind] = {"float": "fp8", "int": "int8"}
        kind = types.get(scheme.get("type"))
        if kind is not None and scheme.get("strategy", "tensor") in ("tensor", "attn_head"):
            return kind, None
    if scheme in ("static", "dynamic"):  # AutoFP8's words
        return "fp8", None
    return None, f"kv_cache_scheme {scheme!r}"
