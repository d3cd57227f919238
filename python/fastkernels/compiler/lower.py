"""Graph -> steps and buffers: every node a Step, every value a buffer or a view of one.

Views and slices make alias buffers and no step. A value is written into the memory of an input, where the op
allows it and nothing reads those elements later: the rotation and the head norms of q and k in their slices
of the merged projection, the residual in its own place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastkernels.compiler.graph import CompileError, Graph, Node, Rows, Value
from fastkernels.compiler.plan import Buffer, BufferKind, Step
from fastkernels.compiler.trace import TOKEN_IDS

_ATTENTION_INPUTS = (
    "page_table",
    "seq_lens",
    "cu_seqlens_q",
    "attention_map",
    "attention_workspace",
)

# Buffers that are no value of the graph, by kind. KV caches are added one a layer.
_GIVEN: dict[BufferKind, tuple[str, ...]] = {
    "input": (
        "token_ids",
        "positions",
        "slot_mapping",
        "page_table",
        "seq_lens",
        "cu_seqlens_q",
        "logits_indices",
        "sampled",
    ),
    "constant": ("cos_sin",),
    "workspace": ("attention_map", "attention_workspace"),
}
_ROWS_OF_INPUTS: dict[str, Rows] = {
    "token_ids": "tokens",
    "positions": "tokens",
    "slot_mapping": "tokens",
    "logits_indices": "logits",
}


def kv_cache_name(layer: int) -> str:
    """The buffer of the layer's KV cache."""
    return f"kv_cache.{layer}"


@dataclass(frozen=True)
class _Op:
    """inputs: names of a step's inputs, from those of the node's values and weights.

    in_place: output index -> input indices whose memory it may take, the best first
    must: this output has no other place
    """

    inputs: Callable[[Node, tuple[str, ...]], tuple[str, ...]]
    in_place: dict[int, tuple[int, ...]]
    must: tuple[int, ...] = ()


def _plain(node: Node, values: tuple[str, ...]) -> tuple[str, ...]:
    return (*values, *node.weights)


def _cache(node: Node) -> str:
    return kv_cache_name(int(node.attributes["layer"] or 0))


OPS: dict[str, _Op] = {
    "embedding": _Op(_plain, {}),
    "linear": _Op(_plain, {}),
    "linear_silu_mul": _Op(_plain, {}),
    "quantized_linear": _Op(_plain, {}),
    "gather_columns": _Op(_plain, {}),
    "quantize": _Op(_plain, {}),
    "quantize_zeros": _Op(_plain, {}),
    "matmul": _Op(_plain, {}),
    "matmul_silu_mul_quant": _Op(_plain, {}),
    "rms_norm": _Op(_plain, {0: (0,)}),
    "add_rms_norm": _Op(_plain, {0: (0,), 1: (1,)}, must=(1,)),
    "rope": _Op(lambda node, values: (*values, "positions", "cos_sin"), {0: (0,), 1: (1,)}),
    "append_kv": _Op(lambda node, values: (*values, _cache(node), "slot_mapping", *node.weights), {}),
    "rope_append_kv": _Op(
        lambda node, values: (*values, "positions", "cos_sin", _cache(node), "slot_mapping", *node.weights),
        {0: (0,)},
    ),
    "paged_attention": _Op(
        lambda node, values: (*values, _cache(node), *_ATTENTION_INPUTS, *node.weights), {}
    ),
    "silu": _Op(_plain, {0: (0,)}),
    "mul": _Op(_plain, {0: (0, 1)}),
    "add": _Op(_plain, {0: (0, 1)}),
    "silu_mul": _Op(_plain, {}),
    "rms_norm_quant": _Op(_plain, {}),
    "add_rms_norm_quant": _Op(_plain, {2: (1,)}, must=(2,)),
    "silu_mul_quant": _Op(_plain, {}),
    "gather_rows": _Op(lambda node, values: (*values, "logits_indices"), {}),
}
"""The steps there are: kernels of fastkernels.ops or, for linear, gather_columns, silu, mul and add, of
torch."""

VIEWS = ("view", "slice")
_PRODUCTS = ("linear", "linear_silu_mul", "quantized_linear", "matmul", "matmul_silu_mul_quant")


@dataclass(frozen=True)
class Lowered:
    """Steps and buffers of a graph; steps[head_start:] run on the rows of the logits asked for."""

    steps: tuple[Step, ...]
    head_start: int
    output: str
    buffers: dict[str, Buffer]


def lower(graph: Graph) -> Lowered:
    """The steps of ``graph`` and two more: resolve_token_ids, the first, which puts ids sampled on the device
    in their places, and attention_plan, which makes the work map all layers share. It comes before the first
    product, whose weights are on their way while it runs.

    Raises CompileError for a node whose op is none of OPS, and for an add_rms_norm whose residual is read
    later.
    """
    return _Lowering(graph).run()


