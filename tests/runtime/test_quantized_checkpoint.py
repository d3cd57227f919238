"""Checkpoints of 8 bits in engines: on a GPU that rounds activations, on one that does not, on the CPU."""

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkernels import LLM
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint
from fastkernels.checkpoint.quantized import QuantizedWeights, QuantizedWriter, StoredLinear
from fastkernels.compiler import Plan
from fastkernels.config import ConfigError, EngineConfig
from fastkernels.quantize import SCHEMES, QuantizationError, find_scheme, on_cuda, stored_on_cuda
from fastkernels.runtime import bind, build
from fastkernels.runtime.build import compile_for
from fastkernels.runtime.weights import load_weights, random_weights
from tests.runtime.test_quantized_engine import matmul_on_the_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = list(range(40, 100))
NAMES = ["fp8", "fp8-block", "int8"]
HOPPER, AMPERE = (9, 0), (8, 0)
LEAVES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo, its layers' linears quantised to nearest."""
    demo, made = Checkpoint(DEMO_FOLDER), {}
    for name in NAMES:
        scheme = find_scheme(name)
        modules = [
            f"model.layers.{layer}.{part}.{leaf}"
            for layer in range(demo.config.num_layers)
            for part, leaves in LEAVES.items()
            for leaf in leaves
        ]
        made[name] = tmp_path_factory.mktemp("quantised") / name
        writer = QuantizedWriter(DEMO_FOLDER, made[name], dict.fromkeys(modules, name))
        for module in modules:
            writer.add(module, name, scheme.quantize(demo.tensor(f"{module}.weight").float()))
        writer.finish()
    return made


class InOrder(Checkpoint):
    """Columns in another order, the same for linears of an input. Those of a block stay in it."""

    @staticmethod
    def seed(linear: StoredLinear) -> int:
        return linear.module.in_size

    @cached_property
    def quantized(self) -> QuantizedWeights | None:
        found = super().quantized
        assert found is not None
        return replace(found, linears={name: self.reordered(one) for name, one in found.linears.items()})

    def reordered(self, linear: StoredLinear) -> StoredLinear:
        generator = torch.Generator().manual_seed(self.seed(linear))
        blocks = [
            block[torch.randperm(len(block), generator=generator)]
            for block in torch.arange(linear.module.in_size).split(128)
        ]
        order = torch.cat(blocks)

        def load(device: torch.device) -> dict[str, torch.Tensor]:
            parts = linear.load(device)
            packed = parts["packed"].view(torch.uint8)[:, order.to(device)].view(parts["packed"].dtype)
            return {**parts, "packed": packed}

        return replace(linear, load=load, permutation=order)


class InOwnOrders(InOrder):
    """Each linear has its own."""

    @staticmethod
    def seed(linear: StoredLinear) -> int:
        return sum(map(ord, linear.module.name))


