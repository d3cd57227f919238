"""What every reader of quantised checkpoints gives: how the weight of a linear lies there, and its parts.

A reader looks at names, shapes and dtypes first, so that what does not fit is refused before anything is
loaded; the values are read, and checked, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.ops.quantized_gemm import WeightType, row_sums
from fastkernels.ops.reference import dequantize_weight

Parts = dict[str, Tensor]
GROUPS = (128, 64, 32)  # of int4 that there are kernels for, the best first
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_ENDING = {torch.bfloat16: "", torch.float16: "-fp16", torch.float32: "-fp32"}


class Tensors(Protocol):
    """As a ``Checkpoint`` gives them."""

    @property
    def path(self) -> Path: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Module:
    """A linear of the model and its tensors in the checkpoint. method: in errors, "GPTQ" say."""

    tensors: Tensors
    name: str
    out_size: int
    in_size: int
    method: str

    def __contains__(self, leaf: str) -> bool:
        return f"{self.name}.{leaf}" in self.tensors

    @property
    def is_plain(self) -> bool:
        """It has its weight as it is, whatever the configuration says of it."""
        name = f"{self.name}.weight"
        return name in self.tensors and self.tensors.dtype(name) in FLOATS and "weight_scale" not in self

    def fail(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.tensors.path}: {self.name} {words}")

    def require(
        self,
        leaf: str,
        shapes: Collection[tuple[int, ...]],
        dtypes: Collection[torch.dtype],
        hint: str = "",
    ) -> None:
        """That the tensor is there, in one of these shapes and dtypes, by the file's header."""
        if leaf not in self:
            raise self.fail(f"has no {leaf}, without which its {self.method} weight means nothing")
        shape, dtype = self.tensors.shape(f"{self.name}.{leaf}"), self.tensors.dtype(f"{self.name}.{leaf}")
        if shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.fail(
                f"has {leaf} of shape {list(shape)}; {self.method} of a weight [{self.out_size}, "
                f"{self.in_size}] has it as {wanted}{hint}"
            )
        if dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = str(dtype).removeprefix("torch.")
            raise self.fail(f"has {leaf} in {found}; {self.method} has it in {names}")

    def read(self, leaf: str, device: torch.device) -> Tensor:
        return self.tensors.tensor(f"{self.name}.{leaf}").to(device)

    def read_scales(self, leaf: str, device: torch.device, *, zero_is_meant: bool = False) -> Tensor:
        """The scales; none may be infinite, NaN or, unless that is meant, 0."""
        scales = self.read(leaf, device)
        wide = scales.float()
        if not bool(torch.isfinite(wide).all()):
            raise self.fail(f"has NaN or infinity in {leaf}; scales are finite")
        if not zero_is_meant and not bool((wide != 0).all()):
            raise self.fail(f"has a scale of 0 in {leaf}; its weights would all be 0")
        return scales

    def num_groups(self, group_size: int | None) -> int:
        if group_size is None:
            return 1
        if self.in_size % group_size:
            raise self.fail(f"has rows of {self.in_size}, which its groups of {group_size} do not divide")
        return self.in_size // group_size


