"""int8-weight: W8A16, int8 weights with a scale a row, activations as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, divide, usable


class Int8Weight(Scheme):
    """packed: int8 [out_size, in_size], -127 to 127; scales: fp32 [out_size, 1], largest magnitude / 127."""

    weight_type = "int8"

    @property
    def name(self) -> str:
        return "int8-weight"

    @property
    def unrounded(self) -> str:
        return "int8-weight"

    def block(self, in_size: int) -> tuple[int, int]:
        return 1, in_size

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        return {
            "packed": PartSpec((out_size, in_size), "int8"),
            "scales": PartSpec((out_size, 1), "float32"),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return by_rows(self.checked(weight), _quantize_rows)


def _quantize_rows(rows: Tensor) -> dict[str, Tensor]:
    scales = usable(divide(rows.abs().amax(1, keepdim=True), 127))
    return {"packed": (rows / scales).round_().clamp_(-127, 127).to(torch.int8), "scales": scales}
