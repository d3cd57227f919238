"""A model definition -> Graph, by torch.fx on the meta device: no weight is read, nothing is computed.

The leaves of ``models/layers.py`` become nodes; so do the few functions a definition may use between them.
Attention becomes append_kv and paged_attention here, since an engine has no other kind. The graph's last node
is gather_rows: of all the logits the model defines, a step wants the rows at logits_indices.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastkernels.compiler.graph import Attribute, CompileError, Graph, Node, Value, WeightSpec
from fastkernels.config import ModelConfig
from fastkernels.models import CausalLM, build
from fastkernels.models.layers import LEAF_MODULES, Attention, RMSNorm, RotaryEmbedding

TOKEN_IDS = Value("ids", (), dtype="int32")
"""The step's token ids with those sampled on the device filled in."""

_TRACED_TOKENS = 13  # any count that no size of a model equals would do; it marks the row dimension
_FUNCTIONS = {operator.add: "add", torch.add: "add", operator.mul: "mul", torch.mul: "mul", F.silu: "silu"}


def trace(config: ModelConfig) -> Graph:
    """The graph of the model that ``config`` describes, unfused.

    Raises UnsupportedModelError for an unknown architecture, CompileError for a module, function or method in
    the definition that has no node.
    """
    with torch.device("meta"):
        model = build(config)
        model.build_table(_TRACED_TOKENS, "meta")
        module = fx.GraphModule(model, _LeafTracer().trace(model))
        shapes = _RowShapes(module)
        shapes.run(*(torch.zeros(_TRACED_TOKENS, dtype=torch.int64) for _ in range(2)))
    return _Translation(config, model, module, shapes.row_shapes).graph()


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_MODULES)


