"""What ``fastkernels quantize`` takes as a scheme: how weights are stored, and the algorithm that rounds
them.

fp8  fp8-block  int8-weight       round to nearest, scales of least squared error
int8  int8-zeros                  SmoothQuant
int4-awq  int4-gptq               groups with zero points
int4-fp8                          GPTQ, groups without zero points; activations in e4m3
nvfp4  mxfp4                      round to nearest, scales of least error of the output
int4-nearest                      the base line of the two above: the largest magnitudes decide
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from fastkernels.quantize import find_scheme
from fastkernels.quantize.decoder_layers import GROUPS
from fastkernels.quantize.int4 import Int4
from fastkernels.quantize.scheme import QuantizationError, Scheme

Algorithm = Literal["nearest", "largest", "smoothquant", "awq", "gptq"]
Shape = tuple[int, int]

METHODS: dict[str, tuple[str, Algorithm]] = {
    "fp8": ("fp8", "nearest"),
    "fp8-block": ("fp8-block", "nearest"),
    "int8": ("int8", "smoothquant"),
    "int8-zeros": ("int8-zeros", "smoothquant"),
    "int8-weight": ("int8-weight", "nearest"),
    "int4-awq": ("int4-zeros", "awq"),
    "int4-gptq": ("int4-zeros", "gptq"),
    "int4-fp8": ("int4-fp8", "gptq"),
    "nvfp4": ("nvfp4", "nearest"),
    "mxfp4": ("mxfp4", "nearest"),
    "int4-nearest": ("int4-zeros", "largest"),
}
GROUP_SIZES = (128, 64, 32)
FINE = "int8-weight"  # what --target-bits gives the linears that are worth it
KV_CACHES = ("fp8", "int8")


@dataclass(frozen=True)
class Method:
    """name: as it was asked for; scheme: what the checkpoint holds"""

    name: str
    scheme: Scheme
    algorithm: Algorithm

    @property
    def needs_inputs(self) -> bool:
        """Whether the algorithm looks at what the linear reads."""
        return self.algorithm in ("smoothquant", "awq", "gptq") or self.scheme.weight_type == "e2m1"

    def bits(self, shape: Shape) -> float:
        """Of a weight, its scales included."""
        parts = self.scheme.parts(*shape).values()
        total = 0
        for part in parts:
            elements = 1
            for size in part.shape:
                elements *= size
            total += elements * part.torch_dtype.itemsize * 8
        return total / (shape[0] * shape[1])


def method_for(name: str, module: str, shape: Shape, group_size: int = 128) -> Method:
    """The method called ``name`` for a linear; int4 takes groups of group_size, or the largest below it that
    divides the rows, else one a row. Raises QuantizationError naming the module and what would do."""
    if name not in METHODS:
        raise QuantizationError(f"no scheme is called {name!r}; there are {', '.join(METHODS)}")
    stored, algorithm = METHODS[name]
    scheme = find_scheme(stored)
    if isinstance(scheme, Int4):
        if group_size not in GROUP_SIZES:
            raise QuantizationError(
                f"group_size is {group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}"
            )
        fits = [size for size in GROUP_SIZES if size <= group_size and shape[1] % size == 0]
        scheme = replace(scheme, group_size=fits[0] if fits else None)
    try:
        scheme.parts(*shape)
    except QuantizationError as error:
        raise QuantizationError(
            f"{module} cannot be quantised: {error}; leave it out with --exclude, or give it a scheme of its "
            f"own with --keep SCHEME:{module}"
        ) from None
    return Method(name, scheme, algorithm)


def assign_methods(
    shapes: Mapping[str, Shape],
    scheme: str,
    *,
    group_size: int = 128,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> dict[str, Method]:
    """The method of every linear that is to be quantised, by its full name.

    shapes:  of all linears, "lm_head" among them where it has a weight of its own; it is left as it is unless
             keep names it
    exclude: patterns (*, ?) of names that stay as they are: "lm_head", "*.down_proj", "model.layers.0.*"
    keep:    "SCHEME:PATTERN", schemes of their own; of several that match, the last counts
    Raises QuantizationError for an unknown scheme, a pattern that no linear matches, and linears of one input
    (q, k and v; gate and up), which engines merge, that would get different ones.
    """
    chosen = {name: scheme for name in shapes if name != "lm_head"}
    for entry in keep:
        kept, colon, pattern = entry.partition(":")
        if not colon:
            raise QuantizationError(
                f"--keep {entry} says no scheme; it must be SCHEME:PATTERN, fp8:*.down_proj say"
            )
        chosen |= dict.fromkeys(_matching(pattern, shapes, "--keep"), kept)
    for pattern in exclude:
        for name in _matching(pattern, {**shapes, "lm_head": (0, 0)}, "--exclude"):
            chosen.pop(name, None)
    for name in shapes:
        group = next((g for g in GROUPS if name.endswith("." + g.linears[0])), None)
        if group is None:
            continue
        prefix = name.removesuffix(group.linears[0])
        found = {other: chosen.get(prefix + other) for other in group.linears}
        if len(set(found.values())) > 1:
            words = ", ".join(f"{other.split('.')[1]} {one or 'as it is'}" for other, one in found.items())
            raise QuantizationError(
                f"the linears of {prefix.rstrip('.')} that read one input must have one scheme, since "
                f"engines merge them; these were asked for: {words}"
            )
    if not chosen:
        raise QuantizationError("nothing is left to quantise: --exclude names every linear")
    return {name: method_for(one, name, shapes[name], group_size) for name, one in chosen.items()}


def _matching(pattern: str, shapes: Mapping[str, Shape], option: str) -> list[str]:
    found = [name for name in shapes if fnmatchcase(name, pattern)]
    if not found:
        examples = ", ".join(list(shapes)[:2])
        raise QuantizationError(f"{option} {pattern} matches no linear; their names are {examples}, ...")
    return found
