"""From a model's configuration to a plan: trace, passes, lowering. Nothing is computed, no weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from fastkernels.checkpoint.quantized import StoredLinear
from fastkernels.compiler.graph import CompileError, Quantization, StoredScheme, WeightSpec
from fastkernels.compiler.ledger import EngineMemoryError, Ledger, format_bytes
from fastkernels.compiler.lower import count_kernels, lower
from fastkernels.compiler.memory import ArenaLayout, arena_layout
from fastkernels.compiler.passes import PASSES, UnknownPassError, enabled_passes
from fastkernels.compiler.plan import Buffer, Plan, Report, Step
from fastkernels.compiler.trace import trace
from fastkernels.config import ModelConfig
from fastkernels.quantize import find_scheme

__all__ = [
    "PASSES",
    "ArenaLayout",
    "Buffer",
    "CompileError",
    "EngineMemoryError",
    "Ledger",
    "Plan",
    "Report",
    "Step",
    "UnknownPassError",
    "WeightSpec",
    "arena_layout",
    "compile_model",
    "format_bytes",
]


def compile_model(
    config: ModelConfig,
    *,
    disabled_passes: Collection[str] = (),
    quantization: str | None = None,
    head_quantization: str | None = None,
    stored: Mapping[str, StoredLinear] | None = None,
    kv_cache: str = "model",
    key_offsets: bool = False,
) -> Plan:
    """The plan of the model that ``config`` describes.

    disabled_passes: names in PASSES to leave out; the plan computes the same with more kernels, or, without
                     "quantize" or "quantize_kv", with all weights or the KV cache as they are
    quantization, head_quantization: names of schemes (``fastkernels.quantize``) of all linears but the head,
                     and of the head
    stored:          the linears that the checkpoint holds quantised, ``Checkpoint.quantized.linears``
    kv_cache:        dtype of the KV cache: "model", or a name of torch's, "float8_e4m3fn" or "int8"
    key_offsets:     such a cache holds keys less the checkpoint's offsets (``StoredKV.offsets``)
    Raises UnknownPassError, UnsupportedModelError, QuantizationError, or CompileError naming what has no
    step.
    """
    passes = enabled_passes(disabled_passes)
    linears, head = (
        None if name is None else find_scheme(name) for name in (quantization, head_quantization)
    )
    held = {
        f"{name}.weight": StoredScheme(find_scheme(linear.scheme), linear.alike, linear.order)
        for name, linear in (stored or {}).items()
        if linear.scheme is not None
    }
    schemes = Quantization(linears, head, held, kv_cache, key_offsets)
    graph = replace(trace(config), quantization=schemes)
    kernels_before = count_kernels(graph)
    after_pass = {}
    for name, run in passes.items():
        graph = run(graph)
        after_pass[name] = count_kernels(graph)
    lowered = lower(graph)
    report = Report(
        kernels_before, len(lowered.steps), after_pass, tuple(name for name in PASSES if name not in passes)
    )
    return Plan(
        config, lowered.steps, lowered.head_start, lowered.output, lowered.buffers, graph.weights, report
    )
