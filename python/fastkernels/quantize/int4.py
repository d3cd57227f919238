"""int4: W4A16, a scale for 128 (32, 64) neighbours or a row, symmetric or with zero points."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, pack_nibbles, usable

_NAME = re.compile(r"int4(?:-(g32|g64|g128|channel))?(-zeros)?(-fp16|-fp32)?")
_SCALE_DTYPES = {None: "bfloat16", "-fp16": "float16", "-fp32": "float32"}


@dataclass(frozen=True)
class Int4(Scheme):
    """packed: uint8 [out_size, in_size / 2], two neighbours a byte, the first in the low half
    scales: scale_dtype [out_size, in_size / group_size]
    zeros:  uint8 of the shape of scales, only with zero points

    A weight is scale * (code - zero), with codes of 0 to 15. Symmetric: zero is 8, and scale the largest
    magnitude / 7.5, so that no weight is off by more than half a step. With zero points: scale is (largest -
    smallest) / 15, both taken with 0.

    group_size: 32, 64 or 128 neighbours; None: a row
    """

    group_size: int | None = 128
    has_zeros: bool = False
    scale_dtype: str = "bfloat16"

    weight_type = "int4"

    @classmethod
    def parse(cls, name: str) -> Int4 | None:
        """From int4[-g32|-g64|-g128|-channel][-zeros][-fp16|-fp32]; None for another name."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        group = found[1] or "g128"
        return cls(
            None if group == "channel" else int(group[1:]), found[2] is not None, _SCALE_DTYPES[found[3]]
        )

    @property
    def name(self) -> str:
        group = {None: "-channel", 128: ""}.get(self.group_size, f"-g{self.group_size}")
        ending = {"bfloat16": "", "float16": "-fp16", "float32": "-fp32"}[self.scale_dtype]
        return f"int4{group}{'-zeros' if self.has_zeros else ''}{ending}"

    def block(self, in_size: int) -> tuple[int, int]:
        return 1, self.group_size or in_size

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        if self.group_size is None:
            self.require_multiple(in_size, 2, "two in a byte")
        else:
            self.require_multiple(in_size, self.group_size, "its groups")
        shape = (out_size, in_size // self.block(in_size)[1])
        parts = {
            "packed": PartSpec((out_size, in_size // 2), "uint8"),
            "scales": PartSpec(shape, self.scale_dtype),
        }
        return {**parts, "zeros": PartSpec(shape, "uint8")} if self.has_zeros else parts

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return by_rows(self.checked(weight), self._quantize_rows)

    def _quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        groups = rows.unflatten(1, (-1, self.block(rows.shape[1])[1]))
        scale_dtype = getattr(torch, self.scale_dtype)
        if not self.has_zeros:
            scales = usable((groups.abs().amax(2) / 7.5).to(scale_dtype))
            codes = (groups / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
            return {"packed": pack_nibbles(codes.flatten(1)), "scales": scales}
        smallest, largest = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
        scales = usable(((largest - smallest) / 15).to(scale_dtype))
        zeros = (-smallest / scales.float()).round_().clamp_(0, 15)
        codes = (groups / scales.float()[..., None]).add_(zeros[..., None]).round_().clamp_(0, 15)
        return {
            "packed": pack_nibbles(codes.flatten(1)),
            "scales": scales,
            "zeros": zeros.to(torch.uint8),
        }