@dataclass(frozen=True)
class StoredLinear:
    """The quantised weight of one linear.

    scheme:      of ``fastkernels.quantize``, by name, whose parts ``read`` gives; None where the engine has
                 none for this format: the weight is then loaded as ``dense`` gives it
    weight_type, block: as ``ops.quantized_linear`` takes them
    load:        the parts: packed, scales, and where there are any zeros, sums, global_scale
    permutation: int64 [in_size]: column i of the parts is column permutation[i] of the weight (activation
                 order); None: they are in order
    global_scale: the value, where the scheme has one
    """

    module: Module
    scheme: str | None
    weight_type: WeightType
    block: tuple[int, int]
    load: Callable[[torch.device], Parts] = field(repr=False, compare=False)
    permutation: Tensor | None = field(default=None, repr=False, compare=False)
    global_scale: float | None = None

    @cached_property
    def order(self) -> Hashable:
        """Equal for linears whose columns are in the same order; None: in the model's."""
        return None if self.permutation is None else self.permutation.numpy().tobytes()

    @cached_property
    def alike(self) -> Hashable:
        """Linears of one input may become one where this is equal: their parts can lie below each other."""
        if self.scheme is None:
            return None
        return self.scheme, self.order, self.global_scale

    def read(self, device: torch.device | str = "cpu") -> Parts:
        """Raises CheckpointError for a scale of 0, NaN and infinity."""
        parts = self.load(torch.device(device))
        packed = parts["packed"]
        if packed.dtype == torch.float8_e4m3fn and bool((packed.view(torch.uint8) & 127 == 127).any()):
            raise self.module.fail("has NaN in its weight")
        return parts

    def dense(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_size, in_size], the columns in the model's order."""
        parts = self.read(device)
        packed, zeros = parts["packed"], parts.get("zeros")
        if self.weight_type == "int8" and zeros is not None:
            packed = packed.short() - zeros.repeat_interleave(self.block[1], 1)[:, : packed.shape[1]]
            zeros = None
        weight = dequantize_weight(
            packed,
            parts["scales"],
            self.weight_type,
            self.block,
            zeros,
            parts.get("global_scale"),
            torch.float32,
        ).to(dtype)
        if self.permutation is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.permutation.to(weight.device)] = weight
        return ordered


# --- what several formats have ---------------------------------------------------------------------------


def group_order(module: Module, leaf: str, group_size: int) -> Tensor | None:
    """From the group of each column: which columns make the first group, the second, and so on; None where
    they are in order. Raises CheckpointError unless every group has group_size columns."""
    module.require(leaf, [(module.in_size,)], [torch.int32, torch.int64])
    group_of = module.read(leaf, torch.device("cpu")).long()
    num_groups = module.num_groups(group_size)
    in_range = bool(((group_of >= 0) & (group_of < num_groups)).all())
    if not in_range or not bool((torch.bincount(group_of, minlength=num_groups) == group_size).all()):
        raise module.fail(
            f"has {leaf} that does not give each of its {num_groups} groups {group_size} columns"
        )
    order = torch.argsort(group_of, stable=True)
    return None if torch.equal(order, torch.arange(module.in_size)) else order


def int4_scheme(
    module: Module, group_size: int | None, has_zeros: bool, scale_dtype: torch.dtype
) -> tuple[str | None, int]:
    """The engine's scheme of int4 weights, None where no kernel takes groups of that size, and how many of
    its groups make one of the checkpoint's."""
    ending = f"{'-zeros' if has_zeros else ''}{_ENDING[scale_dtype]}"
    if group_size is None:
        return f"int4-channel{ending}", 1
    for group in GROUPS:
        if group_size % group == 0:
            return f"int4{'' if group == 128 else f'-g{group}'}{ending}", group_size // group
    return None, 1


