"""The steps that one token takes: which norms go along with products, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch

from fastkernels import ops
from fastkernels.checkpoint import DEMO_FOLDER
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.compiler import Step, compile_model
from fastkernels.compiler.tune import BY_RULE
from fastkernels.models.presets import PRESETS
from fastkernels.ops.weight_only import RepackedWeight
from fastkernels.quantize import find_scheme
from fastkernels.runtime import executor as executor_module
from fastkernels.runtime.bind import BINDERS, Products
from fastkernels.runtime.executor import Executor
from fastkernels.runtime.one_token import for_one_token
from fastkernels.runtime.weights import load_weights
from tests.conftest import CUDA_REASON
from tests.ops.test_weight_only import unpack
from tests.tolerances import assert_similar

BYTES = ["fp8@cuda", "int8@cuda"]
PACKED = ["int4@cuda", "int8-weight@cuda", "nvfp4@cuda"]
PRODUCTS = {"matmul": "token_linear", "quantized_linear": "token_weight_only_linear"}


def fused(plan):
    return for_one_token(
        plan, plan.steps[: plan.head_start], lambda step: step.op in (*PRODUCTS, "matmul_silu_mul_quant")
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", BYTES)
def test_norms_go_along_with_the_products_about_them(biased, scheme):
    """All but the first, behind which comes attention_plan, and the last, behind which comes the head."""
    config = replace(PRESETS["llama-3.2-1b"], attention_bias=biased, o_bias=biased)
    gated = compile_model(config, quantization=scheme)
    assert any(step.op == "matmul_silu_mul_quant" for step in gated.steps) == (scheme == "fp8@cuda")
    plan = compile_model(config, quantization=scheme, disabled_passes=["gated_matmul"])
    before, steps = plan.steps[: plan.head_start], fused(plan)
    assert fused(gated) == steps, "a gate that goes along with a product of more tokens is on its own"
    norms = [step for step in before if step.op == "add_rms_norm_quant"]
    assert len(norms) == 2 * plan.config.num_layers - 1 and len(steps) == len(before) - len(norms)
    assert not any(step.op == "add_rms_norm_quant" for step in steps)
    normed = [step for step in steps if step.op == "token_linear" and step.attributes["normed"]]
    adding = [step for step in steps if step.op == "token_linear" and step.attributes["adds"]]
    assert len(normed) == len(adding) == len(norms)
    for norm, product in zip(norms, normed, strict=True):
        _, residual, weight = norm.inputs
        assert (
            product.inputs[:2] == (residual, weight) and product.attributes["eps"] == norm.attributes["eps"]
        )
    for norm, product in zip(norms, adding, strict=True):
        assert product.outputs == (norm.inputs[1],)
    biased = [step for step in before if step.op == "matmul" and len(step.inputs) == 5]
    assert len(biased) == len(
        [step for step in steps if step.op in ("matmul", "token_linear") and len(step.inputs) == 5]
    )


@pytest.mark.parametrize("scheme", PACKED)
def test_norms_and_gates_go_along_with_the_products_about_them(scheme):
    """Of weights with activations as they are, the gate too."""
    plan = compile_model(replace(PRESETS["llama-3.2-1b"], attention_bias=True), quantization=scheme)
    before, steps = plan.steps[: plan.head_start], fused(plan)
    norms = [step for step in before if step.op == "add_rms_norm"]
    gates = [step for step in before if step.op == "silu_mul"]
    layers = plan.config.num_layers
    assert len(norms) == 2 * layers and len(gates) == layers
    assert len(steps) == len(before) - 3 * layers + 1  # the last norm stays, behind which comes the head
    of = [step for step in steps if step.op == "token_weight_only_linear"]
    normed = [step for step in of if step.attributes["normed"]]
    adding = [step for step in of if step.attributes["adds"]]
    gated = [step for step in of if step.attributes["gated"]]
    assert [step.op for step in steps if "norm" in step.op] == ["rms_norm", "add_rms_norm"]
    assert len(normed) == len(adding) == 2 * layers - 1
    for norm, product in zip(norms, normed, strict=False):
        _, residual, weight = norm.inputs
        assert product.inputs[:2] == (residual, weight)
        assert product.attributes["eps"] == norm.attributes["eps"] and not product.attributes["adds"]
    for norm, product in zip(norms, adding, strict=False):
        assert product.outputs == (norm.inputs[1],)
    for gate, product in zip(gates, gated, strict=True):
        assert product.outputs == gate.outputs and product.attributes["normed"]
        assert product.attributes["scheme"] == scheme


@pytest.mark.parametrize("scheme", [None, "int8-zeros@cuda"])
def test_other_plans_stay_as_they_are(scheme):
    plan = compile_model(PRESETS["llama-3.2-1b"], quantization=scheme)
    assert fused(plan) == list(plan.steps[: plan.head_start])


def test_a_norm_that_others_read_stays():
    """Without the merges q, k and v read the bytes of one norm, and gate and up those of the other."""
    plan = compile_model(
        PRESETS["llama-3.2-1b"], quantization="fp8@cuda", disabled_passes=["merge_qkv", "merge_gate_up"]
    )
    assert fused(plan) == list(plan.steps[: plan.head_start])


def test_nothing_streams():
    plan = compile_model(PRESETS["llama-3.2-1b"], quantization="fp8@cuda")
    steps = for_one_token(plan, plan.steps, lambda step: False)
    assert steps == list(plan.steps)


def test_what_streams_by_rule():
    products = Products(BY_RULE)
    kinds = {}
    for name in (*BYTES, *PACKED, "fp8-block@cuda", "int8-zeros@cuda", "int4-fp8@cuda", None):
        plan = compile_model(PRESETS["qwen3-8b"], quantization=name)
        step = next(step for step in plan.steps if step.op in ("matmul", "linear", "quantized_linear"))
        sizes = (plan.buffers[buffer].row_size for buffer in (step.outputs[0], step.inputs[0]))
        product = executor_module.product_of(step, *sizes, torch.bfloat16)
        kinds[name] = products.streams_bytes(product)
    assert [name for name, streams in kinds.items() if streams] == BYTES + PACKED


def matmul_on_the_cpu(inputs, outputs, attributes):
    x, x_scales, weight, scales, *bias = inputs

    def call() -> None:
        product = (x.float() * x_scales.float()[:, None]) @ (weight.float() * scales).t()
        outputs[0].copy_(product + bias[0] if bias else product)

    return call


def token_linear_on_the_cpu(inputs, outputs, attributes):
    """From the ops it stands for."""
    x, beside, *rest = inputs

    def call() -> None:
        row, scales = x, beside
        if attributes["normed"]:
            how = {"per": "token", "dtype": rest[0].dtype}
            row, scales = ops.rms_norm_quant(x, beside, attributes["eps"], **how)
        product = torch.empty_like(outputs[0])
        matmul_on_the_cpu([row, scales, *rest], [product], {})()
        outputs[0].copy_(outputs[0] + product if attributes["adds"] else product)

    return call


def quantized_linear_on_the_cpu(inputs, outputs, attributes):
    """The weight is unpacked bit by bit."""
    x, packed, row_factors, *bias = inputs
    name = find_scheme(attributes["scheme"]).packed_format(len(row_factors), x.shape[1])
    weight = unpack(RepackedWeight(packed, row_factors, name, len(row_factors), x.shape[1])).float()

    def call() -> None:
        product = x.float() @ weight.t()
        outputs[0].copy_(product + bias[0] if bias else product)

    return call


def token_weight_only_linear_on_the_cpu(inputs, outputs, attributes):
    """From the ops it stands for."""
    x, *rest = inputs
    norm_weight = rest.pop(0) if attributes["normed"] else None
    rows = torch.empty(1, len(rest[1]))
    row = torch.empty_like(x)
    product = quantized_linear_on_the_cpu([row, *rest], [rows], attributes)

    def call() -> None:
        row.copy_(x if norm_weight is None else ops.rms_norm(x, norm_weight, attributes["eps"]))
        product()
        result = ops.silu_mul(rows) if attributes["gated"] else rows
        outputs[0].copy_(outputs[0] + result if attributes["adds"] else result)

    return call


@pytest.mark.parametrize("scheme", [*BYTES, *PACKED])
def test_the_steps_mean_the_same(scheme, monkeypatch):
    """Bit for bit, on the CPU, with every step in the place of its buffers."""
    monkeypatch.setitem(BINDERS, "matmul", matmul_on_the_cpu)
    monkeypatch.setitem(BINDERS, "token_linear", token_linear_on_the_cpu)
    monkeypatch.setitem(BINDERS, "quantized_linear", quantized_linear_on_the_cpu)
    monkeypatch.setitem(BINDERS, "token_weight_only_linear", token_weight_only_linear_on_the_cpu)
    checkpoint = Checkpoint(DEMO_FOLDER)
    plan = compile_model(checkpoint.config, quantization=scheme)
    weights = load_weights(plan, checkpoint, device="cpu", dtype=torch.float32)

    def logits(body: list[Step]) -> torch.Tensor:
        steps = (*body, *plan.steps[plan.head_start :])
        executor = Executor(
            replace(plan, steps=steps, head_start=len(body)),
            weights,
            device="cpu",
            dtype=torch.float32,
            max_num_tokens=1,
            max_num_seqs=1,
            max_seq_len=64,
            num_pages=4,
        )
        return torch.cat([step_of(executor, position, token) for position, token in enumerate(TOKENS)])

    together = logits(fused(plan))
    assert together.isfinite().all()
    assert torch.equal(together, logits(list(plan.steps[: plan.head_start])))


TOKENS = [17, 300, 5, 41, 99, 1000]


def step_of(executor: Executor, position: int, token: int) -> torch.Tensor:
    """Logits of a step of this one token of the only sequence, whose page is 0."""
    inputs = executor.inputs
    inputs.token_ids[0] = token
    inputs.positions[0] = inputs.slot_mapping[0] = position
    inputs.seq_lens[0] = position + 1
    inputs.cu_seqlens_q[0], inputs.cu_seqlens_q[1:] = 0, 1
    inputs.page_table[0, 0] = inputs.logits_indices[0] = 0
    return executor.run(1, 1, 1).clone()


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [*BYTES, *PACKED])
def test_logits_are_those_of_the_plan(scheme, dtype, monkeypatch):
    checkpoint = Checkpoint(DEMO_FOLDER)
    plan = compile_model(checkpoint.config, quantization=scheme)
    weights = load_weights(plan, checkpoint, device=torch.device("cuda", 0), dtype=dtype)

    def logits() -> torch.Tensor:
        executor = Executor(
            plan,
            weights,
            device="cuda",
            dtype=dtype,
            max_num_tokens=8,
            max_num_seqs=2,
            max_seq_len=64,
            num_pages=8,
        )
        rows = []
        for position, token in enumerate(TOKENS):
            rows.append(step_of(executor, position, token))
            executor.capture(1, 1, 1)
            assert torch.equal(executor.replay(1, 1, 1), rows[-1])
        executor.close()
        return torch.cat(rows)

    together = logits()
    monkeypatch.setattr(executor_module, "for_one_token", lambda plan, steps, streams: steps)
    assert_similar(together, logits(), 1e-3)
