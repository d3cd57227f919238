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
# e4m3 is as fine for a wide range as for a narrow one, and the keys it would clip decide attention;
# int8 is not.
ESTIMATOR: dict[str, Estimator] = {"fp8": "min-max", "int8": "mse"}
_VALUES_KEPT = 1 << 18  # of each, spread over the text


class KVObserver(KVRounding):
    """Keeps some of the keys (after the rotation) and values that pass, and the largest."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {"k": [], "v": []}
        self._largest: dict[str, Tensor] = {}

    def __call__(self, which: str, x: Tensor) -> Tensor:
        flat = x.float().flatten()
        every = max(len(flat) // (_VALUES_KEPT // 8), 1)
        self._seen[which].append(flat[::every].clone())
        most = flat.abs().amax()
        self._largest[which] = torch.maximum(self._largest.get(which, most), most)
        return x

    def scales(self, cache: str, estimator: Estimator = "mse") -> dict[str, Tensor]:
        """ "k" and "v" -> fp32 [1], what a code of 1 stands for."""
        weight_type = KV_TYPES[cache]
        found = {}
        for which, pieces in self._seen.items():
            values = torch.cat([*pieces, self._largest[which].view(1)])[None]
            _, high = estimate_range(values, estimator, weight_type=weight_type)
            found[which] = scale_of(high, weight_type)
        return found


class RoundedKV(KVRounding):
    """Keys and values as the cache gives them back."""

    def __init__(self, scales: dict[str, Tensor], cache: str) -> None:
        self.scales = scales
        self.weight_type = KV_TYPES[cache]

    def __call__(self, which: str, x: Tensor) -> Tensor:
        scale = self.scales[which]
        return (nearest(x.float() / scale, self.weight_type) * scale).to(x.dtype)
