"""The steps of a plan for one token, in fewer kernels.

    bytes = rms_norm_quant(x);  y = matmul(bytes)                    ->   y = token_linear(x, norm)
    y = matmul(a);  bytes, r = add_rms_norm_quant(y, r);             ->   r += token_linear(a)
    z = matmul(bytes)                                                     z = token_linear(r, norm)

And so with ``quantized_linear``, the norms that write 16 bits, and ``token_weight_only_linear``, which has
the gate too:

    z = quantized_linear(x);  h = silu_mul(z)             ->   h = token_weight_only_linear(x, gated)

A step ``matmul_silu_mul_quant`` whose product streams is its ``matmul`` and its ``silu_mul_quant`` here.

A norm of one row takes little time, but a launch, and every block of the product behind it can compute it
for itself while its weights are on their way. With more tokens the blocks would read more of x than of the
weight. Values are those of the plan, but for the order in which the norm's sum is added up, and that gate and
up are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastkernels.compiler import Plan, Step
from fastkernels.ops.token_linear import TOKEN_LINEAR_MAX_SIZE


def for_one_token(plan: Plan, steps: Sequence[Step], streams: Callable[[Step], bool]) -> list[Step]:
    """steps: of ``plan``, in a row; streams: whether a step is a product that ``ops.token_linear`` or
    ``ops.token_weight_only_linear`` can do."""

    steps = [part for step in steps for part in _apart(step, streams)]

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
        if norm.op not in _NORMS or norm.attributes.get("per", "token") != "token" or index + 1 == len(steps):
            return False
        behind, product, num_outputs = steps[index + 1], *_NORMS[norm.op]
        made = norm.outputs[:num_outputs]
        if behind.op != product or not streams(behind) or behind.inputs[:num_outputs] != made:
            return False
        if product == "matmul" and row_size(norm.inputs[0]) > TOKEN_LINEAR_MAX_SIZE:
            return False
        if any(read_from(name, index + 2) for name in made):
            return False
        if not norm.op.startswith("add_"):
            return read_from(norm.inputs[0], index + 2)  # so that it does not lie where the product writes
        before = steps[index - 1] if index else behind
        added, residual, _ = norm.inputs
        return (
            streams(before)
            and before.outputs == (added,)
            and norm.outputs[num_outputs] == residual
            and (added in made or not read_from(added, index + 1))
        )

    def is_gate(index: int) -> bool:
        """Whether ``steps[index]`` is a gate that the product before it does. What that reads is read again
        later, so that it does not lie where the gate writes."""
        gate, before = steps[index], steps[index - 1]
        return (
            gate.op == "silu_mul"
            and index - 2 in norms
            and before.op == "quantized_linear"
            and before.outputs == gate.inputs
            and row_size(gate.outputs[0]) % 16 == 0
            and not read_from(gate.inputs[0], index + 1)
            and read_from(_normalised(steps[index - 2]), index + 1)
        )

    norms = {index for index in range(len(steps)) if goes_along(index)}
    gates = {index for index in range(2, len(steps)) if is_gate(index)}
    fused = []
    for index, step in enumerate(steps):
        if index in norms or index in gates:
            continue
        norm = steps[index - 1] if index - 1 in norms else None
        behind = steps[index + 1] if index + 1 in norms | gates else None
        if behind is not None and behind.op in ("rms_norm", "rms_norm_quant"):
            behind = None
        if norm is not None or behind is not None:
            step = _of_one_token(step, norm, behind)
        fused.append(step)
    return fused


def _apart(step: Step, streams: Callable[[Step], bool]) -> Sequence[Step]:
    """A gated product as the two steps that it stands for, if the first streams; any other step as it is."""
    if step.op != "matmul_silu_mul_quant" or not streams(step):
        return (step,)
    out, scales, gate_up = step.outputs
    others = {name: value for name, value in step.attributes.items() if name != "per"}
    product = Step("matmul", step.inputs, (gate_up,), others)
    return product, Step("silu_mul_quant", (gate_up,), (out, scales), {"per": step.attributes["per"]})


# The product behind a norm, and how many of the norm's outputs it reads
_NORMS = {
    "rms_norm_quant": ("matmul", 2),
    "add_rms_norm_quant": ("matmul", 2),
    "rms_norm": ("quantized_linear", 1),
    "add_rms_norm": ("quantized_linear", 1),
}
_OPS = {"matmul": "token_linear", "quantized_linear": "token_weight_only_linear"}


def _normalised(norm: Step) -> str:
    """What a norm that goes along with products reads, the sum where it adds."""
    return norm.inputs[1] if norm.op.startswith("add_") else norm.inputs[0]


def _of_one_token(product: Step, norm: Step | None, behind: Step | None) -> Step:
    """product with the norm before it, and with the addition of a norm or the gate behind it."""
    gated = behind is not None and behind.op == "silu_mul"
    attributes: dict[str, int | float | str | bool | None] = {
        **product.attributes,
        "normed": norm is not None,
        "adds": behind is not None and not gated,
    }
    if product.op == "quantized_linear":
        attributes["gated"] = gated
    inputs, outputs = product.inputs, product.outputs
    if norm is not None:
        inputs = (_normalised(norm), norm.inputs[-1], *product.inputs[_NORMS[norm.op][1] :])
        attributes["eps"] = norm.attributes["eps"]
    if behind is not None:
        outputs = behind.outputs if gated else (_normalised(behind),)
    return replace(product, op=_OPS[product.op], inputs=inputs, outputs=outputs, attributes=attributes)
