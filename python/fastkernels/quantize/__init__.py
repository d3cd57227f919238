"""How a weight is quantised: one scheme a file, used by the loader and by the compiler's pass alike.

Scheme names: ``fp8``, ``fp8-block``, ``fp8-weight``, ``fp8-block-weight``, ``int8``, ``int8-zeros``,
``int8-weight``, ``int4``, ``int4-fp8``, ``nvfp4``, ``mxfp4``. ``int4`` takes endings: ``int4-g32``,
``int4-g64``, ``int4-g128`` (which is ``int4``) and ``int4-channel`` say how many neighbours share a scale,
``-zeros`` behind any of them gives every group a zero point, and ``-fp16`` or ``-fp32`` behind that holds
scales as checkpoints have them. ``-fp8`` behind one without zero points rounds activations to e4m3.
``@cuda`` behind a name is the same weights in the layout of the GPU's kernel, which engines on CUDA hold;
``on_cuda`` says which a GPU has, and ``stored_on_cuda`` which it has for weights of a quantised checkpoint.

The package can be called: ``fastkernels.quantize(MODEL, OUT, scheme=...)`` is
``fastkernels.quantize_checkpoint``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fastkernels.quantize.fp8 import Fp8, Fp8Weight
from fastkernels.quantize.fp8_block import Fp8Block, Fp8BlockWeight
from fastkernels.quantize.int4 import Int4
from fastkernels.quantize.int4_fp8 import Int4Fp8
from fastkernels.quantize.int8 import Int8, Int8Zeros
from fastkernels.quantize.int8_weight import Int8Weight
from fastkernels.quantize.mxfp4 import Mxfp4
from fastkernels.quantize.nvfp4 import Nvfp4
from fastkernels.quantize.repacked import SUFFIX, Repacked
from fastkernels.quantize.rounded import Rounded
from fastkernels.quantize.scheme import PartSpec, QuantizationError, Scheme

__all__ = [
    "SCHEMES",
    "PartSpec",
    "QuantizationError",
    "Repacked",
    "Rounded",
    "Scheme",
    "find_scheme",
    "on_cuda",
    "stored_on_cuda",
]

SCHEMES: dict[str, Callable[[], Scheme]] = {
    "fp8": Fp8,
    "fp8-block": Fp8Block,
    "int8": Int8,
    "int8-zeros": Int8Zeros,
    "int8-weight": Int8Weight,
    "int4": Int4,
    "int4-fp8": Int4Fp8,
    "nvfp4": Nvfp4,
    "mxfp4": Mxfp4,
    "fp8-weight": Fp8Weight,
    "fp8-block-weight": Fp8BlockWeight,
}


def find_scheme(name: str) -> Scheme:
    """The scheme called ``name``. Raises QuantizationError listing those there are."""
    if name.endswith(SUFFIX):
        inner = find_scheme(name.removesuffix(SUFFIX))
        return Repacked(inner) if inner.activation is None or inner.weight_type == "int4" else Rounded(inner)
    if name in SCHEMES:
        return SCHEMES[name]()
    scheme = Int4Fp8.parse(name) or Int4.parse(name)
    if scheme is None:
        raise QuantizationError(
            f"no quantization scheme is called {name!r}; there are {', '.join(SCHEMES)}, and of int4 also "
            "int4-g32, int4-g64 and int4-channel, each with -zeros or without, then with -fp16, -fp32 or "
            "without, and without -zeros also with -fp8"
        )
    return scheme


def on_cuda(name: str, capability: tuple[int, int]) -> str:
    """The name of the scheme ``name`` as an engine on a GPU of this compute capability holds it.

    Raises QuantizationError for a GPU that has no kernels of them.
    """
    name = name.removesuffix(SUFFIX)
    find_scheme(name)  # raises where there is none
    if capability < (8, 0):
        raise QuantizationError(
            f"quantised weights are for GPUs of compute capability 8.0 and later; this one has "
            f"{capability[0]}.{capability[1]}"
        )
    return name + SUFFIX


def stored_on_cuda(name: str, out_size: int, in_size: int, capability: tuple[int, int]) -> str:
    """As ``on_cuda``, of a weight [out_size, in_size] that a checkpoint holds in the scheme ``name``.

    Where activations cannot be rounded, for a weight of these sizes, they are left as they are, which is no
    less exact: "fp8-weight@cuda" for "fp8".
    """
    scheme = find_scheme(name)
    rounded = on_cuda(name, capability)
    if scheme.activation is None:
        return rounded
    try:
        find_scheme(rounded).parts(out_size, in_size)
        return rounded
    except QuantizationError:
        return on_cuda(scheme.unrounded, capability)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from fastkernels.quantize.run import quantize_checkpoint

        return quantize_checkpoint(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
