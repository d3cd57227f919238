"""rms_norm, add_rms_norm and layer_norm, and the first two with a quantised result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Row, run_cases
from benchmarks.peers import compiled, vllm_name, vllm_ops
from benchmarks.shapes import shapes_for, tokens_label
from fastkernels import ops
from fastkernels.ops import reference

EPS = 1e-5


class Inputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, hidden_size]
    residual: torch.Tensor
    weight: torch.Tensor  # [hidden_size]
    bias: torch.Tensor
    out: torch.Tensor


def run(*, device: torch.device, quick: bool, only: str | None, compile_peers: bool = False) -> list[Row]:
    return run_cases(_cases(device, quick, compile_peers), device=device, quick=quick, only=only)


def _cases(device: torch.device, quick: bool, compile_peers: bool) -> Iterator[Case]:
    shapes = shapes_for(device, quick)
    for make_case in (_rms_norm, _add_rms_norm, _layer_norm):
        for num_tokens in shapes.tokens:
            yield make_case(num_tokens, shapes.hidden_size, shapes.dtype, device, compile_peers)
    for per in ("tensor", "token", "block"):
        for num_tokens in shapes.tokens:
            yield _rms_norm_quant(num_tokens, shapes.hidden_size, shapes.dtype, device, per, add=False)
    for num_tokens in shapes.tokens:
        yield _rms_norm_quant(num_tokens, shapes.hidden_size, shapes.dtype, device, "token", add=True)
    for add in (False, True):
        largest = (shapes.tokens[-1], shapes.hidden_size)
        yield _rms_norm_quant(*largest, shapes.dtype, device, "token", add=add, result=torch.int8)


def _make(num_tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, residual = torch.randn(2, num_tokens, size, dtype=dtype, device=device)
    weight, bias = torch.randn(2, size, dtype=dtype, device=device)
    return Inputs(x, residual, weight, bias, torch.empty_like(x))


def _rms_norm(
    num_tokens: int, size: int, dtype: torch.dtype, device: torch.device, compile_peers: bool
) -> Case:
    peers = {"torch F.rms_norm": lambda i: lambda: F.rms_norm(i.x, (size,), i.weight, EPS)}
    if compile_peers:
        rms_norm = compiled(lambda x, w: reference.rms_norm(x.float(), w.float(), EPS).to(x.dtype))
        peers["torch.compile"] = lambda i: lambda: rms_norm(i.x, i.weight)
    if (vllm := vllm_ops()) is not None and device.type == "cuda":
        peers[f"{vllm_name()} rms_norm"] = lambda i: (
            lambda: (vllm.rms_norm(i.out, i.x, i.weight, EPS), i.out)[1]
        )
    return Case(
        "rms_norm",
        tokens_label(num_tokens),
        dtype,
        make=lambda: _make(num_tokens, size, dtype, device),
        ours=lambda i: lambda: ops.rms_norm(i.x, i.weight, EPS, out=i.out),
        expect=lambda i: reference.rms_norm(i.x.float(), i.weight.float(), EPS),
        num_bytes=(2 * num_tokens + 1) * size * dtype.itemsize,
        peers=peers,
    )


def _add_rms_norm(
    num_tokens: int, size: int, dtype: torch.dtype, device: torch.device, compile_peers: bool
) -> Case:
    def by_torch(i: Inputs):
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            i.residual.add_(i.x)
            return F.rms_norm(i.residual, (size,), i.weight, EPS), i.residual

        return call

    def by_vllm(i: Inputs):
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            vllm.fused_add_rms_norm(i.x, i.residual, i.weight, EPS)
            return i.x, i.residual

        return call

    def expect(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.add_rms_norm(i.x.float(), i.residual.float(), i.weight.float(), EPS)

    peers = {"torch add_, F.rms_norm": by_torch}
    if compile_peers:

        def add_rms_norm(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            residual = residual + x
            return reference.rms_norm(residual.float(), weight.float(), EPS).to(x.dtype), residual

        fused = compiled(add_rms_norm)
        peers["torch.compile"] = lambda i: lambda: fused(i.x, i.residual, i.weight)
    if (vllm := vllm_ops()) is not None and device.type == "cuda":
        peers[f"{vllm_name()} fused_add_rms_norm"] = by_vllm
    return Case(
        "add_rms_norm",
        tokens_label(num_tokens),
        dtype,
        make=lambda: _make(num_tokens, size, dtype, device),
        ours=lambda i: lambda: (ops.add_rms_norm(i.x, i.residual, i.weight, EPS, out=i.out), i.residual),
        expect=expect,
        num_bytes=(4 * num_tokens + 1) * size * dtype.itemsize,
        peers=peers,
    )


def _layer_norm(
    num_tokens: int, size: int, dtype: torch.dtype, device: torch.device, compile_peers: bool
) -> Case:
    peers = {"torch F.layer_norm": lambda i: lambda: F.layer_norm(i.x, (size,), i.weight, i.bias, EPS)}
    if compile_peers:
        layer_norm = compiled(lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS))
        peers["torch.compile"] = lambda i: lambda: layer_norm(i.x, i.weight, i.bias)
    return Case(
        "layer_norm",
        tokens_label(num_tokens),
        dtype,
        make=lambda: _make(num_tokens, size, dtype, device),
        ours=lambda i: lambda: ops.layer_norm(i.x, i.weight, i.bias, EPS, out=i.out),
        expect=lambda i: reference.layer_norm(i.x.float(), i.weight.float(), i.bias.float(), EPS),
        num_bytes=(2 * num_tokens + 2) * size * dtype.itemsize,
        peers=peers,
    )


def _rms_norm_quant(
    num_tokens: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    per: str,
    *,
    add: bool,
    result: torch.dtype = torch.float8_e4m3fn,
) -> Case:
    """The peer is torch's norm and our quantize."""

    def make() -> tuple[Inputs, torch.Tensor, torch.Tensor]:
        i = _make(num_tokens, size, dtype, device)
        out = torch.empty(num_tokens, size, dtype=result, device=device)
        shape = {"tensor": (1,), "token": (num_tokens,), "block": (num_tokens, size // 128)}[per]
        return i, out, torch.full(shape, 0.02, device=device)

    def ours(given: tuple[Inputs, torch.Tensor, torch.Tensor]):
        i, out, scales = given
        how = {"per": per, "scales": scales, "dtype": result, "out": out}
        if add:
            return lambda: ops.add_rms_norm_quant(i.x, i.residual, i.weight, EPS, **how)
        return lambda: ops.rms_norm_quant(i.x, i.weight, EPS, **how)

    def by_torch(given: tuple[Inputs, torch.Tensor, torch.Tensor]):
        i, out, scales = given

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            x = i.residual.add_(i.x) if add else i.x
            y = F.rms_norm(x, (size,), i.weight, EPS)
            return ops.quantize(y, per=per, scales=scales, dtype=result, out=out)

        return call

    def expect(given: tuple[Inputs, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        i, _, scales = given
        x = i.residual.float() + i.x.float() if add else i.x.float()
        y = reference.rms_norm(x, i.weight.float(), EPS)
        return reference.quantize(y, per, scales if per == "tensor" else None, result)

    elements = num_tokens * size
    return Case(
        "add_rms_norm_quant" if add else "rms_norm_quant",
        f"{'int8, ' if result == torch.int8 else ''}per {per}, {tokens_label(num_tokens)}",
        dtype,
        make=make,
        ours=ours,
        expect=expect,
        num_bytes=elements * ((3 if add else 1) * dtype.itemsize + 1) + size * dtype.itemsize,
        peers={"torch norm, our quantize": by_torch},
    )
