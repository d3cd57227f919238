"""A Step and its tensors -> a call with nothing left to decide: one function an op of ``compiler/lower.py``.

Every call writes into tensors that are already there. The ops are taken by overload and their arguments bound
once, so that running a step costs one dispatch a kernel; what ``fastkernels.ops`` would validate, the plan
guarantees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkernels import ops
from fastkernels.compiler import CompileError, Step
from fastkernels.compiler.tune import (
    BY_RULE,
    PRODUCT_STEPS,
    STREAM,
    TORCH,
    Call,
    Choices,
    Product,
    Tactic,
    call_of,
    product_of,
)
from fastkernels.ops.gemm import LINEAR_TACTIC
from fastkernels.ops.quant import KINDS
from fastkernels.ops.quantized_gemm import ACTIVATIONS, WEIGHT_TYPES
from fastkernels.ops.weight_only import takes_e4m3
from fastkernels.quantize import Repacked, find_scheme

Attributes = Mapping[str, Any]

_fk = torch.ops.fastkernels
_aten = torch.ops.aten


@dataclass(frozen=True)
class Products:
    """How a GPU computes matrix products: by these tactics, which all use one workspace, one after the other.

    workspace: ``ops.gemm.matmul_workspace``, or None where no tactic of ``matmul`` may be taken
    """

    choices: Choices = BY_RULE
    workspace: Tensor | None = None

    def tactic(self, product: Product, inputs: list[Tensor]) -> Tactic:
        if product.op == "linear" and not all(map(_is_aligned, inputs[:2])):
            return TORCH
        return self.choices.tactic(product, inputs[0].shape[0])

    def streams_bytes(self, product: Product) -> bool:
        """Whether a kernel for few tokens has one token of it: linear's, with bytes and a scale a row, or
        that of weights of 4 and 8 bits."""
        tactic = self.choices.tactic(product, 1)
        if product.op == "quantized_linear":
            is_few = tactic.number in range(ops.WEIGHT_ONLY_FEW_TACTICS + 1)
            return is_few and not takes_e4m3(product.weight) and product.in_size % 8 == 0
        by_row = product.op == "matmul" and product.weight in ("e4m3", "int8")
        return by_row and tactic == Tactic("matmul", LINEAR_TACTIC)

    def call(self, product: Product, inputs: list[Tensor], outputs: list[Tensor]) -> Call:
        return call_of(
            *(product, self.tactic(product, inputs), inputs, outputs, self.workspace),
            capability=self.choices.capability,
        )


def bind(
    step: Step,
    inputs: list[Tensor],
    outputs: list[Tensor],
    *,
    num_tokens: int,
    max_query_len: int = 0,
    dtype: torch.dtype,
    products: Products,
) -> Call:
    """The call that runs ``step`` on these tensors, in the order of its inputs and outputs.

    num_tokens, dtype: of the step and of the model, which attention_plan needs and no tensor of its own tells
    max_query_len: of the step, for paged_attention; 0 where any sequence may have any number of its tokens
    Raises CompileError for a step with an op that is none of BINDERS.
    """
    if step.op not in BINDERS:
        raise CompileError(f"no kernel is bound to the step {step.op!r}; there are {', '.join(BINDERS)}")
    if step.op in PRODUCT_STEPS and inputs[0].device.type != "cpu":
        product = product_of(step, outputs[-1].shape[1], inputs[0].shape[1], dtype)
        return products.call(product, inputs, outputs)
    of_the_step = {"num_tokens": num_tokens, "max_query_len": max_query_len, "dtype": dtype}
    return BINDERS[step.op](inputs, outputs, {**step.attributes, **of_the_step})


def _linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """On the CPU: x [rows, in] @ weight [out, in]^T (+ bias), by docs/kernels/gemm.md's rule; for two outputs
    it is linear_silu_mul."""
    x, weight = inputs[:2]
    out_size, in_size = weight.shape
    product = Product("linear", "", x.dtype, out_size, in_size, len(inputs) == 3, len(outputs) == 2)
    streams = x.shape[0] <= (ops.LINEAR_MAX_TOKENS if x.dtype == torch.float32 else 1)
    return call_of(product, STREAM if streams else TORCH, inputs, outputs, None)


def _matmul_silu_mul_quant(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    out, scales, gate_up = outputs
    product = BINDERS["matmul"](inputs, [gate_up], attributes)
    activation = BINDERS["silu_mul_quant"]([gate_up], [out, scales], {"per": attributes["per"]})

    def call() -> None:
        product()
        activation()

    return call


def _is_aligned(tensor: Tensor) -> bool:
    """As our kernels want x and weight; out of a size that they take is."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _quantizing(op: Callable[..., object]) -> Callable[[list[Tensor], list[Tensor], Attributes], Call]:
    """An op that writes bytes and their scales; a norm's eps comes before what they are per."""

    def bind_op(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
        eps = [attributes["eps"]] if "eps" in attributes else []
        return partial(op, *inputs, *eps, KINDS[attributes["per"]], *outputs[:2])

    return bind_op


def _only_on_a_gpu(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    raise CompileError(
        f"the plan holds {attributes['scheme']}, whose products are for GPUs; on the CPU compile it without "
        "@cuda"
    )


def _quantized_linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """On the CPU: x, the parts of the weight in the scheme's order, and the bias where there is one."""
    scheme = find_scheme(attributes["scheme"])
    if isinstance(scheme, Repacked):
        return _only_on_a_gpu(inputs, outputs, attributes)
    x, packed, *rest = inputs
    in_size = x.shape[1]
    names = list(scheme.parts(packed.shape[0], in_size))[1:]
    parts = dict(zip(names, rest, strict=False))
    bias = rest[len(names)] if len(rest) > len(names) else None
    return partial(
        _fk.quantized_linear.default,
        *(x, packed, parts["scales"], parts.get("zeros"), parts.get("global_scale")),
        *(parts.get("sums"), bias),
        *(WEIGHT_TYPES[scheme.weight_type], *scheme.block(in_size), ACTIVATIONS[scheme.activation]),
        ops.interleaves(packed),  # as runtime/weights.py leaves them
        outputs[0],
    )


def _token_linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """Of ``runtime/one_token.py``: x, its scales or the norm's weight, the weight, its scales, and a bias or
    none."""
    x, beside, weight, weight_scales, *bias = inputs
    x_scales, norm_weight = (None, beside) if attributes["normed"] else (beside, None)
    return partial(
        _fk.token_linear.default,
        *(x, x_scales, norm_weight, attributes.get("eps", 0.0), weight, weight_scales.view(-1)),
        *(bias[0] if bias else None, True, attributes["adds"], outputs[0]),
    )


def _token_weight_only_linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """Of ``runtime/one_token.py``: x, the norm's weight where there is one, the weight's parts, and a bias or
    none."""
    x, *rest = inputs
    norm_weight = rest.pop(0) if attributes["normed"] else None
    packed, row_factors, *bias = rest
    scheme = find_scheme(attributes["scheme"])
    assert isinstance(scheme, Repacked)
    packed_format = scheme.packed_format(row_factors.shape[0], x.shape[1])
    return partial(
        _fk.token_weight_only_linear.default,
        *(x, norm_weight, attributes.get("eps", 0.0), packed, row_factors, bias[0] if bias else None),
        *(list(ops.PACKED_FORMATS).index(packed_format), 0, True),
        *(attributes["adds"], attributes["gated"], outputs[0]),
    )


def _gather_columns(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    x, permutation = inputs
    return partial(_aten.index_select.out, x, 1, permutation, out=outputs[0])


def _rms_norm(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    x, weight = inputs
    return partial(_fk.rms_norm.default, x, weight, attributes["eps"], outputs[0])


def _add_rms_norm(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    x, residual, weight = inputs
    return partial(_fk.add_rms_norm.default, x, residual, weight, attributes["eps"], outputs[0])


def _rope(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    return partial(_fk.rope.default, *inputs, attributes["interleaved"], *outputs)


def _append_kv(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    return partial(_fk.append_kv.default, *inputs)


def _rope_append_kv(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    q, k, v, positions, cos_sin, kv_cache, slot_mapping, *scales = inputs
    interleaved = attributes["interleaved"]
    return partial(
        _fk.rope_append_kv.default,
        *(q, k, v, positions, cos_sin, interleaved, kv_cache, slot_mapping),
        *(outputs[0], *scales),
    )


def _attention_plan(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    seq_lens, cu_seqlens_q = inputs
    a = attributes
    return partial(
        _fk.attention_plan.default,
        *(cu_seqlens_q, None, seq_lens, a["num_tokens"]),
        *(a["num_q_heads"], a["num_kv_heads"], a["head_dim"], a["window"]),
        *(True, a["dtype"], outputs[0]),
    )


def _paged_attention(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    q, kv_cache, page_table, seq_lens, cu_seqlens_q, work_map, workspace, *scales = inputs
    return partial(
        _fk.paged_attention.default,
        *(q, kv_cache, page_table, seq_lens, cu_seqlens_q, work_map, workspace),
        *(attributes["scale"], attributes["window"], attributes["soft_cap"], outputs[0], *scales),
        max_query_len=attributes["max_query_len"],
    )


def _plain(op: Callable[..., object]) -> Callable[[list[Tensor], list[Tensor], Attributes], Call]:
    """An op whose arguments are its inputs, then its outputs."""
    return lambda inputs, outputs, attributes: partial(op, *inputs, *outputs)


def _torch_out(op: Callable[..., object]) -> Callable[[list[Tensor], list[Tensor], Attributes], Call]:
    """An op of torch that writes into ``out``."""
    return lambda inputs, outputs, attributes: partial(op, *inputs, out=outputs[0])


BINDERS: dict[str, Callable[[list[Tensor], list[Tensor], Attributes], Call]] = {
    "resolve_token_ids": _plain(_fk.resolve_token_ids.default),
    "attention_plan": _attention_plan,
    "embedding": _plain(_fk.embedding.default),
    "linear": _linear,
    "linear_silu_mul": _linear,
    "quantized_linear": _quantized_linear,
    "gather_columns": _gather_columns,
    "quantize": _quantizing(_fk.quantize.default),
    "quantize_zeros": _plain(_fk.quantize_zeros.default),
    "matmul": _only_on_a_gpu,
    "matmul_silu_mul_quant": _matmul_silu_mul_quant,
    "token_linear": _token_linear,
    "token_weight_only_linear": _token_weight_only_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "append_kv": _append_kv,
    "rope_append_kv": _rope_append_kv,
    "paged_attention": _paged_attention,
    "silu": _torch_out(_aten.silu.out),
    "mul": _torch_out(_aten.mul.out),
    "add": _torch_out(_aten.add.out),
    "silu_mul": _plain(_fk.silu_mul.default),
    "rms_norm_quant": _quantizing(_fk.rms_norm_quant.default),
    "add_rms_norm_quant": _quantizing(_fk.add_rms_norm_quant.default),
    "silu_mul_quant": _quantizing(_fk.silu_mul_quant.default),
    "gather_rows": _plain(_fk.gather_rows.default),
}
