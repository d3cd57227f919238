"""Matrix products, the ways there are to compute each on a GPU, and the rule where none was timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastkernels import ops
from fastkernels.compiler.graph import CompileError
from fastkernels.compiler.plan import Plan, Step
from fastkernels.ops.checks import dtype_name
from fastkernels.ops.gemm import (
    FIRST_SM80_TACTIC,
    LINEAR_TACTIC,
    MATMUL_FEW_TILES,
    MATMUL_SM80_TILES,
    MATMUL_TILES,
    MatmulTile,
)
from fastkernels.ops.quantized_gemm import WITH_ZEROS
from fastkernels.ops.weight_only import has_tile, takes_e4m3
from fastkernels.quantize import Repacked, Rounded, find_scheme

# Numbers of tokens that are timed. A tactic holds for all above the bucket before, and the last for more.
BUCKETS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192),
)

HOPPER = (9, 0)


def bucket_of(num_tokens: int) -> int:
    return next((bucket for bucket in BUCKETS if bucket >= num_tokens), BUCKETS[-1])


def buckets_up_to(num_tokens: int) -> list[int]:
    """Those that steps of 1 to num_tokens tokens fall into."""
    return [bucket for bucket in BUCKETS if bucket <= bucket_of(num_tokens)]


class Tactic(NamedTuple):
    """kernel: "torch" (cuBLAS), or an op of fastkernels; number: of its own tactics, where it has some."""

    kernel: str
    number: int | None = None

    def __str__(self) -> str:
        return self.kernel if self.number is None else f"{self.kernel} {self.number}"

    @classmethod
    def parse(cls, text: str) -> Tactic:
        """What str() gave. Raises ValueError for what is no tactic."""
        kernel, _, number = text.partition(" ")
        return cls(kernel, int(number) if number else None)


TORCH = Tactic("torch")
STREAM = Tactic("linear")
MOST_STREAMED_TOKENS = 8
"""That linear's kernel multiplies at once; with more, it would read the weight twice."""
MOST_FEW_TOKENS = max(tile.columns for tile in MATMUL_FEW_TILES)
"""That Hopper's tiles for few tokens multiply at once."""


@dataclass(frozen=True)
class Product:
    """A product of a plan, whatever its tokens: [num_tokens, in_size] times [out_size, in_size], transposed.

    op:     of its step: "linear", "matmul" or "quantized_linear"
    weight: what the weight is: its dtype, the activation of ``matmul`` that goes with it, or the packed
            format of ``weight_only_linear``
    dtype:  of the result
    gated:  the rows of the weight are a gate's, then up's, and the step gives silu(gate) * up, as bytes where
            the product takes bytes: its time is that of all the step's kernels
    """

    op: str
    weight: str
    dtype: torch.dtype
    out_size: int
    in_size: int
    has_bias: bool = False
    gated: bool = False

    def __str__(self) -> str:
        result = "" if self.op == "linear" else f" {dtype_name(self.dtype)}"
        bias = " bias" if self.has_bias else ""
        gated = " gated" if self.gated else ""
        return f"{self.op} {self.weight}{result} {self.out_size}x{self.in_size}{bias}{gated}"


PRODUCT_STEPS = ("linear", "linear_silu_mul", "quantized_linear", "matmul", "matmul_silu_mul_quant")
"""Ops of steps that have a product, and so tactics on a GPU; what it gives is their last output."""