def count_kernels(graph: Graph) -> int:
    """Kernels of a step of this graph: its nodes that are no views, and the two that ``lower`` adds."""
    return sum(node.op not in VIEWS for node in graph.nodes) + 2


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.place: dict[Value, str] = {}  # value -> its buffer

    def run(self) -> Lowered:
        self._given_buffers()
        self._add_buffer(Buffer(TOKEN_IDS.name, "arena", (), "int32", "tokens"))
        self.place[TOKEN_IDS] = TOKEN_IDS.name
        self.steps.append(Step("resolve_token_ids", ("token_ids", "sampled"), (TOKEN_IDS.name,), {}))
        users = self.graph.users()
        self.spans = _Spans(self.graph, users)
        head_start = None
        for index, node in enumerate(self.graph.nodes):
            if node.op in VIEWS:
                self._view(node)
                continue
            if node.op == "gather_rows":
                head_start = len(self.steps)
            self._step(index, node)
        if head_start is None:
            raise CompileError("the graph has no gather_rows, with which the head of a plan begins")
        first_product = next(
            index for index, step in enumerate(self.steps) if step.op in _PRODUCTS or index == head_start
        )
        self.steps.insert(
            first_product,
            Step("attention_plan", ("seq_lens", "cu_seqlens_q"), ("attention_map",), self._attention_shape()),
        )
        head_start += 1
        return Lowered(tuple(self.steps), head_start, self.place[self.graph.output], self.buffers)

    def _given_buffers(self) -> None:
        for kind, names in _GIVEN.items():
            for name in names:
                dtype = "float32" if kind == "constant" else "int32"
                self._add_buffer(Buffer(name, kind, rows=_ROWS_OF_INPUTS.get(name, "all"), dtype=dtype))
        dtypes = {
            _cache(node): node.attributes.get("cache")
            for node in self.graph.nodes
            if "layer" in node.attributes
        }
        for layer in range(self.graph.config.num_layers):
            name = kv_cache_name(layer)
            self._add_buffer(Buffer(name, "kv_cache", dtype=str(dtypes.get(name) or "model")))
        for name, spec in self.graph.weights.items():
            self._add_buffer(Buffer(name, "weight", spec.shape, spec.dtype))

    def _attention_shape(self) -> dict[str, int | float | str | bool | None]:
        """Of the layers, which share one work map: right for any window, balanced for the first layer's."""
        config = self.graph.config
        return {
            "num_q_heads": config.num_q_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "window": config.sliding_window[0] or 0,
        }

    def _add_buffer(self, buffer: Buffer) -> str:
        if buffer.name in self.buffers:
            raise CompileError(f"two buffers are called {buffer.name!r}")
        self.buffers[buffer.name] = buffer
        return buffer.name

    def _view(self, node: Node) -> None:
        source = self.buffers[self.place[node.inputs[0]]]
        begin = node.attributes.get("begin", 0)
        assert isinstance(begin, int)
        value = node.output
        if begin + value.row_size > source.row_size or (
            node.op == "view" and value.row_size != source.row_size
        ):
            raise CompileError(
                f"{node.op} {value.name} wants elements {begin} to {begin + value.row_size} of the "
                f"{source.row_size} in a row of {source.name}"
            )
        base = source.base or source.name
        alias = Buffer(
            value.name, "alias", value.row_shape, value.dtype, value.rows, base, source.offset + begin
        )
        self.place[value] = self._add_buffer(alias)

    def _step(self, index: int, node: Node) -> None:
        op = OPS.get(node.op)
        if op is None:
            name = node.outputs[0].name if node.outputs else f"number {index}"
            raise CompileError(
                f"the node {name} is a {node.op!r}, which no step does; there are {', '.join(OPS)}"
            )
        values = tuple(self.place[value] for value in node.inputs)
        for number, value in enumerate(node.outputs):
            for candidate in op.in_place.get(number, ()):
                if self._may_overwrite(index, node, candidate, value):
                    self.place[value] = values[candidate]
                    break
            else:
                if number in op.must:
                    raise CompileError(
                        f"the {node.op} {node.output.name} updates in place "
                        f"{node.inputs[op.in_place[number][0]].name}, which a later node still reads"
                    )
                buffer = Buffer(value.name, "arena", value.row_shape, value.dtype, value.rows)
                self.place[value] = self._add_buffer(buffer)
        outputs = tuple(self.place[value] for value in node.outputs)
        self.steps.append(Step(node.op, op.inputs(node, values), outputs, dict(node.attributes)))

    def _may_overwrite(self, index: int, node: Node, candidate: int, output: Value) -> bool:
        """Nothing later reads the elements of this input, and no other input of the node shares them."""
        value = node.inputs[candidate]
        if value.row_shape != output.row_shape or self.buffers[self.place[value]].rows != output.rows:
            return False
        others = [other for number, other in enumerate(node.inputs) if number != candidate]
        if any(self.spans.overlap(value, other) for other in others):
            return False
        return not self.spans.read_after(index, value)


class _Spans:
    """Which elements of which node's output each value is, and who reads them when."""

    def __init__(self, graph: Graph, users: dict[Value, list[int]]) -> None:
        self.span: dict[Value, tuple[Value, int, int]] = {}
        self.readers: dict[Value, list[tuple[int, int, int]]] = {}  # root -> (node, begin, end)
        for node in graph.nodes:
            for value in node.outputs:
                self.span[value] = self._of_output(node, value)
        for value, indices in users.items():
            root, begin, end = self._find(value)
            for index in indices:
                if index == len(graph.nodes) or graph.nodes[index].op not in VIEWS:
                    self.readers.setdefault(root, []).append((index, begin, end))

    def _of_output(self, node: Node, value: Value) -> tuple[Value, int, int]:
        if node.op not in VIEWS:
            return value, 0, value.row_size
        root, begin, _ = self._find(node.inputs[0])
        begin += int(node.attributes.get("begin", 0) or 0)
        return root, begin, begin + value.row_size

    def _find(self, value: Value) -> tuple[Value, int, int]:
        return self.span.get(value, (value, 0, value.row_size))

    def overlap(self, one: Value, other: Value) -> bool:
        root, begin, end = self._find(one)
        other_root, other_begin, other_end = self._find(other)
        return root == other_root and begin < other_end and other_begin < end

    def read_after(self, index: int, value: Value) -> bool:
        root, begin, end = self._find(value)
        return any(
            reader > index and begin < other_end and other_begin < end
            for reader, other_begin, other_end in self.readers.get(root, ())
        )
