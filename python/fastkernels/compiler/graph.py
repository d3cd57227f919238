"""The compiler's graph: what a trace yields, what every pass takes and returns, what lowering reads.

A value is one tensor of a step, flat over rows: [num_tokens, *row_shape], or [num_logits, *row_shape] in the
head. A node computes values from values. Values, nodes and graphs are immutable; a pass returns another
graph, in which a replacing node makes the very values its predecessors made, so nothing downstream is
renamed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from fastkernels.config import ModelConfig
from fastkernels.quantize import Scheme

Rows = Literal["tokens", "logits"]
Attribute = int | float | str | bool | None


class CompileError(ValueError):
    """A model holds something the compiler has no step for; the message names it and what is known."""


@dataclass(frozen=True)
class Value:
    """name: unique in its graph; row_shape: the shape without the rows; dtype: "model" or a name of
    torch's."""

    name: str
    row_shape: tuple[int, ...]
    rows: Rows = "tokens"
    dtype: str = "model"

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return prod(self.row_shape)


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of the engine and the checkpoint tensors it is made of.

    how: "copy" one source | "concat_rows": the sources one below the other (a merged projection) |
         "kv_scale": the source, or what stands for it where the checkpoint has none | "key_offset": the
         source, of the file that has these
    source_rows: size of the first dimension of each source
    dtype: "model" or a name of torch's
    quantized: what it is a part of, where it is one: shape and dtype are then the part's
    """

    name: str
    sources: tuple[str, ...]
    how: Literal["copy", "concat_rows", "kv_scale", "key_offset"]
    shape: tuple[int, ...]
    source_rows: tuple[int, ...]
    dtype: str = "model"
    quantized: QuantizedPart | None = None


@dataclass(frozen=True)
class QuantizedPart:
    """One of the tensors that ``scheme``, by its name, makes of the weight ``of``.

    stored: the checkpoint holds them; otherwise the weight is rounded as it is loaded
    """

    of: WeightSpec
    scheme: str
    part: str
    stored: bool = False


@dataclass(frozen=True)
class StoredScheme:
    """How the checkpoint holds the weight of a linear.

    alike: equal for linears that may become one
    order: None where its columns are in the model's order; else they are in another, by a part of their own,
           "permutation", and this is equal for linears of the same order
    """

    scheme: Scheme
    alike: Hashable = None
    order: Hashable = None


@dataclass(frozen=True)
class Quantization:
    """The schemes of a model's linears; None: they stay as they are. The head's is its own.

    stored: of a quantised checkpoint, by the name of the weight; it goes before the others
    kv_cache: dtype of its elements, "model" or a name of torch's
    key_offsets: a cache of bytes holds keys less what the checkpoint says
    """

    linears: Scheme | None = None
    head: Scheme | None = None
    stored: Mapping[str, StoredScheme] = field(default_factory=dict)
    kv_cache: str = "model"
    key_offsets: bool = False

    def stored_of(self, spec: WeightSpec) -> StoredScheme | None:
        """Of merged weights, which are alike, the first one's."""
        return self.stored.get(spec.sources[0])

    def may_lie_together(self, specs: Sequence[WeightSpec]) -> bool:
        """Whether what the checkpoint holds of these can lie one below the other."""
        found = [self.stored_of(spec) for spec in specs]
        if any(stored is None for stored in found):
            return all(stored is None for stored in found)
        rows = [
            stored.scheme.block(spec.shape[1])[0] for stored, spec in zip(found, specs, strict=True) if stored
        ]
        whole = all(spec.shape[0] % count == 0 for spec, count in zip(specs[:-1], rows[:-1], strict=True))
        return whole and len({stored.alike for stored in found if stored}) == 1


@dataclass(frozen=True)
class Node:
    """op, a word of ``lower.py``; inputs and outputs in that op's order; weights: names of WeightSpecs."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[str, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)

    @property
    def output(self) -> Value:
        return self.outputs[0]


@dataclass(frozen=True)
class Graph:
    """nodes are in the order they run; append_kv and paged_attention keep theirs, sharing the cache."""

    config: ModelConfig
    nodes: tuple[Node, ...]
    output: Value
    weights: Mapping[str, WeightSpec]
    quantization: Quantization = Quantization()

    def producers(self) -> dict[Value, int]:
        """Value -> index of the node that makes it."""
        return {value: index for index, node in enumerate(self.nodes) for value in node.outputs}

    def users(self) -> dict[Value, list[int]]:
        """Value -> indices of the nodes that read it, in order; the output has one more, past the end."""
        found: dict[Value, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(index)
        found.setdefault(self.output, []).append(len(self.nodes))
        return found

    def rewrite(
        self,
        replacements: Mapping[int, Iterable[Node]],
        *,
        new_weights: Iterable[WeightSpec] = (),
        output: Value | None = None,
    ) -> Graph:
        """The graph with the node at each index of ``replacements`` replaced by those nodes (none: removed).

        Weights that no node names any more are dropped; the others come in the order of their nodes.
        """
        nodes = [new for index, node in enumerate(self.nodes) for new in replacements.get(index, (node,))]
        weights = {**self.weights, **{spec.name: spec for spec in new_weights}}
        kept = {name: weights[name] for node in nodes for name in node.weights}
        return replace(self, nodes=tuple(nodes), weights=kept, output=output or self.output)
