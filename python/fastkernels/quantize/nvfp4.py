"""nvfp4: e2m1 weights, an e4m3 scale for 16 neighbours and one fp32 scale for all, activations as they are.

Source: NVIDIA 2025, Pretraining Large Language Models with NVFP4, section 2.
"""

from __future__ import annotations

from torch import Tensor

from fastkernels.quantize.fp8 import LARGEST, to_e4m3
from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, divide, pack_nibbles, to_e2m1, usable

BLOCK = 16
LARGEST_E2M1 = 6.0


class Nvfp4(Scheme):
    """packed: uint8 [out_size, in_size / 2], two neighbours a byte, the first in the low half
    scales: float8_e4m3fn [out_size, in_size / 16]
    global_scale: fp32 [1], the largest magnitude / 6 / 448; a weight is global_scale * scale * e2m1
    """

    weight_type = "e2m1"

    @property
    def name(self) -> str:
        return "nvfp4"

    def block(self, in_size: int) -> tuple[int, int]:
        return 1, BLOCK

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        self.require_multiple(in_size, BLOCK, "its blocks")
        return {
            "packed": PartSpec((out_size, in_size // 2), "uint8"),
            "scales": PartSpec((out_size, in_size // BLOCK), "float8_e4m3fn"),
            "global_scale": PartSpec((1,), "float32"),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        largest = self.checked(weight).abs().amax().float() if weight.numel() else weight.new_ones(()).float()
        global_scale = usable(divide(largest, LARGEST_E2M1 * LARGEST))

        def quantize_rows(rows: Tensor) -> dict[str, Tensor]:
            blocks = rows.unflatten(1, (-1, BLOCK)) / global_scale
            scales = to_e4m3(divide(blocks.abs().amax(2), LARGEST_E2M1))
            codes = to_e2m1(blocks / usable(scales.float())[..., None])
            return {"packed": pack_nibbles(codes.flatten(1)), "scales": scales}

        return {**by_rows(weight, quantize_rows), "global_scale": global_scale.view(1)}
