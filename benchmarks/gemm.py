"""linear, linear_silu_mul, weight_only_linear and matmul, at Llama-3.1-8B's shapes.

The last two also by the kernels that any GPU from compute capability 8.0 on runs, where Hopper's are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks import gemm_gated, gemm_peers
from benchmarks.harness import Call, Case, Row, run_cases
from benchmarks.peers import vllm_name, vllm_ops
from benchmarks.shapes import Shapes, shapes_for, tokens_label
from fastkernels import ops
from fastkernels.ops.gemm import FIRST_SM80_TACTIC, matmul, matmul_workspace
from fastkernels.ops.quantized_gemm import round_to
from fastkernels.quantize import Repacked, find_scheme

_TOKENS = {  # of matmul, by type
    "bf16": (16, 64, 128, 512, 2048, 8192),
    "fp8": (1, 16, 64, 512, 2048, 8192),
    "fp8 block": (64, 2048),
    "int8": (1, 16, 64, 512, 2048, 8192),
}
_TOKENS_OF_ANY_GPU = (64, 2048)
_BYTES = ("fp8", "fp8 block", "int8")  # types of matmul that any GPU takes
WEIGHT_ONLY = ("int4", "int4-fp8", "int4-zeros", "int8-weight", "nvfp4", "mxfp4")  # schemes


class Inputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    weight: torch.Tensor  # [out_size, in_size]
    out: torch.Tensor  # [num_tokens, out_size]


class MatmulInputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    weight: torch.Tensor  # [out_size, in_size]
    x_scales: torch.Tensor | None  # [num_tokens] | [num_tokens, in_size / 128]
    weight_scales: torch.Tensor | None  # [out_size] | [out_size / 128, in_size / 128]
    out: torch.Tensor  # [num_tokens, out_size]


class WeightOnlyInputs(NamedTuple):
    x: torch.Tensor  # [num_tokens, in_size]
    rounded: torch.Tensor  # x as the scheme's products take it, and its scales
    x_scales: torch.Tensor | None
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
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    most = 8 if is_hopper else 16  # engines take matmul behind it
    for num_tokens in (1, most) if quick or is_hopper else (1, 8, most):
        for name, (out_size, in_size) in _products(shapes).items():
            yield _case(name, num_tokens, out_size, in_size, shapes.dtype, device)
        yield gemm_gated.gated_case(num_tokens, shapes, device)
    if is_hopper:
        workspace = matmul_workspace(device)
        for kind, tokens in _TOKENS.items():
            for num_tokens in tokens[1:3] if quick else tokens:
                for name, (out_size, in_size) in list(_products(shapes).items())[:4]:
                    yield _matmul_case(kind, name, num_tokens, out_size, in_size, device, workspace)
        for kind in ("fp8", "fp8 block"):
            yield _matmul_case(kind, "deepseek", 4096, 7168, 16384, device, workspace)
        yield from gemm_gated.cases(shapes, device, workspace, quick)
    if device.type != "cuda":
        return
    yield from _cases_of_any_gpu(shapes, device, is_hopper, quick)
    for scheme in WEIGHT_ONLY[:1] if quick else WEIGHT_ONLY:
        first = scheme == WEIGHT_ONLY[0]
        more = (2048, 8192) if scheme == "int4-fp8" else ()
        most = (1, 16, 32, 64, 128, 512, 2048) if first else (1, 64, 512, *more)
        for num_tokens in (1, 16) if quick else most:
            products = list(_products(shapes).items())[: 5 if first and num_tokens < 64 else 4]
            for name, (out_size, in_size) in products:
                yield _weight_only_case(scheme, name, num_tokens, out_size, in_size, shapes.dtype, device)


def _cases_of_any_gpu(shapes: Shapes, device: torch.device, is_hopper: bool, quick: bool) -> Iterator[Case]:
    """By the rule of GPUs that are not Hopper's."""
    products, workspace = _products(shapes), matmul_workspace(device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    for kind in _BYTES[:1] if quick else _BYTES:
        for num_tokens in _TOKENS_OF_ANY_GPU:
            for name in ("qkv", "gate_up"):
                out_size, in_size = products[name]
                tiles = math.ceil(num_tokens / 128) * math.ceil(out_size / 128)
                tactic = FIRST_SM80_TACTIC + (tiles < num_sms) if is_hopper else -1
                yield _matmul_case(kind, name, num_tokens, out_size, in_size, device, workspace, tactic)
    for scheme in WEIGHT_ONLY[:1] if quick else WEIGHT_ONLY:  # for one token Hopper's rule has it too
        yield _weight_only_case(scheme, "gate_up", 64, *products["gate_up"], shapes.dtype, device, tactic=1)


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


def _scaled_mm(
    i: MatmulInputs, x_scales: torch.Tensor, weight_scales: torch.Tensor, fast: bool = True
) -> Call:
    return lambda: torch._scaled_mm(
        i.x, i.weight.t(), x_scales, weight_scales, out_dtype=torch.bfloat16, use_fast_accum=fast, out=i.out
    )


def _by_row(i: MatmulInputs) -> Call:
    assert i.x_scales is not None and i.weight_scales is not None
    return _scaled_mm(i, i.x_scales[:, None], i.weight_scales[None, :])


def _by_tensor(i: MatmulInputs) -> Call:
    assert i.x_scales is not None and i.weight_scales is not None
    return _scaled_mm(i, i.x_scales[:1].clone(), i.weight_scales[:1].clone())


def _by_block(i: MatmulInputs) -> Call:
    assert i.x_scales is not None and i.weight_scales is not None
    x_scales = i.x_scales.t().contiguous().t()  # as it takes them, column-major
    return _scaled_mm(i, x_scales, i.weight_scales.t(), fast=False)  # it has no other


_PEERS: dict[str, dict[str, Callable[[MatmulInputs], Call]]] = {
    "bf16": {"torch mm": lambda i: lambda: torch.mm(i.x, i.weight.t(), out=i.out)},
    "fp8": {"torch scaled_mm by row": _by_row, "torch scaled_mm by tensor": _by_tensor},
    "fp8 block": {"torch scaled_mm by block": _by_block},
}
_TYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


def _matmul_case(
    kind: str,
    name: str,
    num_tokens: int,
    out_size: int,
    in_size: int,
    device: torch.device,
    workspace: torch.Tensor,
    tactic: int | None = None,
) -> Case:
    """tactic: of the kernel for any GPU; None: the rule of this one."""
    dtype = _TYPES.get(kind, torch.float8_e4m3fn)

    def make() -> MatmulInputs:
        x = torch.randn(num_tokens, in_size, dtype=torch.bfloat16, device=device)
        weight = torch.randn(out_size, in_size, dtype=torch.bfloat16, device=device)
        out = x.new_empty(num_tokens, out_size)
        if kind == "bf16":
            return MatmulInputs(x, weight * in_size**-0.5, None, None, out)
        x_bytes, x_scales = ops.quantize(x, per="block" if kind == "fp8 block" else "token", dtype=dtype)
        if kind == "fp8 block":
            weight_scales = torch.rand(out_size // 128, in_size // 128, device=device) + 0.5
        else:  # the same for all rows, so that peers by tensor compute the same
            x_scales, weight_scales = x_scales.mean().repeat(num_tokens), torch.ones(out_size, device=device)
        weight_bytes = weight.mul(20).to(dtype)
        return MatmulInputs(x_bytes, weight_bytes, x_scales, weight_scales * 0.05 * in_size**-0.5, out)

    def ours(i: MatmulInputs) -> Call:
        def call() -> torch.Tensor:
            number = -1 if tactic is None else tactic
            matmul("matmul", i.x, i.weight, i.x_scales, i.weight_scales, None, True, number, workspace, i.out)
            return i.out

        return call

    def expect(i: MatmulInputs) -> torch.Tensor:
        x, weight = i.x.float(), i.weight.float()
        if kind == "fp8 block":
            assert i.x_scales is not None and i.weight_scales is not None
            x = x * i.x_scales.repeat_interleave(128, 1)
            weight = weight * i.weight_scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        elif i.x_scales is not None and i.weight_scales is not None:
            x, weight = x * i.x_scales[:, None], weight * i.weight_scales[:, None]
        return x @ weight.t()

    def by_cutlass(i: MatmulInputs) -> Call:
        assert i.x_scales is not None and i.weight_scales is not None
        return gemm_peers.cutlass(vllm, i.x, i.weight, i.x_scales, i.weight_scales, i.out)

    peers = dict(_PEERS.get(kind, {}))
    if kind in ("fp8", "int8") and (vllm := vllm_ops()) is not None:
        peers[f"{vllm_name()} CUTLASS"] = by_cutlass
    element_bytes = dtype.itemsize
    return Case(
        "matmul" if tactic is None else "matmul, kernel for any GPU",
        f"{kind} {name} {out_size} x {in_size}, {tokens_label(num_tokens)}",
        torch.bfloat16,
        make=make,
        ours=ours,
        expect=expect,
        num_bytes=(out_size + num_tokens) * in_size * element_bytes + num_tokens * out_size * 2,
        flops=2 * num_tokens * out_size * in_size,
        peers=peers,
    )


def _weight_only_case(
    scheme_name: str,
    name: str,
    num_tokens: int,
    out_size: int,
    in_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tactic: int = 0,
) -> Case:
    """tactic: 1: the kernel for any GPU; 0: the rule's of this one."""
    scheme = find_scheme(scheme_name)
    layout = Repacked(scheme)

    def by_torch(i: WeightOnlyInputs) -> Call:
        full, x = scheme.dequantize(i.parts).to(dtype), taken(i).to(dtype)
        return lambda: torch.mm(x, full.t(), out=i.out)

    def taken(i: WeightOnlyInputs) -> torch.Tensor:
        return i.x.float() if i.x_scales is None else i.rounded.float() * i.x_scales[:, None]

    def make() -> WeightOnlyInputs:
        x = torch.randn(num_tokens, in_size, dtype=dtype, device=device)
        given = scheme.quantize(torch.randn(out_size, in_size, dtype=dtype, device=device) * in_size**-0.5)
        repacked = ops.repack_for_cuda(
            given["packed"],
            given["scales"],
            weight_type=scheme.weight_type,
            block=scheme.block(in_size),
            zeros=given.get("zeros"),
            global_scale=given.get("global_scale"),
            activation=scheme.activation,
        )
        rounded, *x_scales = (x,) if scheme.activation is None else round_to(x, scheme.activation)
        out = x.new_empty(num_tokens, out_size)
        return WeightOnlyInputs(x, rounded, x_scales[0] if x_scales else None, given, repacked, out)

    def ours(i: WeightOnlyInputs) -> Call:
        return lambda: ops.weight_only_linear(
            i.rounded,
            i.weight,
            x_scales=i.x_scales,
            tactic=tactic,
            constant_weight=True,
            out=i.out,
        )

    def expect(i: WeightOnlyInputs) -> torch.Tensor:
        return taken(i) @ scheme.dequantize(i.parts).t()

    peers: dict[str, Callable[[WeightOnlyInputs], Call]] = {"torch mm of bf16": by_torch}
    if scheme_name == "int4" and (vllm := vllm_ops()) is not None:
        peers = gemm_peers.int4_peers(vllm, vllm_name())
    num_bytes = sum(
        math.prod(part.shape) * part.torch_dtype.itemsize for part in layout.parts(out_size, in_size).values()
    )
    x_bytes = dtype.itemsize if scheme.activation is None else 1
    return Case(
        "weight_only_linear" if tactic == 0 else "weight_only_linear, kernel for any GPU",
        f"{scheme_name} {name} {out_size} x {in_size}, {tokens_label(num_tokens)}",
        dtype,
        make=make,
        ours=ours,
        expect=expect,
        num_bytes=num_bytes + num_tokens * (in_size * x_bytes + out_size * dtype.itemsize),
        flops=2 * num_tokens * out_size * in_size,
        peers=peers,
    )
