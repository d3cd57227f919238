"""The merged gate and up projection of bytes and the activation over it, which leaves bytes, as one node.

    silu_mul_quant(matmul(x, its scales; W))   ->   matmul_silu_mul_quant(x, its scales; W)

The third output of the new node is what ``matmul`` gave: room, for the projection where the activation is the
second kernel, and else for the values that the first one leaves gated and the second makes bytes of
(``compiler/tune/calls.py``). Of e4m3 with a scale a token alone: with scales of blocks, and of int8, the gate
in the product gains nothing (docs/kernels/gemm.md). A projection with a bias keeps its kernels.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node
from fastkernels.quantize import Rounded, find_scheme


def gated_matmul(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    for index, act in enumerate(graph.nodes):
        if act.op != "silu_mul_quant" or act.inputs[0] not in producers:
            continue
        matmul_index = producers[act.inputs[0]]
        matmul = graph.nodes[matmul_index]
        if matmul.op != "matmul" or users[matmul.output] != [index]:
            continue
        scheme = find_scheme(str(matmul.attributes["scheme"]))
        has_bias = any(graph.weights[name].quantized is None for name in matmul.weights)
        if has_bias or not isinstance(scheme, Rounded) or scheme.scheme.activation != "e4m3":
            continue
        outputs = (*act.outputs, matmul.output)
        attributes = {**matmul.attributes, **act.attributes}
        replacements[matmul_index] = []
        replacements[index] = [
            Node("matmul_silu_mul_quant", matmul.inputs, outputs, matmul.weights, attributes)
        ]
    return graph.rewrite(replacements)