def plan_of(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], **options: Any
) -> Plan:
    """On a made-up GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda", 0)
    return compile_for(
        checkpoint.config, EngineConfig(**options), device, torch.bfloat16, checkpoint.quantized
    )


def layer_of(plan: Plan) -> list[str]:
    """The ops from one attention to the next, which are the same for any two layers."""
    ops = [step.op for step in plan.steps]
    attentions = [number for number, op in enumerate(ops) if op == "paged_attention"]
    found = [ops[begin:end] for begin, end in pairwise(attentions)]
    assert len(found) == plan.config.num_layers - 1 and all(layer == found[0] for layer in found)
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_gpu(folders, monkeypatch, name):
    """As with ``quantization=``: to the steps, their buffers and attributes, and the bytes of weights."""
    plan = plan_of(Checkpoint(folders[name]), monkeypatch, HOPPER)
    gate = ["matmul_silu_mul_quant"] if name == "fp8" else ["matmul", "silu_mul_quant"]
    assert layer_of(plan) == [
        *("paged_attention", "quantize", "matmul"),
        *("add_rms_norm_quant", *gate, "matmul"),
        *("add_rms_norm_quant", "matmul", "rope_append_kv"),
    ]
    device = torch.device("cuda", 0)
    options = EngineConfig(quantization=name)
    asked = compile_for(Checkpoint(DEMO_FOLDER).config, options, device, torch.bfloat16)
    assert (plan.steps, plan.buffers) == (asked.steps, asked.buffers)
    assert {step.attributes["scheme"] for step in plan.steps if step.op == "matmul"} == {f"{name}@cuda"}


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_gathered_before_they_are_rounded(folders, monkeypatch, name):
    plan = plan_of(InOrder(folders[name]), monkeypatch, HOPPER)
    gathered = ["gather_columns", "quantize", "matmul"]
    assert layer_of(plan) == [
        *("paged_attention", *gathered),
        *("add_rms_norm", *gathered, "silu_mul", *gathered),
        *("add_rms_norm", *gathered, "rope_append_kv"),
    ]
    prefix = "layers.1.self_attn.qkv_proj"
    number = next(n for n, step in enumerate(plan.steps) if f"{prefix}.in_order" in step.outputs)
    gather, rounding, product = plan.steps[number : number + 3]
    assert gather.inputs[1] == f"model.{prefix}.weight.permutation"
    assert (rounding.inputs, rounding.outputs) == (gather.outputs, (f"{prefix}.x", f"{prefix}.x_scales"))
    weights = (f"model.{prefix}.weight.packed", f"model.{prefix}.weight.scales")
    assert product.inputs == (*rounding.outputs, *weights)
    assert plan.weights[gather.inputs[1]].dtype == "int64"


@pytest.mark.parametrize("name", NAMES)
def test_linears_of_one_order_share_what_is_gathered_and_its_bytes(folders, monkeypatch, name):
    """Where q, k, v and gate, up do not become one."""

    def counts(kind: type[Checkpoint], capability: tuple[int, int] = HOPPER) -> list[int]:
        disabled = ("merge_qkv", "merge_gate_up")
        plan = plan_of(kind(folders[name]), monkeypatch, capability, disabled_passes=disabled)
        layer = layer_of(plan)
        return [layer.count(op) for op in ("gather_columns", "quantize", "matmul", "quantized_linear")]

    assert counts(Checkpoint) == [0, 2, 7, 0]  # and two norms that leave bytes
    assert counts(InOrder) == [4, 4, 7, 0]
    assert counts(InOwnOrders) == [7, 7, 7, 0]
    assert counts(InOrder, AMPERE) == [4, 4, 7, 0]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_same_on_other_gpus(folders, monkeypatch, name):
    for kind in (Checkpoint, InOrder):
        plans = [plan_of(kind(folders[name]), monkeypatch, capability) for capability in (HOPPER, AMPERE)]
        assert plans[0].steps == plans[1].steps


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("kind", [Checkpoint, InOrder, InOwnOrders])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_plan(folders, monkeypatch, name, kind, capability):
    checkpoint = kind(folders[name])
    plan = plan_of(checkpoint, monkeypatch, capability)
    for weights in (
        load_weights(plan, checkpoint, device="cpu", dtype=torch.bfloat16),
        random_weights(plan, device="cpu", dtype=torch.bfloat16),
    ):
        assert set(weights) == set(plan.weights)
        for key, spec in plan.weights.items():
            wanted = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
            assert (tuple(weights[key].shape), weights[key].dtype) == (spec.shape, wanted)
            assert weights[key].is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_the_gpus_plan_gives_the_logits_of_quantization(folders, monkeypatch, name):
    """Without a GPU: its plan, with a plain product. Weights are rounded alike, so the same bits."""

    def compile_for_hopper(config, options, device, dtype, quantized=None, kv=None):
        return compile_for(config, options, torch.device("cuda", 0), torch.bfloat16, quantized, kv)

    def logits(model: Path | str, kind: type[Checkpoint] = Checkpoint, **options: Any) -> torch.Tensor:
        monkeypatch.setattr(build, "Checkpoint", kind)
        with LLM(model, device="cpu", max_num_seqs=1, **options) as llm:
            return llm.logits(IDS)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(build, "compile_for", compile_for_hopper)
    monkeypatch.setitem(bind.BINDERS, "matmul", matmul_on_the_cpu)
    exact = logits("demo", quantization=name)
    assert torch.equal(logits(folders[name]), exact)
    for kind in (InOrder, InOwnOrders):
        # Sums in another order move some of the rounded activations by a step, and those after them more.
        found = logits(folders[name], kind)
        assert (found - exact).norm() <= 0.03 * exact.norm()
        assert (found[0] - exact[0]).norm() <= 0.01 * exact[0].norm()


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_gives_the_logits_of_quantization(folders, monkeypatch, device, name):
    options = {"device": device.type, "dtype": "bf16", "max_num_seqs": 1}
    with LLM("demo", quantization=name, **options) as llm:
        exact = llm.logits(IDS)
    with LLM(folders[name], **options) as llm:
        assert torch.equal(llm.logits(IDS), exact)
    for kind in (InOrder, InOwnOrders):
        monkeypatch.setattr(build, "Checkpoint", kind)
        with LLM(folders[name], **options) as llm:
            assert (llm.logits(IDS) - exact).norm() <= 0.03 * exact.norm()


def test_schemes_of_stored_weights_by_gpu_and_size():
    for capability in (HOPPER, AMPERE):
        for name in SCHEMES:
            assert stored_on_cuda(name, 256, 128, capability) == f"{name}@cuda" == on_cuda(name, capability)
        for name in NAMES:
            assert stored_on_cuda(name, 252, 128, capability) == f"{name}-weight@cuda"
    for name in ("int8", "int8-zeros"):
        assert stored_on_cuda(name, 256, 72, HOPPER) == "int8-weight@cuda"
    assert stored_on_cuda("int8-zeros", 256, 1 << 17, HOPPER) == "int8-weight@cuda"
    assert stored_on_cuda("int4-g32-zeros-fp16", 252, 96, AMPERE) == "int4-g32-zeros-fp16@cuda"
    assert stored_on_cuda("int4-g64-fp16-fp8", 252, 128, AMPERE) == "int4-g64-fp16-fp8@cuda"
    assert stored_on_cuda("int4-channel-fp8", 252, 72, HOPPER) == "int4-channel@cuda"


def test_what_is_asked_for_is_still_refused(folders, monkeypatch):
    checkpoint = Checkpoint(folders["fp8"])
    with pytest.raises(QuantizationError, match=r"compute capability 8\.0 and later; this one has 7\.5"):
        plan_of(checkpoint, monkeypatch, (7, 5), head_quantization="int8")
    with pytest.raises(ConfigError, match=r"quantised already \(compressed-tensors\); leave out quantiz"):
        plan_of(checkpoint, monkeypatch, HOPPER, quantization="fp8")
    with pytest.raises(ConfigError, match="quantised weights on CUDA take dtype bf16 or fp16"):
        device = torch.device("cuda", 0)
        compile_for(checkpoint.config, EngineConfig(), device, torch.float32, checkpoint.quantized)
