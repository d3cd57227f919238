"""fp8: e4m3 weights with a scale a row, activations rounded to e4m3 with a scale a token.

fp8-weight: activations as they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastkernels.ops.quantized_gemm import Activation
from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, divide, usable

LARGEST = 448.0  # of e4m3


class Fp8(Scheme):
    """packed: float8_e4m3fn [out_size, in_size]; scales: fp32 [out_size, 1], largest magnitude / 448."""

    weight_type = "e4m3"
    activation: ClassVar[Activation | None] = "e4m3"

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def unrounded(self) -> str:
        return "fp8-weight"

    def block(self, in_size: int) -> tuple[int, int]:
        return 1, in_size

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        return {
            "packed": PartSpec((out_size, in_size), "float8_e4m3fn"),
            "scales": PartSpec((out_size, 1), "float32"),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return by_rows(self.checked(weight), _quantize_rows)


class Fp8Weight(Fp8):
    """fp8-weight: the parts of fp8; activations as they are."""

    activation = None

    @property
    def name(self) -> str:
        return "fp8-weight"


def _quantize_rows(rows: Tensor) -> dict[str, Tensor]:
    scales = usable(divide(rows.abs().amax(1, keepdim=True), LARGEST))
    return {"packed": to_e4m3(rows / scales), "scales": scales}


def to_e4m3(values: Tensor) -> Tensor:
    """To nearest, ties to even, at most 448 in magnitude."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
