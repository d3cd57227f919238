"""silu_mul and gelu_mul, both with a quantised result, and quantize alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.harness import Case, Row, run_cases
from benchmarks.peers import compiled, vllm_name, vllm_ops
from benchmarks.shapes import shapes_for, tokens_label
from fastkernels import ops
from fastkernels.ops import reference

_QUANT = {  # what is quantised
    "silu_mul_quant": (ops.silu_mul_quant, reference.silu_mul),
    "gelu_mul_quant": (ops.gelu_mul_quant, reference.gelu_mul),
    "quantize": (ops.quantize, None),
}
_AT_LARGEST = [("silu_mul_quant", "tensor"), ("quantize", "tensor")]
_AT_LARGEST += [("gelu_mul_quant", per) for per in ("tensor", "token", "block")]


class Inputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, 2 * intermediate_size]
    out: torch.Tensor  # [num_tokens, intermediate_size]


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick, compile_peers), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool, compile_peers: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    vllm = vllm_ops() if device.type == "cuda" else None
    activations = (
        ("silu_mul", ops.silu_mul, reference.silu_mul, getattr(vllm, "silu_and_mul", None)),
        ("gelu_mul", ops.gelu_mul, reference.gelu_mul, getattr(vllm, "gelu_and_mul", None)),
    )
    for name, ours, plain, by_vllm in activations:
        for num_tokens in shapes.tokens:
            size = (num_tokens, shapes.intermediate_size)
            yield _case(name, ours, plain, by_vllm, size, shapes.dtype, device, compile_peers)
    for name in ("silu_mul_quant", "quantize"):
        for per in ("token", "block"):
            for num_tokens in shapes.tokens:
                yield _quant_case(name, per, (num_tokens, shapes.intermediate_size), shapes.dtype, device)
    largest = (shapes.tokens[-1], shapes.intermediate_size)
    for name, per in _AT_LARGEST:
        yield _quant_case(name, per, largest, shapes.dtype, device)
    for name in ("silu_mul_quant", "quantize"):
        yield _quant_case(name, "token", largest, shapes.dtype, device, torch.int8)


def _case(name, ours, plain, by_vllm, size, dtype, device, compile_peers) -> Case:
    num_tokens, width = size

    def make() -> Inputs:
        x = torch.randn(num_tokens, 2 * width, dtype=dtype, device=device)
        return Inputs(x, x.new_empty(num_tokens, width))

    peers = {"torch eager": lambda i: lambda: plain(i.x)}
    if compile_peers:
        fused = compiled(plain)
        peers["torch.compile"] = lambda i: lambda: fused(i.x)
    if by_vllm is not None:
        peers[f"{vllm_name()} {name.replace('_', '_and_')}"] = lambda i: (
            lambda: (by_vllm(i.out, i.x), i.out)[1]
        )
    return Case(
        name,
        tokens_label(num_tokens),
        dtype,
        make=make,
        ours=lambda i: lambda: ours(i.x, out=i.out),
        expect=lambda i: plain(i.x.float()),
        num_bytes=3 * num_tokens * width * dtype.itemsize,
        peers=peers,
    )


def _quant_case(
    name: str,
    per: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    result: torch.dtype = torch.float8_e4m3fn,
) -> Case:
    num_tokens, width = size
    op, plain = _QUANT[name]
    halves = 1 if plain is None else 2

    def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(num_tokens, halves * width, dtype=dtype, device=device)
        out = torch.empty(num_tokens, width, dtype=result, device=device)
        shape = {"tensor": (1,), "token": (num_tokens,), "block": (num_tokens, width // 128)}[per]
        return x, out, torch.full(shape, 0.02, device=device)

    def ours(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
        x, out, scales = given
        return lambda: op(x, per=per, scales=scales, dtype=result, out=out)

    def expect(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, scales = given[0].float(), given[2].clone() if per == "tensor" else None
        return reference.quantize(x if plain is None else plain(x), per, scales, result)

    def by_torch(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
        x, out, scales = given
        return lambda: ops.quantize(plain(x), per=per, scales=scales, dtype=result, out=out)

    return Case(
        name,
        f"{'int8, ' if result == torch.int8 else ''}per {per}, {tokens_label(num_tokens)}",
        dtype,
        make=make,
        ours=ours,
        expect=expect,
        num_bytes=num_tokens * width * (halves * dtype.itemsize + 1),
        peers={} if plain is None else {"torch eager, our quantize": by_torch},
    )
