"""int4-fp8: W4A8, int4 weights without zero points, activations rounded to e4m3 with a scale a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkernels.ops.quantized_gemm import Activation
from fastkernels.quantize.int4 import Int4

ENDING = "-fp8"


@dataclass(frozen=True)
class Int4Fp8(Int4):
    """The parts of int4 without zero points; activations as ``ops.quantize(per="token", dtype=e4m3)``."""

    activation: ClassVar[Activation | None] = "e4m3"

    @classmethod
    def parse(cls, name: str) -> Int4Fp8 | None:
        """From a name of int4 without -zeros, and -fp8 behind it; None for another name."""
        weights = Int4.parse(name.removesuffix(ENDING))
        if weights is None or weights.has_zeros or not name.endswith(ENDING):
            return None
        return cls(weights.group_size, False, weights.scale_dtype)

    @property
    def name(self) -> str:
        return super().name + ENDING

    @property
    def unrounded(self) -> str:
        return super().name
