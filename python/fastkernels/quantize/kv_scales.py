"""Scales of a KV cache of 8 bits: one for a layer's keys and one for its values, from what calibration
saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.quantize.algorithms.grid import nearest
from fastkernels.quantize.decoder_layers import KVRounding
from fastkernels.quantize.ranges import Estimator, estimate_range, scale_of

KV_TYPES = {"fp8": "e4m3", "int8": "int8"}
# What is kept free above the range: keys that are clipped are those that decide attention, and other texts
# have larger ones. e4m3 is as fine for a wide range as for a narrow one.
HEADROOM = {"fp8": 2.0, "int8": 1.25}
_VALUES = 1 << 15  # that are kept of a call; an odd step takes them from every head and dimension


class KVObserver(KVRounding):
    """Keeps a sample of the keys (after the rotation) and values that pass, and the largest."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}

    def __call__(self, which: str, x: Tensor) -> Tensor:
        values = x.flatten().float()
        step = values.numel() // _VALUES | 1
        self._seen.setdefault(which, []).append(torch.cat([values[::step], values.abs().amax()[None]]))
        return x

    def scales(self, cache: str, estimator: Estimator | None = None) -> dict[str, Tensor]:
        """ "k" and "v" -> fp32 [1], what a code of 1 stands for. estimator: None: "min-max"."""
        weight_type = KV_TYPES[cache]
        found = {}
        for which, seen in self._seen.items():
            values = torch.cat(seen)[None]
            _, high = estimate_range(values, estimator or "min-max", weight_type=weight_type)
            found[which] = scale_of(high * HEADROOM[cache], weight_type)
        return found


class RoundedKV(KVRounding):
    """Keys and values as the cache gives them back."""

    def __init__(self, scales: dict[str, Tensor], cache: str) -> None:
        self.scales = scales
        self.weight_type = KV_TYPES[cache]

    def __call__(self, which: str, x: Tensor) -> Tensor:
        scale = self.scales[which]
        return (nearest(x.float() / scale, self.weight_type) * scale).to(x.dtype)
