"""Linears with quantised weights, where the engine was told a scheme.

    linear(x; W)   ->   quantized_linear(x; W.packed, W.scales, ...)

or with weights that a checkpoint holds quantised. Where their columns are in activation order, x is gathered:

    linear(x; W)   ->   quantized_linear(gather_columns(x; W.permutation); W.packed, W.scales, ...)

The head, which gives the logits, has a scheme of its own and is left alone without; embeddings always are. A
head that shares the embedding's weight gets a quantised copy of it.
"""

from __future__ import annotations

from dataclasses import replace

from fastkernels.compiler.graph import Graph, Node, QuantizedPart, WeightSpec
from fastkernels.quantize import PartSpec, QuantizationError, Scheme


def quantize(graph: Graph) -> Graph:
    users = graph.users()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
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
        inputs, replacements[index] = node.inputs, []
        if stored is not None and stored.permuted:
            order = _part(spec, scheme, "permutation", PartSpec(spec.shape[1:], "int64"), True)
            specs.append(order)
            inputs = (replace(inputs[0], name=f"{node.output.name}.in_order"),)
            replacements[index].append(Node("gather_columns", node.inputs, inputs, (order.name,)))
        replacements[index].append(Node("quantized_linear", inputs, node.outputs, names, attributes))
    return graph.rewrite(replacements, new_weights=specs)


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
