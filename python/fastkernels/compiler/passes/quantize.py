"""Linears with quantised weights, where the engine was told a scheme.

    linear(x; W)   ->   quantized_linear(x; W.packed, W.scales, ...)

The head, which gives the logits, has a scheme of its own and is left alone without; embeddings are. A head that
shares the embedding's weight gets a quantised copy of it.
"""

from __future__ import annotations

from dataclasses import replace

from fastkernels.compiler.graph import Graph, Node, QuantizedPart, WeightSpec
from fastkernels.quantize import QuantizationError, Scheme


def quantize(graph: Graph) -> Graph:
    users = graph.users()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
    for index, node in enumerate(graph.nodes):
        if node.op != "linear":
            continue
        scheme = graph.quantization.head if _is_head(graph, users[node.output]) else graph.quantization.linears
        if scheme is None:
            continue
        weight, *bias = node.weights
        parts = _parts(graph.weights[weight], scheme)
        specs += parts
        names = (*(part.name for part in parts), *bias)
        attributes = {**node.attributes, "scheme": scheme.name}
        replacements[index] = [Node("quantized_linear", node.inputs, node.outputs, names, attributes)]
    return graph.rewrite(replacements, new_weights=specs)


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
