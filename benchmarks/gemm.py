"""linear and weight_only_linear: the products of a decode step at Llama-3.1-8B's shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.harness import Case, Row, run_cases
from benchmarks.shapes import Shapes, shapes_for, tokens_label
from fastkernels import ops
from fastkernels.quantize import Repacked, find_scheme

WEIGHT_ONLY = ("int4", "int4-zeros", "int8-weight", "nvfp4", "mxfp4")  # schemes


class Inputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    weight: torch.Tensor  # [out_size, in_size]
    out: torch.Tensor  # [num_tokens, out_size]


class WeightOnlyInputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    full: torch.Tensor  # [out_size, in_size]: the peer's weight
    parts: dict[str, torch.Tensor]  # of the scheme
    weight: ops.RepackedWeight
    out: torch.Tensor  # [num_tokens, out_size]


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick), device=device, quick=quick, only=only)


def _products(s: Shapes) -> dict[str, tuple[int, int]]:
    """Name -> (out_size, in_size)."""
    return {
        "qkv": ((s.num_q_heads + 2 * s.num_kv_heads) * s.head_dim, s.hidden_size),
        "o": (s.hidden_size, s.num_q_heads * s.head_dim),
        "gate_up": (2 * s.intermediate_size, s.hidden_size),
        "down": (s.hidden_size, s.intermediate_size),
        "head": (s.vocab_size, s.hidden_size),
    }


def _cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    for num_tokens in (1, 16) if quick else (1, 4, 8, 12, 16):
        for name, (out_size, in_size) in _products(shapes).items():
            yield _case(name, num_tokens, out_size, in_size, shapes.dtype, device)
    if device.type != "cuda":
        return
    for scheme in WEIGHT_ONLY[:1] if quick else WEIGHT_ONLY:
        for num_tokens in (1, 16) if quick else (1, 4, 8, 16, 32, 64):
            for name, (out_size, in_size) in _products(shapes).items():
                yield _weight_only_case(scheme, name, num_tokens, out_size, in_size, shapes.dtype, device)


def _case(
    name: str, num_tokens: int, out_size: int, in_size: int, dtype: torch.dtype, device: torch.device
) -> Case:
    def make() -> Inputs:
        x = torch.randn(num_tokens, in_size, dtype=dtype, device=device)
        weight = torch.randn(out_size, in_size, dtype=dtype, device=device) * in_size**-0.5
        return Inputs(x, weight, x.new_empty(num_tokens, out_size))

    num_elements = out_size * in_size + num_tokens * (in_size + out_size)
    return Case(
        "linear",
        f"{name} {out_size} x {in_size}, {tokens_label(num_tokens)}",
        dtype,
        make=make,
        ours=lambda i: lambda: ops.linear(i.x, i.weight, constant_weight=True, out=i.out),
        expect=lambda i: i.x.float() @ i.weight.float().t(),
        num_bytes=num_elements * dtype.itemsize,
        flops=2 * num_tokens * out_size * in_size,
        peers={"torch mm": lambda i: lambda: torch.mm(i.x, i.weight.t(), out=i.out)},
    )


def _weight_only_case(
    scheme_name: str,
    name: str,
    num_tokens: int,
    out_size: int,
    in_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    scheme = find_scheme(scheme_name)
    layout = Repacked(scheme)

    def make() -> WeightOnlyInputs:
        x = torch.randn(num_tokens, in_size, dtype=dtype, device=device)
        full = torch.randn(out_size, in_size, dtype=dtype, device=device) * in_size**-0.5
        given = scheme.quantize(full)
        repacked = ops.repack_for_cuda(
            given["packed"],
            given["scales"],
            weight_type=scheme.weight_type,
            block=scheme.block(in_size),
            zeros=given.get("zeros"),
            global_scale=given.get("global_scale"),
        )
        return WeightOnlyInputs(x, full, given, repacked, x.new_empty(num_tokens, out_size))

    num_bytes = sum(
        math.prod(part.shape) * part.torch_dtype.itemsize for part in layout.parts(out_size, in_size).values()
    )
    return Case(
        "weight_only_linear",
        f"{scheme_name} {name} {out_size} x {in_size}, {tokens_label(num_tokens)}",
        dtype,
        make=make,
        ours=lambda i: lambda: ops.weight_only_linear(i.x, i.weight, constant_weight=True, out=i.out),
        expect=lambda i: i.x.float() @ scheme.dequantize(i.parts).t(),
        num_bytes=num_bytes + num_tokens * (in_size + out_size) * dtype.itemsize,
        flops=2 * num_tokens * out_size * in_size,
        peers={"torch mm in bf16": lambda i: lambda: torch.mm(i.x, i.full.t(), out=i.out)},
    )
