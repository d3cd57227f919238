"""A Step and its tensors -> a call with nothing left to decide: one function an op of ``compiler/lower.py``.

Every call writes into tensors that are already there. The ops are taken by overload and their arguments bound
once, so that running a step costs one dispatch a kernel; what ``fastkernels.ops`` would validate, the plan
guarantees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkernels import ops
from fastkernels.compiler import CompileError, Step
from fastkernels.ops.quantized_gemm import ACTIVATIONS, WEIGHT_TYPES
from fastkernels.quantize import Repacked, find_scheme

Call = Callable[[], object]
Attributes = Mapping[str, Any]

_fk = torch.ops.fastkernels
_aten = torch.ops.aten


def bind(
    step: Step, inputs: list[Tensor], outputs: list[Tensor], *, num_tokens: int, dtype: torch.dtype
) -> Call:
    """The call that runs ``step`` on these tensors, in the order of its inputs and outputs.

    num_tokens, dtype: of the step and of the model, which attention_plan needs and no tensor of its own tells
    Raises CompileError for a step with an op that is none of BINDERS.
    """
    if step.op not in BINDERS:
        raise CompileError(f"no kernel is bound to the step {step.op!r}; there are {', '.join(BINDERS)}")
    return BINDERS[step.op](inputs, outputs, {**step.attributes, "num_tokens": num_tokens, "dtype": dtype})


def _linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """x [rows, in] @ weight [out, in]^T (+ bias). The one place where a tactic for a GEMM is chosen."""
    x, weight = inputs[:2]
    bias = inputs[2] if len(inputs) == 3 else None
    (out,) = outputs
    if _streams_weight(x, weight):
        return partial(_fk.linear.default, x, weight, bias, True, out)
    if bias is None:
        return partial(_aten.mm.out, x, weight.t(), out=out)
    return partial(_aten.addmm.out, bias, x, weight.t(), out=out)


def _quantized_linear(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    """x, the parts of the weight in the scheme's order, and the bias where there is one."""
    scheme = find_scheme(attributes["scheme"])
    x, packed, *rest = inputs
    if isinstance(scheme, Repacked):
        row_factors, bias = rest[0], rest[1] if len(rest) > 1 else None
        packed_format = scheme.packed_format(row_factors.shape[0], x.shape[1])
        codes = (list(ops.PACKED_FORMATS).index(packed_format), 0, True)
        return partial(_fk.weight_only_linear.default, x, packed, row_factors, bias, *codes, outputs[0])
    in_size = x.shape[1]
    names = list(scheme.parts(packed.shape[0], in_size))[1:]
    parts = dict(zip(names, rest, strict=False))
    bias = rest[len(names)] if len(rest) > len(names) else None
    return partial(
        _fk.quantized_linear.default,
        *(x, packed, parts["scales"], parts.get("zeros"), parts.get("global_scale"), bias),
        *(WEIGHT_TYPES[scheme.weight_type], *scheme.block(in_size), ACTIVATIONS[scheme.activation]),
        ops.interleaves(packed),  # as runtime/weights.py leaves them
        outputs[0],
    )


def _gather_columns(inputs: list[Tensor], outputs: list[Tensor], attributes: Attributes) -> Call:
    x, permutation = inputs
    return partial(_aten.index_select.out, x, 1, permutation, out=outputs[0])


def _streams_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether our own kernel takes these and is the faster one, by docs/kernels/gemm.md."""
    rows, in_size = x.shape
    if x.device.type == "cpu":
        return rows <= (ops.LINEAR_MAX_TOKENS if x.dtype == torch.float32 else 1)
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in (x, weight))
    return rows <= ops.LINEAR_MAX_TOKENS and x.dtype != torch.float32 and in_size % 8 == 0 and aligned


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
    q, k, v, positions, cos_sin, kv_cache, slot_mapping = inputs
    interleaved = attributes["interleaved"]
    return partial(
        _fk.rope_append_kv.default,
        *(q, k, v, positions, cos_sin, interleaved, kv_cache, slot_mapping),
        outputs[0],
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
    return partial(
        _fk.paged_attention.default,
        *inputs,
        *(attributes["scale"], attributes["window"], attributes["soft_cap"], outputs[0]),
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
    "quantized_linear": _quantized_linear,
    "gather_columns": _gather_columns,
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
    "gather_rows": _plain(_fk.gather_rows.default),
}
