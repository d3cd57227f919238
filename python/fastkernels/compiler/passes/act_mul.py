"""Activation and gate in one kernel, over the two halves of a merged gate and up projection.

    silu(gate_up[:n]) * gate_up[n:]   ->   silu_mul(gate_up)

Needs merge_gate_up: two tensors that are not halves of one stay silu and mul.
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, Value


def act_mul(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}

    def made_by(value: Value, op: str) -> Node | None:
        index = producers.get(value)
        return graph.nodes[index] if index is not None and graph.nodes[index].op == op else None

    for index, mul in enumerate(graph.nodes):
        if mul.op != "mul":
            continue
        for activated, up in (mul.inputs, mul.inputs[::-1]):
            silu, up_slice = made_by(activated, "silu"), made_by(up, "slice")
            gate_slice = silu and made_by(silu.inputs[0], "slice")
            if not silu or not up_slice or not gate_slice or users[activated] != [index]:
                continue
            (whole,) = gate_slice.inputs
            begins = (gate_slice.attributes["begin"], up_slice.attributes["begin"])
            if up_slice.inputs != (whole,) or begins != (0, whole.row_size // 2) or len(users[whole]) != 2:
                continue
            unused = [producers[activated]]
            unused += [producers[v] for v in (silu.inputs[0], up) if len(users[v]) == 1]
            replacements.update({dropped: [] for dropped in unused})
            replacements[index] = [Node("silu_mul", (whole,), mul.outputs)]
            break
    return graph.rewrite(replacements)
