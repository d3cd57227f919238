"""gate_up with its activation: silu(x gate^T) * (x up^T), in 16 bits and, for the next product, in e4m3.

Peers are a product without the gate, torch's or ours, and our activation behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.harness import Call, Case, close
from benchmarks.shapes import Shapes, tokens_label
from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.gemm import matmul

_TOKENS = (128, 512, 2048, 8192)
_TOKENS_STATIC = (512, 2048)  # with a scale that is known before


class GatedInputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    weight: torch.Tensor  # [2 * out_size, in_size], gate's rows, then up's
    both: torch.Tensor  # [num_tokens, 2 * out_size], for peers of two kernels
    out: torch.Tensor  # [num_tokens, out_size]


class ByteInputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size] e4m3
    x_scales: torch.Tensor  # [num_tokens]
    weight: torch.Tensor  # [2 * out_size, in_size] e4m3
    weight_scales: torch.Tensor  # [2 * out_size]
    both: torch.Tensor  # [num_tokens, 2 * out_size] bf16
    act: torch.Tensor  # [num_tokens, out_size] bf16
    out: torch.Tensor  # [num_tokens, out_size] e4m3
    scales: torch.Tensor  # [num_tokens], or static [1]


def cases(shapes: Shapes, device: torch.device, workspace: torch.Tensor, quick: bool) -> Iterator[Case]:
    """By Hopper's ``matmul``."""
    for num_tokens in _TOKENS[:1] if quick else _TOKENS:
        yield gated_case(num_tokens, shapes, device, workspace)
    for per, tokens in (("token", _TOKENS), ("tensor", _TOKENS_STATIC)):
        for num_tokens in tokens[:1] if quick else tokens:
            yield _byte_case(per, num_tokens, shapes, device, workspace)


def gated_case(
    num_tokens: int, shapes: Shapes, device: torch.device, workspace: torch.Tensor | None = None
) -> Case:
    """By linear's kernel, for few tokens; with a workspace by Hopper's ``matmul``."""
    out_size, in_size, dtype = shapes.intermediate_size, shapes.hidden_size, shapes.dtype
    tactic = None if workspace is None else -1

    def make() -> GatedInputs:
        x = torch.randn(num_tokens, in_size, dtype=dtype, device=device)
        weight = torch.randn(2 * out_size, in_size, dtype=dtype, device=device) * in_size**-0.5
        return GatedInputs(
            x, weight, x.new_empty(num_tokens, 2 * out_size), x.new_empty(num_tokens, out_size)
        )

    def by_torch(i: GatedInputs) -> Call:
        return lambda: ops.silu_mul(torch.mm(i.x, i.weight.t(), out=i.both), out=i.out)

    def by_two(i: GatedInputs) -> Call:
        return lambda: ops.silu_mul(ops.linear(i.x, i.weight, constant_weight=True, out=i.both), out=i.out)

    def ours(i: GatedInputs) -> Call:
        return lambda: ops.linear_silu_mul(
            i.x, i.weight, constant_weight=True, tactic=tactic, workspace=workspace, out=i.out
        )

    peers = {"torch linear, then silu_mul": by_torch}
    if workspace is None:
        peers["our linear, then silu_mul"] = by_two
    num_elements = 2 * out_size * in_size + num_tokens * (in_size + out_size)
    return Case(
        "linear_silu_mul",
        _name(num_tokens, shapes),
        dtype,
        make=make,
        ours=ours,
        expect=lambda i: reference.silu_mul(i.x.float() @ i.weight.float().t()),
        num_bytes=num_elements * dtype.itemsize,
        flops=4 * num_tokens * out_size * in_size,
        peers=peers,
    )


def _byte_case(
    per: str, num_tokens: int, shapes: Shapes, device: torch.device, workspace: torch.Tensor
) -> Case:
    """per: of the result: "token", whose scales are of its values, so that the bytes are another kernel's, or
    "tensor", whose scale is known before, so that they are the product's."""
    out_size, in_size = shapes.intermediate_size, shapes.hidden_size

    def make() -> ByteInputs:
        x = torch.randn(num_tokens, in_size, dtype=torch.bfloat16, device=device)
        weight = torch.randn(2 * out_size, in_size, dtype=torch.bfloat16, device=device)
        x_bytes, x_scales = ops.quantize(x, per="token")
        weight_scales = torch.full((2 * out_size,), 0.05 * in_size**-0.5, device=device)
        both, act = (x.new_empty(num_tokens, size) for size in (2 * out_size, out_size))
        out = torch.empty(num_tokens, out_size, dtype=x_bytes.dtype, device=device)
        scales = torch.full((1 if per == "tensor" else num_tokens,), 0.05, device=device)
        weight_bytes = weight.mul(20).to(x_bytes.dtype)
        return ByteInputs(x_bytes, x_scales, weight_bytes, weight_scales, both, act, out, scales)

    def product(i: ByteInputs, out: torch.Tensor, **epilogue: torch.Tensor | bool) -> None:
        given = (i.x, i.weight, i.x_scales, i.weight_scales, None, True, -1, workspace, out)
        matmul("matmul", *given, **epilogue)

    def ours(i: ByteInputs) -> Call:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            if per == "tensor":
                product(i, i.out, gated=True, out_scale=i.scales)
                return i.out, i.scales
            product(i, i.act, gated=True)
            return ops.quantize(i.act, per=per, scales=i.scales, out=i.out)

        return call

    def by_two(i: ByteInputs) -> Call:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            product(i, i.both)
            return ops.silu_mul_quant(i.both, per=per, scales=i.scales, out=i.out)

        return call

    def expect(i: ByteInputs) -> torch.Tensor:
        x, weight = i.x.float() * i.x_scales[:, None], i.weight.float() * i.weight_scales[:, None]
        return reference.silu_mul(x @ weight.t())

    def compare(result: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor, dtype: str) -> None:
        out, scales = result
        close(out.float() * scales[:, None], expected, "e4m3")

    static = " static" if per == "tensor" else ""
    return Case(
        "matmul_silu_mul_quant",
        f"fp8{static} {_name(num_tokens, shapes)}",
        torch.bfloat16,
        make=make,
        ours=ours,
        expect=expect,
        compare=compare,
        num_bytes=2 * out_size * in_size + num_tokens * (in_size + out_size),
        flops=4 * num_tokens * out_size * in_size,
        peers={"our product, then silu_mul_quant": by_two},
    )


def _name(num_tokens: int, shapes: Shapes) -> str:
    return f"gate_up {2 * shapes.intermediate_size} x {shapes.hidden_size}, {tokens_label(num_tokens)}"