def integers(
    module: Module,
    bits: int,
    group_size: int | None,
    has_zeros: bool,
    scale_dtype: torch.dtype,
    permutation: Tensor | None,
    load: Callable[[torch.device], tuple[Tensor, Tensor, Tensor | None]],
    *,
    activations: bool = False,
    activations_have_zeros: bool = False,
) -> StoredLinear:
    """A weight of 4 or 8 bits with a scale, and perhaps a zero point, a row or group.

    load: codes [out_size, in_size], or of 4 bits packed two a byte [out_size, in_size / 2], uint8, columns in
          the model's order; scales and zeros [out_size, num_groups], zeros uint8, the code of 0
    activations, activations_have_zeros: they are rounded to 8 bits too, with a zero point; with weights of 4
          bits to e4m3, and only where neither has zero points
    """
    size = group_size or module.in_size
    if bits == 8:
        fits = group_size is None and not has_zeros
        rounded = "int8-zeros" if activations_have_zeros else "int8"
        scheme = (rounded if activations else "int8-weight") if fits else None

        def load8(device: torch.device) -> Parts:
            codes, scales, zeros = load(device)
            parts = {
                "packed": (in_order(codes, permutation) ^ 128).view(torch.int8),
                "scales": scales.float(),
            }
            if scheme == "int8-zeros":
                parts["sums"] = row_sums(parts["packed"])
            return parts if zeros is None else {**parts, "zeros": (zeros ^ 128).view(torch.int8)}

        return StoredLinear(module, scheme, "int8", (1, size), load8, permutation)

    if module.in_size % 2:
        raise module.fail(f"has rows of {module.in_size}; of 4 bits fastkernels reads an even number")
    scheme, times = int4_scheme(module, group_size, has_zeros, scale_dtype)
    if scheme is not None and activations and not has_zeros and not activations_have_zeros:
        scheme += "-fp8"

    def load4(device: torch.device) -> Parts:
        packed, scales, zeros = load(device)
        if packed.shape[1] == module.in_size:
            packed = pack_nibbles(in_order(packed, permutation))
        elif permutation is not None:
            packed = pack_nibbles(in_order(unpack_nibbles(packed), permutation))
        parts = {"packed": packed, "scales": scales, **({} if zeros is None else {"zeros": zeros})}
        if times > 1:
            parts |= {k: v.repeat_interleave(times, 1) for k, v in parts.items() if k != "packed"}
        return {name: part.contiguous() for name, part in parts.items()}

    return StoredLinear(module, scheme, "int4", (1, size // times), load4, permutation)


def e4m3(
    module: Module, leaf: str, shapes: Mapping[tuple[int, ...], tuple[int, int]], *, activations: bool
) -> StoredLinear:
    """A weight of e4m3 and its scales, the tensor ``leaf``.

    shapes: those that the scales may have -> the rows and columns that share one; (0, 0): all
    """
    out_size, in_size = module.out_size, module.in_size
    module.require("weight", [(out_size, in_size)], [torch.float8_e4m3fn])
    module.require(leaf, list(shapes), [*FLOATS, torch.float8_e8m0fnu])
    rows, size = shapes[module.tensors.shape(f"{module.name}.{leaf}")]
    by_row = (rows, size) in ((0, 0), (1, in_size))
    if by_row:
        scheme: str | None = "fp8" if activations else "fp8-weight"
        block = (1, in_size)
    else:
        block = (rows, size)
        fits = block == (128, 128) and in_size % 128 == 0
        scheme = ("fp8-block" if activations else "fp8-block-weight") if fits else None

    def load(device: torch.device) -> Parts:
        scales = module.read_scales(leaf, device).float()
        scales = scales.reshape(-1, 1).expand(out_size, 1) if by_row else scales
        return {"packed": module.read("weight", device), "scales": scales.contiguous()}

    return StoredLinear(module, scheme, "e4m3", block, load)


def one_or_each_row(module: Module) -> dict[tuple[int, ...], tuple[int, int]]:
    """Shapes of scales for all of a weight, or a row each, as ``e4m3`` takes them."""
    each = (1, module.in_size)
    return {(): (0, 0), (1,): (0, 0), (1, 1): (0, 0), (module.out_size, 1): each, (module.out_size,): each}


def blocks(module: Module, rows: int, size: int) -> dict[tuple[int, ...], tuple[int, int]]:
    """The shape of scales for rows x size each, as ``e4m3`` takes it."""
    return {(-(-module.out_size // rows), -(-module.in_size // size)): (rows, size)}


def in_order(columns: Tensor, permutation: Tensor | None) -> Tensor:
    return columns if permutation is None else columns[:, permutation.to(columns.device)]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [rows, size] uint8 -> [rows, size / 2]: two neighbours a byte, the first low."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What ``pack_nibbles`` packed."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def as_bytes(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 4 n]: the lowest first."""
    return words.flatten().view(torch.uint8).view(len(words), -1)  # flat: strides of one row mean nothing


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]: the lowest bits of a word first."""
    return as_bytes(words) if bits == 8 else unpack_nibbles(as_bytes(words))


def integer_of(config: Mapping[str, Any], key: str, what: str) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise CheckpointError(f"{what} has {key} = {value!r}; it must be an integer")
    return value


def group_size_of(config: Mapping[str, Any], what: str) -> int | None:
    """None: a row, which the files call -1."""
    size = integer_of(config, "group_size", what)
    if size == -1:
        return None
    if size < 1:
        raise CheckpointError(f"{what} has group_size = {size}; it must be positive, or -1 for whole rows")
    return size
