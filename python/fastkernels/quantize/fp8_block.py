"""fp8-block: e4m3 weights with a scale for 128 x 128 of them, activations with one for 128 neighbours.

fp8-block-weight: activations as they are.
Source: DeepSeek-AI 2024, DeepSeek-V3 Technical Report, section 3.3.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from fastkernels.ops.quantized_gemm import Activation
from fastkernels.quantize.fp8 import LARGEST, to_e4m3
from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, divide, usable

BLOCK = 128


class Fp8Block(Scheme):
    """packed: float8_e4m3fn [out_size, in_size]; scales: fp32 [ceil(out_size / 128), in_size / 128], largest
    magnitude / 448."""

    weight_type = "e4m3"
    activation: ClassVar[Activation | None] = "e4m3-block"

    @property
    def name(self) -> str:
        return "fp8-block"

    @property
    def unrounded(self) -> str:
        return "fp8-block-weight"

    def block(self, in_size: int) -> tuple[int, int]:
        return BLOCK, BLOCK

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        self.require_multiple(in_size, BLOCK, "its blocks")
        return {
            "packed": PartSpec((out_size, in_size), "float8_e4m3fn"),
            "scales": PartSpec((-(-out_size // BLOCK), in_size // BLOCK), "float32"),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return by_rows(self.checked(weight), _quantize_rows, multiple=BLOCK)


class Fp8BlockWeight(Fp8Block):
    """fp8-block-weight: the parts of fp8-block; activations as they are."""

    activation = None

    @property
    def name(self) -> str:
        return "fp8-block-weight"


def _quantize_rows(rows: Tensor) -> dict[str, Tensor]:
    whole = pad(rows, (0, 0, 0, -len(rows) % BLOCK))  # the last block may have fewer rows
    blocks = whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = usable(divide(blocks.abs().amax((1, 3)), LARGEST))
    packed = to_e4m3(blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"packed": packed[: len(rows)].contiguous(), "scales": scales}