class _RowShapes(fx.Interpreter):
    """Runs the traced module on meta tensors and notes every node's shape without its rows."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.row_shapes: dict[fx.Node, tuple[tuple[int, ...], ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("placeholder", "output"):
            parts = result if isinstance(result, tuple) else (result,)
            for part in parts:
                if not isinstance(part, Tensor) or part.dim() == 0 or part.shape[0] != _TRACED_TOKENS:
                    raise CompileError(
                        f"{n.format_node()} does not give a row a token; every value of a model must be "
                        "[num_tokens, ...]"
                    )
            self.row_shapes[n] = tuple(tuple(part.shape[1:]) for part in parts)
        return result


class _Translation:
    """fx nodes, one by one, into nodes of the compiler's graph."""

    def __init__(
        self,
        config: ModelConfig,
        model: CausalLM,
        module: fx.GraphModule,
        row_shapes: dict[fx.Node, tuple[tuple[int, ...], ...]],
    ) -> None:
        self.config = config
        self.module = module
        self.aliases = model.aliases
        self.row_shapes = row_shapes
        self.values: dict[fx.Node, tuple[Value, ...]] = {}
        self.names: set[str] = set()
        self.nodes: list[Node] = []
        self.weights: dict[str, WeightSpec] = {}

    def graph(self) -> Graph:
        for n in self.module.graph.nodes:
            if n.op == "placeholder":
                self.values[n] = (TOKEN_IDS,) if n.target == "token_ids" else ()
            elif n.op == "call_module":
                self._module(n, self.module.get_submodule(str(n.target)))
            elif n.op == "call_function" and n.target is operator.getitem:
                self.values[n] = (self.values[n.args[0]][n.args[1]],)
            elif n.op == "call_function" and n.target in _FUNCTIONS:
                self._add(n, _FUNCTIONS[n.target], self._inputs(n))
            elif n.op == "call_method" and n.target in ("view", "reshape", "flatten", "unflatten"):
                self._add(n, "view", self._inputs(n))
            elif n.op == "output":
                return self._finish(n)
            else:
                raise CompileError(
                    f"the compiler has no step for {n.format_node()}; a model definition may use "
                    f"{', '.join(leaf.__name__ for leaf in LEAF_MODULES)}, +, *, silu and view"
                )
        raise CompileError("the traced model has no output")

    def _module(self, n: fx.Node, leaf: nn.Module) -> None:
        inputs, path = self._inputs(n), str(n.target)
        if isinstance(leaf, nn.Linear):
            names = ["weight"] if leaf.bias is None else ["weight", "bias"]
            self._add(n, "linear", inputs, [self._weight(path, leaf, name) for name in names])
        elif isinstance(leaf, nn.Embedding):
            self._add(n, "embedding", inputs, [self._weight(path, leaf, "weight")])
        elif isinstance(leaf, RMSNorm):
            self._add(n, "rms_norm", inputs, [self._weight(path, leaf, "weight")], eps=leaf.eps)
        elif isinstance(leaf, RotaryEmbedding):
            self._add(n, "rope", inputs, interleaved=leaf.interleaved)
        elif isinstance(leaf, Attention):
            q, k, v = inputs
            self.nodes.append(Node("append_kv", (k, v), (), attributes={"layer": leaf.layer_index}))
            self._add(
                n,
                "paged_attention",
                (q,),
                layer=leaf.layer_index,
                scale=leaf.scale,
                window=leaf.sliding_window or 0,
                soft_cap=leaf.soft_cap or 0.0,
            )
        else:
            raise CompileError(f"the compiler has no step for the module {type(leaf).__name__} at {path}")

    def _add(
        self,
        n: fx.Node,
        op: str,
        inputs: tuple[Value, ...],
        weights: list[str] | None = None,
        **attributes: Attribute,
    ) -> None:
        row_shapes = self.row_shapes[n]
        suffixes = [""] if len(row_shapes) == 1 else [f".{i}" for i in range(len(row_shapes))]
        name = self._name(n, op)
        outputs = tuple(
            Value(name + suffix, shape) for suffix, shape in zip(suffixes, row_shapes, strict=True)
        )
        self.values[n] = outputs
        self.nodes.append(Node(op, inputs, outputs, tuple(weights or ()), attributes))

    def _inputs(self, n: fx.Node) -> tuple[Value, ...]:
        """The values among n's arguments; sizes of a view and the positions are none."""
        return tuple(value for arg in n.args if isinstance(arg, fx.Node) for value in self.values[arg])

    def _weight(self, path: str, leaf: nn.Module, leaf_name: str) -> str:
        name = f"{path}.{leaf_name}"
        name = self.aliases.get(name, name)
        shape = tuple(getattr(leaf, leaf_name).shape)
        self.weights[name] = WeightSpec(name, (name,), "copy", shape, shape[:1])
        return name

    def _name(self, n: fx.Node, op: str) -> str:
        """A leaf's path, or where in the model the function stands; shortened to what tells nodes apart."""
        stack = n.meta.get("nn_module_stack") or {}
        path = str(n.target) if n.op == "call_module" else next((k for k in reversed(list(stack)) if k), "")
        if op in ("rope", "add", "mul", "silu", "view") and n.op != "call_module":
            path = f"{path}.{op}" if path else op
        if op == "rope":  # shared by the layers: its own path does not say whose
            path = self.nodes[-1].output.name.rpartition(".")[0] + ".rope"
        short = path.removeprefix("model.")
        name, number = short, 1
        while name in self.names:
            number += 1
            name = f"{short}_{number}"
        self.names.add(name)
        return name

    def _finish(self, n: fx.Node) -> Graph:
        (result,) = n.args
        if not isinstance(result, fx.Node) or len(self.values[result]) != 1:
            raise CompileError("a model must return one tensor, its logits [num_tokens, vocab_size]")
        (logits,) = self.values[result]
        output = Value("logits", logits.row_shape, rows="logits")
        self.nodes.append(Node("gather_rows", (logits,), (output,)))
        return Graph(self.config, tuple(self.nodes), output, self.weights)
