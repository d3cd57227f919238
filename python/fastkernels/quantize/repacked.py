"""A scheme's weights in the layout that the GPU's weight-only kernel streams: repacked as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkernels.ops.quant import Per
from fastkernels.ops.quantized_gemm import QUANTIZED
from fastkernels.ops.weight_only import packed_format_of, packed_shape, repack_for_cuda
from fastkernels.quantize.scheme import PartSpec, QuantizationError, Scheme

SUFFIX = "@cuda"


@dataclass(frozen=True)
class Repacked(Scheme):
    """packed:   uint8, the units of csrc/gemm/weight_only.h
    row_factors: fp32 [out_size]

    Its name is that of the scheme it repacks with "@cuda" behind it. That leaves activations as they are, or
    is int4 with activations in e4m3, which has a layout of its own.
    """

    scheme: Scheme

    def __post_init__(self) -> None:
        if self.scheme.activation is not None and self.scheme.weight_type != "int4":
            raise QuantizationError(
                f"{self.scheme.name} rounds activations, which this layout's kernel does for int4 alone"
            )

    @property
    def rounding(self) -> tuple[Per, torch.dtype] | None:
        """What ``ops.quantize`` makes of activations, per and the bytes' dtype; None: they are left alone."""
        return None if self.scheme.activation is None else QUANTIZED[self.scheme.activation]

    @property
    def name(self) -> str:
        return self.scheme.name + SUFFIX

    def block(self, in_size: int) -> tuple[int, int]:
        return self.scheme.block(in_size)

    def packed_format(self, out_size: int, in_size: int) -> str:
        parts = self.scheme.parts(out_size, in_size)
        return packed_format_of(
            self.scheme.weight_type,
            self.block(in_size),
            in_size,
            "zeros" in parts,
            parts["scales"].torch_dtype,
            self.scheme.activation,
        )

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        self.require_multiple(in_size, 8 if self.scheme.activation is None else 16, "16 bytes of activations")
        shape = packed_shape(self.packed_format(out_size, in_size), out_size, in_size)
        return {"packed": PartSpec(shape, "uint8"), "row_factors": PartSpec((out_size,), "float32")}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        out_size, in_size = weight.shape
        self.parts(out_size, in_size)
        return self.repack(self.scheme.quantize(weight), in_size)

    def repack(self, parts: Mapping[str, Tensor], in_size: int) -> dict[str, Tensor]:
        """From the parts of the scheme that it repacks."""
        repacked = repack_for_cuda(
            parts["packed"],
            parts["scales"],
            weight_type=self.scheme.weight_type,
            block=self.block(in_size),
            zeros=parts.get("zeros"),
            global_scale=parts.get("global_scale"),
            activation=self.scheme.activation,
        )
        return {"packed": repacked.packed, "row_factors": repacked.row_factors}

    def dequantize(self, parts: object, dtype: torch.dtype = torch.float32) -> Tensor:
        raise QuantizationError(
            f"{self.name} is a layout for the GPU; dequantize what {self.scheme.name} makes"
        )
