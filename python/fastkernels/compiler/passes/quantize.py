"""Linears with quantised weights, where the engine was told a scheme.

    linear(x; W)   ->   quantized_linear(x; W.packed, W.scales, ...)

and where a scheme that rounds activations is for a GPU, linears that read the same x sharing what is first:

    linear(x; W)   ->   quantize(x), matmul(bytes, their scales; W.packed, W.scales)

The head, which gives the logits, has a scheme of its own and is left alone without; embeddings always are. A
head that shares the embedding's weight gets a quantised copy of it.
"""

from __future__ import annotations

from dataclasses import replace

from fastkernels.compiler.graph import Graph, Node, QuantizedPart, Value, WeightSpec
from fastkernels.quantize import QuantizationError, Rounded, Scheme


def quantize(graph: Graph) -> Graph:
    users = graph.users()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
    rounded: dict[tuple[Value, str | None], Node] = {}
    for index, node in enumerate(graph.nodes):
        if node.op != "linear":
            continue
        scheme = (
            graph.quantization.head if _is_head(graph, users[node.output]) else graph.quantization.linears
        )
        if scheme is None:
            continue
        weight, *bias = node.weights
        parts = _parts(graph.weights[weight], scheme)
        specs += parts
        names = (*(part.name for part in parts), *bias)
        attributes = {**node.attributes, "scheme": scheme.name}
        if not isinstance(scheme, Rounded):
            replacements[index] = [Node("quantized_linear", node.inputs, node.outputs, names, attributes)]
            continue
        replacements[index] = []
        key = node.inputs[0], scheme.scheme.activation
        if key not in rounded:
            rounded[key] = _round(node, scheme)
            replacements[index].append(rounded[key])
        replacements[index].append(Node("matmul", rounded[key].outputs, node.outputs, names, attributes))
    return graph.rewrite(replacements, new_weights=specs)


def _round(linear: Node, scheme: Rounded) -> Node:
    """The input of ``linear`` as bytes and, per token or per 128 neighbours, their scales."""
    (x,), name = linear.inputs, linear.output.name
    per, dtype = scheme.rounding
    by_token = () if per == "token" else (x.row_size // scheme.block(x.row_size)[1],)
    outputs = (
        Value(f"{name}.x", (x.row_size,), x.rows, str(dtype).removeprefix("torch.")),
        Value(f"{name}.x_scales", by_token, x.rows, "float32"),
    )
    return Node("quantize", linear.inputs, outputs, attributes={"per": per})


def _is_head(graph: Graph, users: list[int]) -> bool:
    """What it gives are the logits, or those of every token that gather_rows takes them from."""
    return any(user == len(graph.nodes) or graph.nodes[user].op == "gather_rows" for user in users)


def _parts(spec: WeightSpec, scheme: Scheme) -> list[WeightSpec]:
    out_size, in_size = spec.shape
    try:
        parts = scheme.parts(out_size, in_size)
    except QuantizationError as error:
        raise QuantizationError(f"{spec.name} cannot be quantised: {error}") from None
    return [
        replace(
            spec,
            name=f"{spec.name}.{part}",
            shape=of.shape,
            dtype=of.dtype,
            quantized=QuantizedPart(spec, scheme.name, part),
        )
        for part, of in parts.items()
    ]
