"""A scheme that rounds activations too, as engines on a GPU hold it: row-major, for `matmul` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkernels.ops.quant import Per
from fastkernels.ops.quantized_gemm import QUANTIZED
from fastkernels.quantize.repacked import SUFFIX
from fastkernels.quantize.scheme import PartSpec, QuantizationError, Scheme


@dataclass(frozen=True)
class Rounded(Scheme):
    """The parts of ``scheme``, as they are. Its name is that scheme's with "@cuda" behind it.

    One layout for any number of tokens: repacked as well, for the weight-only kernel at few tokens, a weight
    would take its memory twice, and a token's keys and values would depend on how many others its step had,
    since that kernel does not round activations.
    """

    scheme: Scheme

    def __post_init__(self) -> None:
        if self.scheme.activation is None:
            raise QuantizationError(f"{self.scheme.name} leaves activations as they are; Repacked is for it")

    @property
    def name(self) -> str:
        return self.scheme.name + SUFFIX

    @property
    def rounding(self) -> tuple[Per, torch.dtype]:
        """What ``ops.quantize`` makes of activations: per, and the bytes' dtype."""
        return QUANTIZED[self.scheme.activation]

    def block(self, in_size: int) -> tuple[int, int]:
        return self.scheme.block(in_size)

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        self.require_multiple(in_size, 16, "16 bytes")
        if out_size % 8:
            raise QuantizationError(
                f"{self.name} takes a multiple of 8 rows, 16 bytes of a token's result; this weight has "
                f"{out_size}"
            )
        return self.scheme.parts(out_size, in_size)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.checked(weight)
        return self.scheme.quantize(weight)

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scheme.dequantize(parts, dtype)
