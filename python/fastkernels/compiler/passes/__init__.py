"""The passes, in the order they run: each a pure function Graph -> Graph in a file of its own.

A pass finds a pattern and writes the node that does it in one kernel; switched off, the engine computes the
same with more kernels. quantize comes behind those that see plain linears, so that a merged weight is
quantised as one. Passes to come take their places here: shard (tensor and expert parallel) before the merges,
since it changes what a linear is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fastkernels.compiler.graph import Graph
from fastkernels.compiler.passes.act_mul import act_mul
from fastkernels.compiler.passes.add_norm import add_norm
from fastkernels.compiler.passes.fuse_quantize import fuse_quantize
from fastkernels.compiler.passes.gated_linear import gated_linear
from fastkernels.compiler.passes.gated_matmul import gated_matmul
from fastkernels.compiler.passes.merge_gate_up import merge_gate_up
from fastkernels.compiler.passes.merge_qkv import merge_qkv
from fastkernels.compiler.passes.quantize import quantize
from fastkernels.compiler.passes.quantize_kv import quantize_kv
from fastkernels.compiler.passes.rope_append import rope_append
from fastkernels.compiler.passes.select_rows import select_rows

__all__ = ["PASSES", "Pass", "UnknownPassError", "enabled_passes"]

Pass = Callable[[Graph], Graph]

PASSES: dict[str, Pass] = {
    "merge_qkv": merge_qkv,
    "merge_gate_up": merge_gate_up,
    "rope_append": rope_append,
    "act_mul": act_mul,
    "add_norm": add_norm,
    "select_rows": select_rows,
    "quantize": quantize,
    "fuse_quantize": fuse_quantize,
    "quantize_kv": quantize_kv,
    "gated_linear": gated_linear,
    "gated_matmul": gated_matmul,
}


class UnknownPassError(ValueError):
    """A name in ``disabled_passes`` is no pass; the message lists those there are."""


def enabled_passes(disabled: Collection[str] = ()) -> dict[str, Pass]:
    """PASSES without those named. Raises UnknownPassError for a name that is none."""
    for name in disabled:
        if name not in PASSES:
            raise UnknownPassError(f"no pass is called {name!r}; there are {', '.join(PASSES)}")
    return {name: run for name, run in PASSES.items() if name not in disabled}
