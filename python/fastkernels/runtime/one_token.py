"""The steps of a plan for one token, in fewer kernels.

    bytes = rms_norm_quant(x);  y = matmul(bytes)                    ->   y = token_linear(x, norm)
    y = matmul(a);  bytes, r = add_rms_norm_quant(y, r);             ->   r += token_linear(a)
    z = matmul(bytes)                                                     z = token_linear(r, norm)

A norm of one row takes little time, but a launch, and every block of the product behind it can compute it
for itself while its weights are on their way. With more tokens the blocks would read more of x than of the
weight. Values are those of the plan, but for the order in which the norm's sum is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastkernels.compiler import Plan, Step
from fastkernels.ops.token_linear import TOKEN_LINEAR_MAX_SIZE


def for_one_token(plan: Plan, steps: Sequence[Step], streams: Callable[[Step], bool]) -> list[Step]:
    """steps: of ``plan``, in a row; streams: whether a step is a product that ``ops.token_linear`` can do."""

    def row_size(name: str) -> int:
        return plan.buffers[name].row_size

    def read_from(name: str, begin: int) -> bool:
        """Whether a step from ``begin`` on reads what the buffer holds before it."""
        root = plan.root(name).name
        for step in steps[begin:]:
            if any(plan.root(other).name == root for other in step.inputs):
                return True
            if any(plan.root(other).name == root for other in step.outputs):
                return False
        return False

    def goes_along(index: int) -> bool:
        """Whether the norm ``steps[index]`` is done by the products about it."""
        norm = steps[index]
        if norm.op not in _NORMS or norm.attributes["per"] != "token" or index + 1 == len(steps):
            return False
        behind = steps[index + 1]
        if not streams(behind) or behind.inputs[:2] != norm.outputs[:2]:
            return False
        if row_size(norm.inputs[0]) > TOKEN_LINEAR_MAX_SIZE:
            return False
        if any(read_from(name, index + 2) for name in norm.outputs[:2]):
            return False
        if norm.op == "rms_norm_quant":
            return True
        before = steps[index - 1] if index else behind
        added, residual, _ = norm.inputs
        return (
            streams(before)
            and before.outputs == (added,)
            and norm.outputs[2] == residual
            and not read_from(added, index + 1)
        )

    norms = {index for index in range(len(steps)) if goes_along(index)}
    fused = []
    for index, step in enumerate(steps):
        if index in norms:
            continue
        norm = steps[index - 1] if index - 1 in norms else None
        added = (
            steps[index + 1] if index + 1 in norms and steps[index + 1].op == "add_rms_norm_quant" else None
        )
        if norm is not None or added is not None:
            step = _token_linear(step, norm, added)
        fused.append(step)
    return fused


_NORMS = ("rms_norm_quant", "add_rms_norm_quant")


def _token_linear(product: Step, norm: Step | None, added: Step | None) -> Step:
    """product with the norm before it and the addition of the norm behind it."""
    attributes = {"normed": norm is not None, "adds": added is not None}
    inputs = product.inputs
    if norm is not None:
        x = norm.inputs[1] if norm.op == "add_rms_norm_quant" else norm.inputs[0]
        inputs = (x, norm.inputs[-1], *product.inputs[2:])
        attributes["eps"] = norm.attributes["eps"]  # type: ignore[assignment]
    outputs = product.outputs if added is None else (added.inputs[1],)
    return replace(product, op="token_linear", inputs=inputs, outputs=outputs, attributes=attributes)
