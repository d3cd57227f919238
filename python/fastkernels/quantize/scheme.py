"""What all schemes share: the parts of a quantised weight, rounding by rows, and errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkernels.config import ConfigError
from fastkernels.ops.quantized_gemm import Activation, WeightType
from fastkernels.ops.reference import dequantize_weight

_CHUNK = 1 << 24  # elements that are quantised at once: what the float copies take stays small


class QuantizationError(ConfigError):
    """A scheme that is not there, or a weight that it does not take; the message names what it does."""


@dataclass(frozen=True)
class PartSpec:
    """Of one tensor of a quantised weight. dtype: a name of torch's, "int8" say."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Scheme(ABC):
    """How a weight [out_size, in_size] is stored: a dictionary of parts, all row-major and contiguous.

    packed:       the weight in bytes, by weight_type as ``ops.quantized_linear`` takes it
    scales:       [ceil(out_size / rows), ceil(in_size / size)], where rows x size is ``block(in_size)``
    zeros, global_scale: where the scheme has them
    activation:   what activations are rounded to before the product
    """

    weight_type: ClassVar[WeightType]
    activation: ClassVar[Activation | None] = None

    @property
    @abstractmethod
    def name(self) -> str:
        """As ``find_scheme`` takes it."""

    @property
    def unrounded(self) -> str:
        """The scheme of the same weights that leaves activations as they are, by its name."""
        return self.name

    @abstractmethod
    def block(self, in_size: int) -> tuple[int, int]:
        """Rows and neighbours of a row that share a scale."""

    @abstractmethod
    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        """The parts of a weight of these sizes, in the order a step reads them.

        Raises QuantizationError for an in_size that the scheme's blocks do not divide.
        """

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of ``weight``, each element rounded to nearest, scales from the largest magnitudes.

        Raises QuantizationError for a shape the scheme does not take, NaN and infinity.
        """

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_size, in_size]: what the parts stand for."""
        packed = parts["packed"]
        in_size = packed.shape[1] * (2 if self.weight_type in ("int4", "e2m1") else 1)
        return dequantize_weight(
            packed,
            parts["scales"],
            self.weight_type,
            self.block(in_size),
            parts.get("zeros"),
            parts.get("global_scale"),
            dtype,
        )

    def checked(self, weight: Tensor) -> Tensor:
        """weight itself. Raises QuantizationError where ``quantize`` says so."""
        if weight.dim() != 2 or not weight.is_floating_point():
            raise QuantizationError(
                f"{self.name} takes a floating point weight [out_size, in_size]; this one is "
                f"{weight.dtype} {list(weight.shape)}"
            )
        self.parts(*weight.shape)
        if not torch.isfinite(weight.sum(dtype=torch.float64)):
            raise QuantizationError(f"{self.name} takes finite weights; this one holds NaN or infinity")
        return weight

    def require_multiple(self, in_size: int, size: int, words: str) -> None:
        if in_size % size:
            raise QuantizationError(
                f"{self.name} takes rows of a multiple of {size}, {words}; this weight's have {in_size}"
            )


def by_rows(
    weight: Tensor, quantize_rows: Callable[[Tensor], dict[str, Tensor]], multiple: int = 1
) -> dict[str, Tensor]:
    """What ``quantize_rows`` makes of some rows in fp32, of all rows, a multiple of ``multiple`` at once."""
    rows = max(_CHUNK // max(weight.shape[1], 1) // multiple, 1) * multiple
    pieces = [quantize_rows(piece.float()) for piece in weight.split(rows)]
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, the same bits on every device: by a Python number torch divides otherwise on CUDA.

    Weights lie on the midpoints of a grid more often than one would think.
    """
    return x / torch.full_like(x, by)


def usable(scales: Tensor) -> Tensor:
    """Of blocks that are all zero, whose scale would be 0: 1."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [rows, size] -> uint8 [rows, size / 2]: two neighbours a byte, the first low."""
    codes = codes.to(torch.uint8).unflatten(1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4


_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of e2m1


def to_e2m1(values: Tensor) -> Tensor:
    """fp32 -> codes 0 to 15: to nearest, ties to an even mantissa, at most 6 in magnitude."""
    magnitudes = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for index, midpoint in enumerate(_MIDPOINTS):
        codes += magnitudes >= midpoint if index % 2 else magnitudes > midpoint
    return codes | (values < 0).to(torch.uint8) << 3
