"""The merged gate and up projection and the activation over it, in one kernel where there is one.

    silu_mul(linear(x; W))   ->   linear_silu_mul(x; W)

The second output of the new node is what ``linear`` gave: room where it still takes two kernels
(``compiler/tune/calls.py``). Behind quantize, since only weights as they are have such a kernel.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node


def gated_linear(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    for index, act in enumerate(graph.nodes):
        if act.op != "silu_mul" or act.inputs[0] not in producers:
            continue
        linear_index = producers[act.inputs[0]]
        linear = graph.nodes[linear_index]
        if linear.op != "linear" or len(linear.weights) != 1 or users[linear.output] != [index]:
            continue
        outputs = (act.output, linear.output)
        replacements[linear_index] = []
        replacements[index] = [
            Node("linear_silu_mul", linear.inputs, outputs, linear.weights, linear.attributes)
        ]
    return graph.rewrite(replacements)
