"""A plan: the steps of a model in the order they run, and the buffers and weights they name. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from fastkernels.compiler.graph import Attribute, WeightSpec
from fastkernels.config import ModelConfig

__all__ = ["Buffer", "Plan", "Report", "Step", "WeightSpec"]

BufferKind = Literal["arena", "alias", "input", "weight", "kv_cache", "constant", "workspace"]


@dataclass(frozen=True)
class Buffer:
    """One tensor that steps read or write.

    kind:      arena: placed by ``memory.py`` | alias: part of the rows of another buffer, never copied |
               input: of StepBuffers | weight | kv_cache: one a layer | constant: the rotary table |
               workspace: what attention needs beside, sized by the executor
    rows:      "tokens", "logits", or "all": the whole tensor whatever the step's size
    row_shape: of arena and alias buffers, the shape without the rows; of a weight, its whole shape
    base, offset: of an alias, the arena buffer and the elements of its row that come before
    """

    name: str
    kind: BufferKind
    row_shape: tuple[int, ...] = ()
    dtype: str = "model"
    rows: Literal["tokens", "logits", "all"] = "all"
    base: str | None = None
    offset: int = 0

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return prod(self.row_shape)

    def __str__(self) -> str:
        if self.base is None:
            return self.name
        return f"{self.base}[{self.offset}:{self.offset + self.row_size}]"


@dataclass(frozen=True)
class Step:
    """One kernel launch: op, the buffers it reads and writes in the order of ``lower.py``, and constants."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True)
class Report:
    """kernels_before: without any pass; after_pass: name of each pass that ran -> kernels once it had."""

    kernels_before: int
    kernels_after: int
    after_pass: Mapping[str, int]
    disabled_passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """steps[:head_start] is the body, whose rows are the step's tokens; the rest is the head, whose rows are
    the
    logits asked for. ``output`` names the logits."""

    config: ModelConfig
    steps: tuple[Step, ...]
    head_start: int
    output: str
    buffers: Mapping[str, Buffer]
    weights: Mapping[str, WeightSpec]
    report: Report

    def root(self, name: str) -> Buffer:
        """The buffer that owns the memory of the buffer called ``name``."""
        buffer = self.buffers[name]
        return buffer if buffer.base is None else self.buffers[buffer.base]

    @property
    def kv_caches(self) -> tuple[Buffer, ...]:
        """One a layer."""
        return tuple(buffer for buffer in self.buffers.values() if buffer.kind == "kv_cache")

    def describe(self, step: Step) -> tuple[str, str, str, str]:
        """A row of the plan as a table: op, inputs, outputs, attributes."""
        inputs = ", ".join(str(self.buffers[name]) for name in step.inputs)
        outputs = ", ".join(str(self.buffers[name]) for name in step.outputs)
        attributes = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in step.attributes.items()
        )
        return step.op, inputs, outputs, attributes

    def __str__(self) -> str:
        lines = []
        for number, step in enumerate(self.steps):
            op, inputs, outputs, attributes = self.describe(step)
            arrow = f"{inputs} -> {outputs}" if outputs else inputs
            lines.append(f"{number:4d}  {op:16s} {arrow}" + (f"  ({attributes})" if attributes else ""))
        return "\n".join(lines)
