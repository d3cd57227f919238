"""Rotation and cache write in one kernel; the rotated k never goes to memory but into its page.

q, k = rope(q, k); append_kv(k, v)   ->   q = rope_append_kv(q, k, v)
"""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node


def rope_append(graph: Graph) -> Graph:
    producers, users = graph.producers(), graph.users()
    replacements: dict[int, list[Node]] = {}
    for index, append in enumerate(graph.nodes):
        if append.op != "append_kv":
            continue
        k, v = append.inputs
        rope_index = producers.get(k)
        if rope_index is None or users[k] != [index]:
            continue
        rope = graph.nodes[rope_index]
        if rope.op != "rope" or k != rope.outputs[1] or min(users[rope.outputs[0]]) < index:
            continue
        replacements[rope_index] = []
        replacements[index] = [
            Node(
                "rope_append_kv",
                (*rope.inputs, v),
                (rope.outputs[0],),
                attributes={**rope.attributes, **append.attributes},
            )
        ]
    return graph.rewrite(replacements)