def product_of(step: Step, out_size: int, in_size: int, dtype: torch.dtype) -> Product:
    """The product that a step on a GPU computes. dtype: the model's."""
    gated = step.op in ("linear_silu_mul", "matmul_silu_mul_quant")
    if step.op in ("linear", "linear_silu_mul"):
        return Product("linear", dtype_name(dtype), dtype, out_size, in_size, len(step.inputs) == 3, gated)
    scheme = find_scheme(str(step.attributes["scheme"]))
    if step.op in ("matmul", "matmul_silu_mul_quant") and isinstance(scheme, Rounded):
        weight = str(scheme.scheme.activation)
        with_bias = 7 if weight == WITH_ZEROS else 5
        return Product("matmul", weight, dtype, out_size, in_size, len(step.inputs) == with_bias, gated)
    if step.op == "quantized_linear" and isinstance(scheme, Repacked):
        weight = scheme.packed_format(out_size, in_size)
        with_bias = 4 if scheme.rounding is None else 5
        return Product("quantized_linear", weight, dtype, out_size, in_size, len(step.inputs) == with_bias)
    raise CompileError(f"a {step.op} of the scheme {scheme.name} has no product on a GPU")


def products_of(
    plan: Plan, dtype: torch.dtype, *, max_num_tokens: int, max_num_seqs: int
) -> dict[Product, int]:
    """Every product of ``plan``, compiled for a GPU, and the most rows a step has of it."""
    found: dict[Product, int] = {}
    for step in plan.steps:
        if step.op in PRODUCT_STEPS:
            out, x = plan.buffers[step.outputs[-1]], plan.buffers[step.inputs[0]]
            product = product_of(step, out.row_size, x.row_size, dtype)
            rows = max_num_tokens if out.rows == "tokens" else max_num_seqs
            found[product] = max(rows, found.get(product, 0))
    return found


def rule(product: Product, num_tokens: int, capability: tuple[int, int] | None) -> Tactic:
    """What is taken where nothing was timed on a GPU of this compute capability; None: not known.

    With 16 bits and more tokens than Hopper's tiles for few take, cuBLAS is as fast as ``matmul``, but for
    the gate of very many, which costs it a kernel more (docs/kernels/gemm.md).
    """
    if product.op == "matmul":
        # -1 is this one too; by its name the tuner knows its time.
        return Tactic("matmul", LINEAR_TACTIC if _streams_bytes(product, num_tokens) else -1)
    if product.op == "quantized_linear":
        return Tactic("weight_only_linear", 0)
    if _streams(product, num_tokens):
        return STREAM
    if not _has_hopper_matmul(product, capability):
        return TORCH
    own = Tactic("matmul", -1)
    return own if num_tokens <= MOST_FEW_TOKENS or gates(product, own, num_tokens, capability) else TORCH


LEAST_GATED_TOKENS = 1024
"""From which on the activation in ``matmul``'s epilogue takes less than a kernel behind it."""


def gates(product: Product, tactic: Tactic, num_tokens: int, capability: tuple[int, int] | None) -> bool:
    """Whether a gated product, by this tactic and for so many tokens, computes silu(gate) * up in the
    epilogue of ``matmul``; else a kernel behind it does."""
    if not product.gated or tactic.kernel != "matmul" or tactic.number == LINEAR_TACTIC:
        return False
    return capability == HOPPER and num_tokens >= LEAST_GATED_TOKENS and product.out_size % 16 == 0


def tactics_of(product: Product, num_tokens: int, capability: tuple[int, int]) -> list[Tactic]:
    """The rule's and all others that are worth timing for so many tokens on a GPU of this compute capability,
    in a fixed order."""
    plain = rule(product, num_tokens, capability)
    if product.op == "matmul":
        return _with(plain, _matmul_tactics(product, num_tokens, capability))
    if product.op == "quantized_linear":
        return _with(plain, _weight_only_tactics(product.weight, num_tokens, capability))
    tactics = [TORCH]
    if _streams(product, num_tokens):
        tactics.append(STREAM)
    if _has_hopper_matmul(product, capability):
        tactics += _matmul_tactics(product, num_tokens, capability)
    return _with(plain, tactics)


