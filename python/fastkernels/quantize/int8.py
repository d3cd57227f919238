"""int8: W8A8, int8 weights with a scale a row, activations rounded to int8 with a scale a token.

int8-zeros: with a zero point a token too.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastkernels.ops.gemm import MAX_IN_SIZE_WITH_ZEROS
from fastkernels.ops.quantized_gemm import Activation, row_sums
from fastkernels.quantize.int8_weight import Int8Weight
from fastkernels.quantize.scheme import PartSpec, QuantizationError


class Int8(Int8Weight):
    """The parts of int8-weight; activations as ``ops.quantize(per="token", dtype=torch.int8)``."""

    activation: ClassVar[Activation | None] = "int8"

    @property
    def name(self) -> str:
        return "int8"


class Int8Zeros(Int8Weight):
    """The parts of int8-weight, and sums: int32 [out_size], what the rows of packed add up to, which zero
    points are multiplied with; activations as ``ops.quantize_zeros``."""

    activation: ClassVar[Activation | None] = "int8-zeros"

    @property
    def name(self) -> str:
        return "int8-zeros"

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        if in_size > MAX_IN_SIZE_WITH_ZEROS:
            raise QuantizationError(
                f"{self.name} takes rows of up to {MAX_IN_SIZE_WITH_ZEROS}; this weight's have {in_size}"
            )
        return {**super().parts(out_size, in_size), "sums": PartSpec((out_size,), "int32")}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        parts = super().quantize(weight)
        return {**parts, "sums": row_sums(parts["packed"])}
