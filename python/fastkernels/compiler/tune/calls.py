"""A product, a tactic and tensors -> the call that runs its step: what the runtime binds is what the tuner
times. Of a gated product that is all kernels of the step, whichever of them has the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastkernels import ops
from fastkernels.compiler.tune.tactics import STREAM, TORCH, Product, Tactic, gates
from fastkernels.ops.quant import KINDS
from fastkernels.ops.quantized_gemm import QUANTIZED, WITH_ZEROS, round_to
from fastkernels.ops.weight_only import packed_shape, takes_e4m3

Call = Callable[[], object]

_fk = torch.ops.fastkernels
_aten = torch.ops.aten


def call_of(
    product: Product,
    tactic: Tactic,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    workspace: Tensor | None,
    *,
    capability: tuple[int, int] | None = None,
) -> Call:
    """inputs: of the step, in its order: x, where it is bytes its scales and perhaps zero points, the
        weight's parts, and a bias or none
    outputs: of the step: what the product gives; where that is gated, before it silu(gate) * up, or the bytes
        of this and their scales
    workspace: ``ops.gemm.matmul_workspace``, which the tactics of ``matmul`` need
    capability: of the GPU

    The ops are taken by overload and bound once: nothing is validated here.
    """
    *results, room = outputs
    if not results:
        return _product_call(product, tactic, inputs, room, workspace)
    if tactic == STREAM:
        return partial(_fk.linear_silu_mul.default, *inputs, True, *results)
    out, *scales = results
    kind = KINDS["token"]
    if not gates(product, tactic, len(out), capability):
        first = _product_call(product, tactic, inputs, room, workspace)
        if not scales:
            return partial(_in_turn, first, partial(_fk.silu_mul.default, room, out))
        return partial(_in_turn, first, partial(_fk.silu_mul_quant.default, room, kind, out, *scales))
    if not scales:
        return _product_call(product, tactic, inputs, out, workspace, gated=True)
    act = room.view(-1)[: out.numel()].view(out.shape)  # the first half of the room
    first = _product_call(product, tactic, inputs, act, workspace, gated=True)
    return partial(_in_turn, first, partial(_fk.quantize.default, act, kind, out, *scales))


def _in_turn(first: Call, second: Call) -> None:
    first()
    second()


def _product_call(
    product: Product,
    tactic: Tactic,
    inputs: Sequence[Tensor],
    out: Tensor,
    workspace: Tensor | None,
    *,
    gated: bool = False,
) -> Call:
    """One kernel. gated: out is silu(gate) * up of what ``product`` gives."""
    x, *rest = inputs
    bias = rest.pop() if product.has_bias else None
    if tactic == TORCH:
        (weight,) = rest
        if bias is None:
            return partial(_aten.mm.out, x, weight.t(), out=out)
        return partial(_aten.addmm.out, bias, x, weight.t(), out=out)
    if tactic == STREAM:
        return partial(_fk.linear.default, x, rest[0], bias, True, out)
    if tactic.kernel == "weight_only_linear":
        *scales, packed, row_factors = rest
        number = list(ops.PACKED_FORMATS).index(product.weight)
        return partial(
            _fk.weight_only_linear.default,
            *(x, scales[0] if scales else None, packed, row_factors, bias),
            *(number, tactic.number, True, out),
        )
    if tactic.kernel != "matmul" or workspace is None:
        raise ValueError(f"there is no call of the tactic {tactic} for {product}, or no workspace")
    x_scales = weight_scales = x_zeros = weight_sums = None
    if product.op == "matmul" and product.weight == WITH_ZEROS:
        x_scales, x_zeros, weight, weight_scales, weight_sums = rest
        weight_scales = weight_scales.view(-1)
    elif product.op == "matmul":
        x_scales, weight, weight_scales = rest
        if product.weight != "e4m3-block":
            weight_scales = weight_scales.view(-1)
    else:
        (weight,) = rest
    return partial(
        _fk.matmul.default,
        *(x, weight, x_scales, weight_scales, x_zeros, weight_sums, bias, None, None),
        *(True, gated, tactic.number, workspace, out),
    )


def random_x(product: Product, num_tokens: int, device: torch.device) -> list[Tensor]:
    """The inputs of ``call_of`` that a step makes, for timing: of each, any first rows are one too."""
    x = torch.randn(num_tokens, product.in_size, dtype=product.dtype, device=device)
    if product.op == "quantized_linear" and takes_e4m3(product.weight):
        return list(round_to(x, "e4m3"))
    if product.op != "matmul":
        return [x]
    return list(round_to(x, product.weight))


def empty_outputs(product: Product, num_tokens: int, device: torch.device) -> list[Tensor]:
    """The outputs of ``call_of``, for timing: of each, any first rows are one too."""
    room = torch.empty(num_tokens, product.out_size, dtype=product.dtype, device=device)
    if not product.gated:
        return [room]
    act = torch.zeros(num_tokens, product.out_size // 2, dtype=product.dtype, device=device)
    return [act, room] if product.op == "linear" else [*round_to(act, product.weight), room]


def random_weight(product: Product, device: torch.device) -> list[Tensor]:
    """The inputs of ``call_of`` that an engine keeps, for timing; the bytes of packed formats are any."""
    n, k = product.out_size, product.in_size
    bias = [torch.randn(n, dtype=product.dtype, device=device)] if product.has_bias else []
    if product.op == "quantized_linear":
        shape = packed_shape(product.weight, n, k)
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        return [packed, torch.ones(n, device=device), *bias]
    weight = torch.randn(n, k, dtype=product.dtype, device=device).mul_(k**-0.5)
    if product.op == "linear":
        return [weight, *bias]
    byte = QUANTIZED[product.weight][1]
    byte = torch.float8_e4m3fn if byte == torch.float8_e5m2 else byte
    packed, scales = ops.quantize(weight, per="token", dtype=byte)
    if product.weight == "e4m3-block":
        return [packed, scales.new_ones(-(-n // 128), k // 128), *bias]
    sums = [ops.row_sums(packed)] if product.weight == WITH_ZEROS else []
    return [packed, scales[:, None], *sums, *bias]
