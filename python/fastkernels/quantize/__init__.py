"""How a weight is quantised: one scheme a file, used by the loader and by the compiler's pass alike.

Scheme names: ``fp8``, ``fp8-block``, ``fp8-weight``, ``fp8-block-weight``, ``int8``, ``int8-weight``,
``int4``, ``nvfp4``, ``mxfp4``. ``int4`` takes endings: ``int4-g32``, ``int4-g64``, ``int4-g128`` (which is
``int4``) and ``int4-channel`` say how many neighbours share a scale, ``-zeros`` behind any of them gives
every group a zero point, and ``-fp16`` or ``-fp32`` behind that holds scales as checkpoints have them.
``@cuda`` behind a name is the same weights in the layout of the GPU's kernel, which engines on CUDA hold.
"""

from __future__ import annotations

from collections.abc import Callable

from fastkernels.quantize.fp8 import Fp8, Fp8Weight
from fastkernels.quantize.fp8_block import Fp8Block, Fp8BlockWeight
from fastkernels.quantize.int4 import Int4
from fastkernels.quantize.int8 import Int8
from fastkernels.quantize.int8_weight import Int8Weight
from fastkernels.quantize.mxfp4 import Mxfp4
from fastkernels.quantize.nvfp4 import Nvfp4
from fastkernels.quantize.repacked import SUFFIX, Repacked
from fastkernels.quantize.scheme import PartSpec, QuantizationError, Scheme

__all__ = ["SCHEMES", "PartSpec", "QuantizationError", "Repacked", "Scheme", "find_scheme"]

SCHEMES: dict[str, Callable[[], Scheme]] = {
    "fp8": Fp8,
    "fp8-block": Fp8Block,
    "int8": Int8,
    "int8-weight": Int8Weight,
    "int4": Int4,
    "nvfp4": Nvfp4,
    "mxfp4": Mxfp4,
    "fp8-weight": Fp8Weight,
    "fp8-block-weight": Fp8BlockWeight,
}


def find_scheme(name: str) -> Scheme:
    """The scheme called ``name``. Raises QuantizationError listing those there are."""
    if name.endswith(SUFFIX):
        return Repacked(find_scheme(name.removesuffix(SUFFIX)))
    if name in SCHEMES:
        return SCHEMES[name]()
    scheme = Int4.parse(name)
    if scheme is None:
        raise QuantizationError(
            f"no quantization scheme is called {name!r}; there are {', '.join(SCHEMES)}, and of int4 also "
            "int4-g32, int4-g64 and int4-channel, each with -zeros or without, and then with -fp16, -fp32 or "
            "without"
        )
    return scheme
