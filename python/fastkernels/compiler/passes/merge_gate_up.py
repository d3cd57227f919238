"""The gate and up projections of a gated MLP as one linear.

silu(linear(x; Wg)) * linear(x; Wu)   ->   gate_up = linear(x; [Wg; Wu]); silu(gate_up[:n]) * gate_up[n:]
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, WeightSpec
from fastkernels.compiler.passes.merge_linears import can_merge, merge_linears


def merge_gate_up(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    specs: list[WeightSpec] = []
    for silu in graph.nodes:
        if silu.op != "silu":
            continue
        if len(users[silu.output]) != 1 or users[silu.output][0] == len(graph.nodes):
            continue
        mul = graph.nodes[users[silu.output][0]]
        if mul.op != "mul":
            continue
        up = mul.inputs[1] if mul.inputs[0] == silu.output else mul.inputs[0]
        indices = [producers[value] for value in (silu.inputs[0], up) if value in producers]
        linears = [graph.nodes[index] for index in indices]
        if (
            len(set(indices)) != 2
            or any(node.op != "linear" for node in linears)
            or not can_merge(graph, linears)
        ):
            continue
        nodes, merged = merge_linears(graph, linears, "gate_up_proj")
        first = min(indices)
        replacements.update({index: nodes if index == first else [] for index in indices})
        specs += merged
    return graph.rewrite(replacements, new_weights=specs)
