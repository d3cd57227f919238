"""mxfp4: e2m1 weights with a power of two for 32 neighbours as their scale, activations as they are.

Source: Open Compute Project 2023, OCP Microscaling Formats (MX) Specification, section 5.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.quantize.scheme import PartSpec, Scheme, by_rows, pack_nibbles, to_e2m1, usable

BLOCK = 32


class Mxfp4(Scheme):
    """packed: uint8 [out_size, in_size / 2], two neighbours a byte, the first in the low half
    scales: uint8 [out_size, in_size / 32]; a weight is 2^(scale - 127) * e2m1

    The scale is the smallest that leaves the largest magnitude at most 7, which becomes 6: no weight is off
    by more than half a step. (The specification's rule lets it be just below 8.)
    """

    weight_type = "e2m1"

    @property
    def name(self) -> str:
        return "mxfp4"

    def block(self, in_size: int) -> tuple[int, int]:
        return 1, BLOCK

    def parts(self, out_size: int, in_size: int) -> dict[str, PartSpec]:
        self.require_multiple(in_size, BLOCK, "its blocks")
        return {
            "packed": PartSpec((out_size, in_size // 2), "uint8"),
            "scales": PartSpec((out_size, in_size // BLOCK), "uint8"),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return by_rows(self.checked(weight), _quantize_rows)


def _quantize_rows(rows: Tensor) -> dict[str, Tensor]:
    blocks = rows.unflatten(1, (-1, BLOCK))
    # magnitude = mantissa 2^exponent, the mantissa from 1/2
    mantissa, exponent = torch.frexp(usable(blocks.abs().amax(2)))
    exponent = (exponent - 3 + (mantissa > 0.875)).clamp_(-127, 127)
    codes = to_e2m1(torch.ldexp(blocks, -exponent[..., None]))
    return {"packed": pack_nibbles(codes.flatten(1)), "scales": (exponent + 127).to(torch.uint8)}
