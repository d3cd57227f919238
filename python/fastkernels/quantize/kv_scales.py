"""Of a KV cache of 8 bits, from what calibration saw: a layer's mean key of each head, which its cache holds
keys without, and a scale for those keys and one for the values.

In slow rotary pairs a head's keys have a mean that is large beside what tells them apart, and rounding is as
coarse as the number is large. Attention does not miss the mean, since it adds the same to all scores of a
query. Source: Zhang et al. 2024 (SageAttention), who take it off at run time.
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
_VALUES = 1 << 15  # that are kept of a call, of whole tokens, one in a few


class KVObserver(KVRounding):
    """Keeps a sample of the keys (after the rotation) and values that pass, their extremes and the keys' sum,
    all by head and dimension."""

    def __init__(self) -> None:
        self._sampled: dict[str, list[Tensor]] = {"k": [], "v": []}
        self._sum, self._num_tokens = torch.zeros(()), 0

    def __call__(self, which: str, x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2).flatten(0, 1).float()  # [num_tokens, num_kv_heads, head_dim]
        step = tokens.numel() // _VALUES | 1
        self._sampled[which].append(torch.cat([tokens[::step], tokens.amax(0)[None], tokens.amin(0)[None]]))
        if which == "k":
            self._sum = self._sum.to(x.device) + tokens.sum(0, dtype=torch.float64)
            self._num_tokens += len(tokens)
        return x

    def key_offset(self) -> Tensor:
        """fp32 [num_kv_heads, head_dim]: the mean key."""
        return (self._sum / self._num_tokens).float()

    def scales(self, cache: str, estimator: Estimator | None = None) -> dict[str, Tensor]:
        """ "k" and "v" -> fp32 [1], what a code of 1 stands for. estimator: None: "min-max".

        The keys' is wide enough for engines that do not know of offsets, too.
        """
        weight_type = KV_TYPES[cache]

        def highest(values: Tensor) -> Tensor:
            return estimate_range(values.flatten()[None], estimator or "min-max", weight_type=weight_type)[1]

        k, v = (torch.cat(self._sampled[which]) for which in ("k", "v"))
        highs = {"k": torch.maximum(highest(k), highest(k - self.key_offset())), "v": highest(v)}
        return {which: scale_of(high * HEADROOM[cache], weight_type) for which, high in highs.items()}


class RoundedKV(KVRounding):
    """Keys and values as the cache gives them back.

    key_offset: fp32 [num_kv_heads, head_dim], taken off before and put back; None: there is none
    """

    def __init__(self, scales: dict[str, Tensor], cache: str, key_offset: Tensor | None = None) -> None:
        self.scales = scales
        self.weight_type = KV_TYPES[cache]
        self.key_offset = torch.zeros(()) if key_offset is None else key_offset[:, None]

    def __call__(self, which: str, x: Tensor) -> Tensor:
        scale = self.scales[which]
        offset = self.key_offset.to(x.device) if which == "k" else 0.0
        return (nearest((x.float() - offset) / scale, self.weight_type) * scale + offset).to(x.dtype)
