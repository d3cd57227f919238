"""int8: W8A8, int8 weights with a scale a row, activations rounded to int8 with a scale a token."""

from __future__ import annotations

from fastkernels.quantize.int8_weight import Int8Weight


class Int8(Int8Weight):
    """The parts of int8-weight; activations as ``ops.quantize(per="token", dtype=torch.int8)``."""

    activation = "int8"

    @property
    def name(self) -> str:
        return "int8"
