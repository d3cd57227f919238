"""What merge_qkv and merge_gate_up share: several linears of one input as one, and slices of its rows."""

from __future__ import annotations

from fastkernels.compiler.graph import Graph, Node, Value, WeightSpec


def can_merge(graph: Graph, linears: list[Node]) -> bool:
    """All read the same input, all or none have a bias, and what a quantised checkpoint holds goes
    together."""
    inputs = {node.inputs for node in linears}
    specs = [graph.weights[node.weights[0]] for node in linears]
    same = len(inputs) == 1 and len({len(node.weights) for node in linears}) == 1
    return same and graph.quantization.may_lie_together(specs)


def merge_linears(graph: Graph, linears: list[Node], merged_name: str) -> tuple[list[Node], list[WeightSpec]]:
    """One linear whose weight is those of ``linears`` one below the other, and a slice for each of their
    outputs.

    merged_name: what stands in place of the last part of the first one's name, say "qkv_proj"
    Returns the nodes and the specs of the merged weights.
    """

    def renamed(name: str, leaf: str) -> str:
        return f"{name.removesuffix(leaf).rpartition('.')[0]}.{merged_name}{leaf}"

    specs = []
    for names in zip(*(node.weights for node in linears), strict=True):
        parts = [graph.weights[name] for name in names]
        leaf = "." + names[0].rpartition(".")[2]
        sources = tuple(source for part in parts for source in part.sources)
        rows = tuple(count for part in parts for count in part.source_rows)
        shape = (sum(rows), *parts[0].shape[1:])
        specs.append(WeightSpec(renamed(names[0], leaf), sources, "concat_rows", shape, rows))
    outputs = [node.output for node in linears]
    merged = Value(renamed(outputs[0].name, ""), (sum(value.row_size for value in outputs),), outputs[0].rows)
    nodes = [Node("linear", linears[0].inputs, (merged,), tuple(spec.name for spec in specs))]
    begin = 0
    for value in outputs:
        nodes.append(Node("slice", (merged,), (value,), attributes={"begin": begin}))
        begin += value.row_size
    return nodes, specs
