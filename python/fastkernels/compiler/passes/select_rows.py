"""The vocabulary projection for the rows that are asked for only.

    logits = gather_rows(linear(x))   ->   logits = linear(gather_rows(x))

In a prefill chunk of 512 tokens that is 1 row of 512, of the model's largest GEMM.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, Value


def select_rows(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    index = next(i for i, node in enumerate(graph.nodes) if node.op == "gather_rows")
    gather = graph.nodes[index]
    (every,) = gather.inputs
    linear_index = producers[every]
    linear = graph.nodes[linear_index]
    if linear.op != "linear" or users[every] != [index]:
        return graph
    (x,) = linear.inputs
    chosen = Value(f"{x.name}.chosen", x.row_shape, rows="logits")
    head = [
        Node("gather_rows", (x,), (chosen,)),
        Node("linear", (chosen,), gather.outputs, linear.weights, linear.attributes),
    ]
    return graph.rewrite({linear_index: [], index: head})
