"""The residual addition and the norm that reads its sum in one kernel, which updates the residual in place.

h = h + x; y = rms_norm(h)   ->   y, h = add_rms_norm(x, h)
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, Value


def add_norm(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    for index, norm in enumerate(graph.nodes):
        if norm.op != "rms_norm" or norm.inputs[0] not in producers:
            continue
        total = norm.inputs[0]
        add_index = producers[total]
        add = graph.nodes[add_index]
        if add.op != "add" or users[total][0] != index or len(total.row_shape) != 1:
            continue
        residual = _dead_operand(add, users, add_index)
        if residual is None:
            continue
        x = add.inputs[1] if add.inputs[0] == residual else add.inputs[0]
        if x == residual:  # h + h
            continue
        replacements[add_index] = []
        replacements[index] = [
            Node("add_rms_norm", (x, residual), (norm.output, total), norm.weights, norm.attributes)
        ]
    return graph.rewrite(replacements)


def _dead_operand(add: Node, users: dict[Value, list[int]], index: int) -> Value | None:
    """The first operand that nothing reads after the addition, so that the sum may take its place."""
    return next((value for value in add.inputs if users[value][-1] == index), None)