def matmul_runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tactics of ``matmul`` may be taken for a model of this dtype, and so need its workspace."""
    return device.type == "cuda" and dtype != torch.float32


def _streams(product: Product, num_tokens: int) -> bool:
    """Whether ``ops.linear`` takes it without a tactic, in one pass over the weight."""
    return num_tokens <= MOST_STREAMED_TOKENS and product.dtype != torch.float32 and product.in_size % 8 == 0


def _has_hopper_matmul(product: Product, capability: tuple[int, int] | None) -> bool:
    """Whether ``matmul`` takes a product with weights of 16 bits."""
    whole = (product.in_size | product.out_size) % 8 == 0  # 16 bytes
    return capability == HOPPER and product.dtype != torch.float32 and whole


def _with(plain: Tactic, tactics: list[Tactic]) -> list[Tactic]:
    """The rule's is timed by the name the rule has for it, whichever of the others it comes to. The only one
    is the rule's."""
    return tactics if plain in tactics or len(tactics) == 1 else [plain, *tactics]


def _weight_only_tactics(weight: str, num_tokens: int, capability: tuple[int, int]) -> list[Tactic]:
    """Of the kernels for few tokens all, but not on Hopper with x in e4m3, and of the other the smallest tile
    that holds the tokens; for more than 128 the two largest."""
    count = ops.WEIGHT_ONLY_FEW_TACTICS if capability >= HOPPER else 1  # clusters are Hopper's
    numbers = [] if takes_e4m3(weight) and capability == HOPPER else list(range(1, count + 1))
    if capability == HOPPER:
        if num_tokens > 32:
            numbers = []
        sizes = sorted({tokens for tokens, _ in ops.WEIGHT_ONLY_TILES if has_tile(weight, tokens)})
        if num_tokens <= 128:
            sizes = [size for size in sizes if size >= num_tokens][:1]
        else:
            sizes = [size for size in sizes if size >= 128]
        numbers += [
            ops.WEIGHT_ONLY_FEW_TACTICS + 1 + index
            for index, (tokens, _) in enumerate(ops.WEIGHT_ONLY_TILES)
            if tokens in sizes
        ]
    return [Tactic("weight_only_linear", number) for number in numbers]


def _matmul_tactics(product: Product, num_tokens: int, capability: tuple[int, int]) -> list[Tactic]:
    """Of Hopper's tiles for few tokens the rule (-1) takes the one that is the best among a step's other
    kernels; another may be a sixth faster alone, and 7 us a layer slower there (docs/kernels/gemm.md)."""
    if capability == HOPPER:
        tiles = [
            Tactic("matmul", 2 * index + shared)
            for index, tile in enumerate(MATMUL_TILES)
            if _computes(tile, product.weight) and _suits(tile, num_tokens)
            for shared in (0, 1)
        ]
    else:
        tiles = [Tactic("matmul", FIRST_SM80_TACTIC + index) for index in range(len(MATMUL_SM80_TILES))]
    return [*tiles, Tactic("matmul", LINEAR_TACTIC)] if _streams_bytes(product, num_tokens) else tiles


def _streams_bytes(product: Product, num_tokens: int) -> bool:
    """Whether the tactic of few tokens takes a product of ``matmul``."""
    takes = product.weight in ("e4m3", "e4m3-block", "e5m2", "int8", WITH_ZEROS)
    return takes and num_tokens <= MOST_STREAMED_TOKENS and product.in_size % 16 == 0


def _computes(tile: MatmulTile, weight: str) -> bool:
    """Whether the kernel has this tile, as has_matmul_tile in csrc/gemm/matmul_sm90.h says, and adds up with
    as many bits as an engine should: with 256 columns, fp8 has 14."""
    if weight == "e5m2":
        return tile.columns < 256 and (tile.columns != 128 or tile.cluster == 1)
    if tile.columns == 192:
        return weight.startswith("e4m3")
    if weight == "e4m3-block":
        return tile.columns <= (128 if tile.tokens_are_a else 64)
    return weight != "e4m3" or tile.columns < 256


def _suits(tile: MatmulTile, num_tokens: int) -> bool:
    """Leaves out what cannot win: half of the rows empty, or the weight read from L2 many times."""
    return num_tokens > 64 if tile.tokens_are_a else num_tokens <= 256
