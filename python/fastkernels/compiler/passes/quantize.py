"""Linears with quantised weights, where the engine was told a scheme.

    linear(x; W)   ->   quantized_linear(x; W.packed, W.scales, ...)

or with weights that a checkpoint holds quantised. Where their columns are in activation order, x is gathered,
once for all linears that read it in that order:

    linear(x; W)   ->   quantized_linear(gather_columns(x; W.permutation); W.packed, W.scales, ...)

Where a scheme that rounds activations is for a GPU, linears that read the same x, or gather it in the same
order, share what is first:

    linear(x; W)   ->   quantize(x), matmul(bytes, their scales; W.packed, W.scales)
    linear(x; W)   ->   quantize_zeros(x), matmul(bytes, scales, zeros; W.packed, W.scales, W.sums)
    linear(x; W)   ->   quantize(x), quantized_linear(bytes, their scales; W.packed, W.row_factors)

The head, which gives the logits, has a scheme of its own and is left alone without; embeddings always are. A
head that shares the embedding's weight gets a quantised copy of it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from fastkernels.compiler.graph import Graph, Node, QuantizedPart, Value, WeightSpec
from fastkernels.ops.quant import Per
from fastkernels.ops.quantized_gemm import WITH_ZEROS
from fastkernels.quantize import PartSpec, QuantizationError, Repacked, Rounded, Scheme


def quantize(graph: Graph) -> Graph:
    users = graph.users()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
    in_order: dict[tuple[Value, Hashable], Node] = {}  # its gather_columns, by order
    rounded: dict[tuple[Value, str | None], Node] = {}  # its quantize, by activation
    for index, node in enumerate(graph.nodes):
        if node.op != "linear":
            continue
        weight, *bias = node.weights
        spec, given = graph.weights[weight], graph.quantization
        stored = given.stored_of(spec)
        if stored is not None:
            scheme: Scheme | None = stored.scheme
        else:
            scheme = given.head if _is_head(graph, users[node.output]) else given.linears
        if scheme is None:
            continue
        parts = _parts(spec, scheme, stored is not None)
        specs += parts
        names = (*(part.name for part in parts), *bias)
        attributes = {**node.attributes, "scheme": scheme.name}
        inputs, op, replacements[index] = node.inputs, "quantized_linear", []
        if stored is not None and stored.order is not None:
            (x,), order = inputs, stored.order
            if (x, order) not in in_order:
                permutation = _part(spec, scheme, "permutation", PartSpec(spec.shape[1:], "int64"), True)
                specs.append(permutation)
                in_order[x, order] = _gather(node, permutation)
                replacements[index].append(in_order[x, order])
            inputs = in_order[x, order].outputs
        if isinstance(scheme, Rounded):
            op = "matmul"
        if isinstance(scheme, Rounded | Repacked) and scheme.rounding is not None:
            (x,), activation = inputs, scheme.scheme.activation
            if (x, activation) not in rounded:
                rounded[x, activation] = _round(x, node.output.name, scheme, scheme.rounding)
                replacements[index].append(rounded[x, activation])
            inputs = rounded[x, activation].outputs
        replacements[index].append(Node(op, inputs, node.outputs, names, attributes))
    return graph.rewrite(replacements, new_weights=specs)


def _gather(linear: Node, permutation: WeightSpec) -> Node:
    """The columns of what ``linear`` reads, in the order that its weight has them."""
    gathered = replace(linear.inputs[0], name=f"{linear.output.name}.in_order")
    return Node("gather_columns", linear.inputs, (gathered,), (permutation.name,))


def _round(x: Value, name: str, scheme: Rounded | Repacked, rounding: tuple[Per, torch.dtype]) -> Node:
    """x as bytes and, per token or per 128 neighbours, their scales, and with some schemes zero points. name:
    of the first result they make."""
    per, dtype = rounding
    by_token = () if per == "token" else (x.row_size // scheme.block(x.row_size)[1],)
    outputs = (
        Value(f"{name}.x", (x.row_size,), x.rows, str(dtype).removeprefix("torch.")),
        Value(f"{name}.x_scales", by_token, x.rows, "float32"),
    )
    if scheme.scheme.activation == WITH_ZEROS:
        zeros = Value(f"{name}.x_zeros", (), x.rows, "int32")
        return Node("quantize_zeros", (x,), (*outputs, zeros))
    return Node("quantize", (x,), outputs, attributes={"per": per})


def _is_head(graph: Graph, users: list[int]) -> bool:
    """What it gives are the logits, or those of every token that gather_rows takes them from."""
    return any(user == len(graph.nodes) or graph.nodes[user].op == "gather_rows" for user in users)


def _parts(spec: WeightSpec, scheme: Scheme, stored: bool) -> list[WeightSpec]:
    out_size, in_size = spec.shape
    try:
        parts = scheme.parts(out_size, in_size)
    except QuantizationError as error:
        raise QuantizationError(f"{spec.name} cannot be quantised: {error}") from None
    return [_part(spec, scheme, part, of, stored) for part, of in parts.items()]


def _part(spec: WeightSpec, scheme: Scheme, part: str, of: PartSpec, stored: bool) -> WeightSpec:
    return replace(
        spec,
        name=f"{spec.name}.{part}",
        shape=of.shape,
        dtype=of.dtype,
        quantized=QuantizedPart(spec, scheme.name, part, stored),
    )
