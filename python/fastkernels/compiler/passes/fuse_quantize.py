"""The bytes that a product on a GPU takes, made by the kernel that computes the values.

    quantize(rms_norm(x))                       ->   rms_norm_quant(x)
    y, residual' = add_rms_norm(x, residual);
    quantize(y)                                 ->   add_rms_norm_quant(x, residual)
    quantize(silu_mul(gate_up))                 ->   silu_mul_quant(gate_up)

where nothing else reads the values. They are not rounded to the model's dtype on the way.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node

_FUSED = ("rms_norm", "add_rms_norm", "silu_mul")


def fuse_quantize(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    for index, node in enumerate(graph.nodes):
        if node.op != "quantize" or node.inputs[0] not in producers or users[node.inputs[0]] != [index]:
            continue
        first = graph.nodes[producers[node.inputs[0]]]
        if first.op not in _FUSED or first.output != node.inputs[0]:
            continue
        outputs = (*node.outputs, *first.outputs[1:])
        attributes = {**first.attributes, **node.attributes}
        fused = Node(f"{first.op}_quant", first.inputs, outputs, first.weights, attributes)
        replacements[producers[node.inputs[0]]] = [fused]
        replacements[index] = []
    return graph.rewrite(replacements)
