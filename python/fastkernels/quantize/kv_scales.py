"""Scales of a KV cache of 8 bits: one for a layer's keys and one for its values, from what calibration
saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.quantize.algorithms.grid import nearest
from fastkernels.quantize.decoder_layers import KVRounding
from fastkernels.quantize.ranges import estimate_range, scale_of

KV_TYPES = {"fp8": "e4m3", "int8": "int8"}
# What is kept free above the largest value seen: keys that are clipped are those that decide attention, and
# other texts have larger ones. e4m3 is as fine for a wide range as for a narrow one.
HEADROOM = {"fp8": 2.0, "int8": 1.25}


class KVObserver(KVRounding):
    """Keeps the largest key (after the rotation) and value that pass."""

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}

    def __call__(self, which: str, x: Tensor) -> Tensor:
        _, high = estimate_range(x.flatten()[None])
        self._largest[which] = torch.maximum(self._largest.get(which, high), high)
        return x

    def scales(self, cache: str) -> dict[str, Tensor]:
        """ "k" and "v" -> fp32 [1], what a code of 1 stands for."""
        return {
            which: scale_of(high * HEADROOM[cache], KV_TYPES[cache]) for which, high in self._largest.items()
        }


class RoundedKV(KVRounding):
    """Keys and values as the cache gives them back."""

    def __init__(self, scales: dict[str, Tensor], cache: str) -> None:
        self.scales = scales
        self.weight_type = KV_TYPES[cache]

    def __call__(self, which: str, x: Tensor) -> Tensor:
        scale = self.scales[which]
        return (nearest(x.float() / scale, self.weight_type) * scale).to(x.dtype)
