"""The q, k and v projections of a layer as one linear: one read of the input, one larger and faster GEMM.

    q, k, v = linear(x; Wq), linear(x; Wk), linear(x; Wv)   ->   qkv = linear(x; [Wq; Wk; Wv]), and slices

The slices stay views: norms, rope and the cache read them by their row stride.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, Value, WeightSpec
from fastkernels.compiler.passes.merge_linears import can_merge, merge_linears

_THROUGH = ("view", "rms_norm")  # what may stand between a projection and the rotation, for one value each


def merge_qkv(graph: Graph) -> Graph:
    producers = graph.producers()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
    queries = {node.attributes["layer"]: node for node in graph.nodes if node.op == "paged_attention"}
    for append in graph.nodes:
        if append.op != "append_kv":
            continue
        q = queries[append.attributes["layer"]].inputs[0]
        k, v = append.inputs
        found = [_projection(graph, producers, value) for value in (q, k, v)]
        indices = [index for index in found if index is not None]
        linears = [graph.nodes[index] for index in indices]
        if len(set(indices)) != 3 or not can_merge(graph, linears):
            continue
        nodes, merged = merge_linears(graph, linears, "qkv_proj")
        first = min(indices)
        replacements.update({index: nodes if index == first else [] for index in indices})
        specs += merged
    return graph.rewrite(replacements, new_weights=specs)


def _projection(graph: Graph, producers: dict[Value, int], value: Value) -> int | None:
    """Index of the linear that value comes from, through views, head norms and the rotation; or None."""
    index = producers.get(value)
    while index is not None:
        node = graph.nodes[index]
        if node.op == "linear":
            return index
        if node.op == "rope":
            value = node.inputs[node.outputs.index(value)]
        elif node.op in _THROUGH:
            value = node.inputs[0]
        else:
            return None
        index = producers.get(value)
    return None
