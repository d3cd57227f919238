"""Engines with quantised weights: loaded as the scheme says, and as good as torch on the same weights."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastkernels import LLM, SamplingParams, ops
from fastkernels.checkpoint import DEMO_FOLDER
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.checkpoint.weights import load_weights as load_definition
from fastkernels.compiler import PASSES, CompileError, Plan, compile_model
from fastkernels.compiler.ledger import estimate, weights_bytes
from fastkernels.config import ConfigError, EngineConfig
from fastkernels.models import build
from fastkernels.ops import reference
from fastkernels.quantize import SCHEMES, QuantizationError, Scheme, find_scheme, on_cuda
from fastkernels.runtime import bind
from fastkernels.runtime.build import compile_for
from fastkernels.runtime.weights import load_weights, random_weights
from tests.checkpoints import make_checkpoint
from tests.conftest import CUDA_REASON

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["def fibonacci(n):", "import os\n", "class Queue:\n    def __init__(self"]
NUM_TOKENS = 24
NAMES = [*SCHEMES, "int4-g32", "int4-channel-zeros", "int4-zeros"]


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint(DEMO_FOLDER)


def definition_of(checkpoint: Checkpoint, scheme: Scheme, head: Scheme | None) -> nn.Module:
    """The model's plain definition with dequantised weights and activations rounded as the scheme does."""
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_definition(model, checkpoint, dtype=torch.float32)
    model.build_table(checkpoint.config.max_position_embeddings)
    plan = compile_model(
        checkpoint.config, quantization=scheme.name, head_quantization=head.name if head else None
    )
    weights = load_weights(plan, checkpoint, device="cpu", dtype=torch.float32)
    for part in (spec.quantized for spec in plan.weights.values() if spec.quantized):
        if part.part != "packed":
            continue
        of, one = part.of, find_scheme(part.scheme)
        parts = {name: weights[f"{of.name}.{name}"] for name in one.parts(*of.shape)}
        whole = one.dequantize({**parts, "packed": in_rows(parts["packed"])})
        for source, rows in zip(of.sources, whole.split(list(of.source_rows)), strict=True):
            path = "lm_head" if source == "model.embed_tokens.weight" else source.removesuffix(".weight")
            linear = model.get_submodule(path)
            linear.weight = nn.Parameter(rows, requires_grad=False)
            linear.register_forward_pre_hook(
                lambda module, args, one=one: (
                    reference.round_activation(args[0], one.activation, torch.float32),
                )
            )
    return model


def in_rows(packed: torch.Tensor) -> torch.Tensor:
    """What ``ops.interleave_rows`` was given; here there are multiples of 8 rows."""
    if not ops.interleaves(packed):
        return packed
    groups = packed.view(packed.shape[0] // 8, packed.shape[1] // 64, 8, 64)
    return groups.transpose(1, 2).reshape(packed.shape)


def greedy(model: nn.Module, token_ids: list[int]) -> list[int]:
    tokens = list(token_ids)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            logits = model(torch.tensor(tokens), torch.arange(len(tokens)))
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(token_ids) :]


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, None) for name in NAMES), ("int4", "int8-weight"), ("int4", "fp8-weight"), ("int8", "fp8")],
)
def test_greedy_tokens_are_those_of_the_dequantised_model(demo, name, head):
    model = definition_of(demo, find_scheme(name), find_scheme(head) if head else None)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM("demo", device="cpu", max_num_seqs=4, quantization=name, head_quantization=head) as llm:
        outputs = llm.generate(PROMPTS, params)
        alone = llm.generate(PROMPTS[0], params)[0]
        for output in outputs:
            if name == "int4-fp8":  # the demo model hesitates here, and see below
                assert_nearly_greedy(model, output.prompt_token_ids, output.token_ids)
            else:
                assert output.token_ids == greedy(model, output.prompt_token_ids)
        assert alone.token_ids == outputs[0].token_ids
        logits = llm.logits(outputs[0].prompt_token_ids)
    with torch.inference_mode():
        ids = torch.tensor(outputs[0].prompt_token_ids)
        exact = model(ids, torch.arange(len(ids)))
    # Where activations are rounded, sums in another order move some of them by a step.
    limit = 2e-4 if find_scheme(name).activation is None else 2e-2
    assert (logits - exact).abs().max() <= limit * exact.abs().max()


def assert_nearly_greedy(model: nn.Module, prompt: list[int], token_ids: list[int]) -> None:
    """Every token is one that the model holds for as good as its best, within what rounding moves logits."""
    ids = torch.tensor(prompt + token_ids[:-1])
    with torch.inference_mode():
        logits = model(ids, torch.arange(len(ids)))[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 2e-2 * logits.abs().max()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(demo, name, dtype, device):
    """Logits no further from the dequantised model in fp32 than twice the engine's own in that dtype."""
    scheme = find_scheme(name)
    ids = list(range(40, 100))
    model = definition_of(demo, scheme, None)
    with torch.inference_mode():
        exact = model(torch.tensor(ids), torch.arange(len(ids)))
    load_definition(model, demo, dtype=torch.float32)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    with torch.inference_mode():
        plain_exact = model(torch.tensor(ids), torch.arange(len(ids)))

    def error(exact: torch.Tensor, **options: str | None) -> float:
        with LLM("demo", device=str(device), dtype=dtype, max_num_seqs=1, **options) as llm:
            return ((llm.logits(ids).cpu() - exact).norm() / exact.norm()).item()

    limit = 2 * error(plain_exact) if scheme.activation is None else 0.03
    assert error(exact, quantization=name) <= limit


@pytest.mark.parametrize("head", ["fp8-weight", "int8-weight"])
def test_int4_with_a_head_of_bytes(demo, head, device):
    """As far from the dequantised model as int4 alone is from its own, on either device."""
    ids = list(range(40, 100))

    def error(head: str | None) -> float:
        model = definition_of(demo, find_scheme("int4"), find_scheme(head) if head else None)
        with torch.inference_mode():
            exact = model(torch.tensor(ids), torch.arange(len(ids)))
        options = {"quantization": "int4", "head_quantization": head, "max_num_seqs": 1}
        with LLM("demo", device=str(device), dtype="bf16", **options) as llm:
            return ((llm.logits(ids).cpu() - exact).norm() / exact.norm()).item()

    assert error(head) <= 1.5 * error(None)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_weights_are_the_schemes(demo, name):
    """From the checkpoint's own dtype, merged first, in the plan's shapes; the ledger counts their bytes."""
    scheme = find_scheme(name)
    plan = compile_model(demo.config, quantization=name, head_quantization="int8")
    weights = load_weights(plan, demo, device="cpu", dtype=torch.float16)
    prefix = "model.layers.3.self_attn"
    merged = torch.cat([demo.tensor(f"{prefix}.{part}_proj.weight") for part in "qkv"])
    expected = scheme.quantize(merged)
    for part, tensor in expected.items():
        found = weights[f"{prefix}.qkv_proj.weight.{part}"]
        found = in_rows(found) if part == "packed" else found
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(
        in_rows(weights["model.embed_tokens.weight.packed"]),
        find_scheme("int8").quantize(demo.tensor("model.embed_tokens.weight"))["packed"],
    )
    assert weights["model.embed_tokens.weight"].dtype == torch.float16
    assert set(weights) == set(plan.weights)
    assert weights_bytes(plan, 2) == sum(weight.nbytes for weight in weights.values())


def test_random_weights_are_quantised(demo):
    plan = compile_model(demo.config, quantization="int4")
    weights = random_weights(plan, device="cpu", dtype=torch.bfloat16)
    for name, spec in plan.weights.items():
        wanted = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
        assert (tuple(weights[name].shape), weights[name].dtype) == (spec.shape, wanted)


def test_the_plan_and_the_ledger(demo):
    sizes = {"max_num_tokens": 64, "max_num_seqs": 4, "max_seq_len": 128, "page_size": 16, "element_bytes": 2}

    def bytes_of(**options: object) -> int:
        return estimate(compile_model(demo.config, **options), **sizes).weights_bytes

    plan = compile_model(demo.config, quantization="int4")
    steps = [step for step in plan.steps if step.op == "quantized_linear"]
    assert len(steps) == 4 * demo.config.num_layers
    assert all(step.attributes["scheme"] == "int4" for step in steps)
    assert [step.op for step in plan.steps[plan.head_start :]] == ["gather_rows", "linear"]
    assert list(plan.report.after_pass) == list(PASSES)
    linears = 10 * (512 * 256 + 256 * 256 + 1280 * 256 + 256 * 640)
    assert bytes_of() - bytes_of(quantization="int4") == 2 * linears - linears // 2 - linears // 64
    assert bytes_of() - bytes_of(quantization="int8") == linears - 4 * 10 * (512 + 256 + 1280 + 256)
    # The embedding that the head shares stays.
    assert bytes_of(head_quantization="int8") - bytes_of() == 4096 * 256 + 4096 * 4
    assert bytes_of(quantization="int4", disabled_passes=["quantize"]) == bytes_of()


@pytest.mark.parametrize("disabled", ["merge_qkv", "merge_gate_up", "select_rows", "quantize"])
def test_without_a_pass(demo, disabled):
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    options = {"device": "cpu", "max_num_seqs": 1}
    schemes = {"quantization": "int4-g32", "head_quantization": "int8"}
    with LLM("demo", **options, **({} if disabled == "quantize" else schemes)) as llm:
        expected = llm.generate(PROMPTS[0], params)[0].token_ids
    with LLM("demo", **options, **schemes, disabled_passes=(disabled,)) as llm:
        assert llm.generate(PROMPTS[0], params)[0].token_ids == expected


def test_biases_are_kept(tmp_path):
    """A model whose linears have biases, in rows that no group divides."""
    folder = make_checkpoint(tmp_path, "llama-biased")
    ids = list(range(3, 40))
    with LLM(folder, device="cpu", max_num_seqs=1) as llm:
        plain = llm.logits(ids)
    for name in ("int8-weight", "fp8", "int4-channel"):
        with LLM(folder, device="cpu", max_num_seqs=1, quantization=name, head_quantization=name) as llm:
            logits = llm.logits(ids)
        limit = 0.3 if name == "int4-channel" else 0.1
        assert (logits - plain).norm() <= limit * plain.norm()


# --- what is refused --------------------------------------------------------------------------------------


def test_an_unknown_scheme_is_named():
    with pytest.raises(
        ConfigError, match="no quantization scheme is called 'int5'; there are fp8, fp8-block"
    ):
        LLM("demo", device="cpu", quantization="int5")
    with pytest.raises(ConfigError, match="no quantization scheme is called 'w4'"):
        LLM("demo", device="cpu", head_quantization="w4")


def test_a_group_that_does_not_divide_is_named(demo):
    config = replace(demo.config, intermediate_size=600)
    with pytest.raises(
        QuantizationError,
        match=r"model.layers.0.mlp.down_proj.weight cannot be quantised: int4 takes rows of a multiple of "
        "128, its groups; this weight's have 600",
    ):
        compile_model(config, quantization="int4")


def test_a_broken_weight_is_named(demo, monkeypatch):
    plan = compile_model(demo.config, quantization="int8")
    tensor = demo.tensor

    def broken(name: str, **options: object) -> torch.Tensor:
        found = tensor(name, **options)
        return torch.full_like(found, float("nan")) if name == "model.layers.1.mlp.up_proj.weight" else found

    monkeypatch.setattr(demo, "tensor", broken)
    with pytest.raises(
        QuantizationError,
        match=r"model.layers.1.mlp.gate_up_proj.weight cannot be quantised: int8 takes finite weights",
    ):
        load_weights(plan, demo, device="cpu", dtype=torch.float32)


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
def test_what_cuda_does_not_take():
    with pytest.raises(ConfigError, match="quantised weights on CUDA take dtype bf16 or fp16"):
        LLM("demo", device="cuda", dtype="fp32", quantization="int4")


@pytest.mark.parametrize("head", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["fp8", "fp8-block", "int8", "int4-fp8"])
def test_rounded_activations_give_the_cpus_logits(demo, name, dtype, head, device):
    """One sequence in steps of many tokens, and of 1, 3 and 17; against the CPU's engine in fp32."""
    ids = list(range(40, 100))
    options = {"max_num_seqs": 1, "quantization": name, "head_quantization": head}
    with LLM("demo", device="cpu", dtype="fp32", **options) as llm:
        exact = llm.logits(ids)
    for max_num_tokens in (64, 17, 3, 1):
        with LLM("demo", device=device.type, dtype=dtype, max_num_tokens=max_num_tokens, **options) as llm:
            logits = llm.logits(ids).cpu()
        assert torch.isfinite(logits).all()
        assert (logits - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "int8", "int4-fp8"])
def test_rounded_activations_decode_as_they_prefill(demo, name, device):
    """Tokens that decode steps chose, in graphs on a GPU, are (nearly) those that a prefill would."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM("demo", device=device.type, dtype="bf16", max_num_seqs=4, quantization=name) as llm:
        outputs = llm.generate(PROMPTS, params)
        assert [o.token_ids for o in llm.generate(PROMPTS, params)] == [o.token_ids for o in outputs]
        for output in outputs:
            prompt = output.prompt_token_ids
            logits = llm.logits(prompt + output.token_ids[:-1])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(output.token_ids, device=logits.device)[:, None])[:, 0]
            assert (logits.amax(1) - chosen).max() <= 0.05 * logits.abs().max()


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "int8"])
def test_a_plan_that_rounds_activations_for_a_gpu(demo, name):
    """quantize and matmul, in arena buffers of bytes; weights and their bytes are the scheme's own."""
    schemes = {"quantization": f"{name}@cuda", "head_quantization": "int8@cuda"}
    plan = compile_model(demo.config, **schemes, disabled_passes=["fuse_quantize"])
    plain = compile_model(demo.config, quantization=name, head_quantization="int8")
    ops_of = [step.op for step in plan.steps]
    assert ops_of.count("quantize") == ops_of.count("matmul") == 4 * demo.config.num_layers + 1
    assert [step.op for step in plan.steps[plan.head_start :]] == ["gather_rows", "quantize", "matmul"]
    assert {spec.name: spec.shape for spec in plan.weights.values()} == {
        spec.name: spec.shape for spec in plain.weights.values()
    }
    step = next(step for step in plan.steps if step.op == "quantize")
    bytes_, scales = (plan.buffers[output] for output in step.outputs)
    assert (bytes_.kind, bytes_.row_shape) == ("arena", (256,))
    assert bytes_.dtype == ("int8" if name == "int8" else "float8_e4m3fn")
    assert (scales.row_shape, scales.dtype) == ((2,) if name == "fp8-block" else (), "float32")
    weights = load_weights(plan, demo, device="cpu", dtype=torch.bfloat16)
    merged = torch.cat([demo.tensor(f"model.layers.3.self_attn.{part}_proj.weight") for part in "qkv"])
    expected = find_scheme(name).quantize(merged)["packed"]
    found = weights["model.layers.3.self_attn.qkv_proj.weight.packed"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), "not interleaved"


def test_a_plan_of_int4_with_rounded_activations_for_a_gpu(demo):
    """Bytes and their scales go to the product with repacked weights; norms and silu_mul leave them."""
    plan, layers = compile_model(demo.config, quantization="int4-fp8@cuda"), demo.config.num_layers
    found = Counter(step.op for step in plan.steps)
    assert found["quantized_linear"] == 4 * layers
    assert found["quantize"] == found["silu_mul_quant"] == layers, "quantize is o's, behind attention"
    assert found["rms_norm_quant"] + found["add_rms_norm_quant"] == 2 * layers
    step = next(step for step in plan.steps if step.op == "quantized_linear")
    bytes_, scales, packed, factors = step.inputs
    assert [plan.buffers[name].dtype for name in (bytes_, scales)] == ["float8_e4m3fn", "float32"]
    assert packed.endswith("qkv_proj.weight.packed") and factors.endswith("qkv_proj.weight.row_factors")
    weights = load_weights(plan, demo, device="cpu", dtype=torch.bfloat16)
    merged = torch.cat([demo.tensor(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"])
    expected = find_scheme("int4-fp8@cuda").quantize(merged)["packed"]
    assert torch.equal(weights["model.layers.0.self_attn.qkv_proj.weight.packed"], expected)


def count_ops(plan: Plan) -> dict[str, int]:
    """Of the steps that make bytes or take them; a layer's, where every layer has as many."""
    counts = Counter(step.op for step in plan.steps if "quant" in step.op or step.op.startswith("matmul"))
    return {op: count // plan.config.num_layers for op, count in counts.items()}


def test_linears_that_share_an_input_share_its_bytes(demo):
    disabled = ["merge_qkv", "merge_gate_up", "fuse_quantize"]
    plan = compile_model(demo.config, quantization="fp8@cuda", disabled_passes=disabled)
    assert count_ops(plan) == {"quantize": 4, "matmul": 7}


def test_bytes_are_made_where_the_values_are(demo):
    """But for what attention gives, and the head, whose rows are picked first."""

    def fused(*disabled: str) -> dict[str, int]:
        one = replace(demo.config, num_layers=1, sliding_window=())
        return count_ops(compile_model(one, quantization="fp8@cuda", disabled_passes=disabled))

    norms = {"rms_norm_quant": 1, "add_rms_norm_quant": 1}
    assert fused() == {**norms, "quantize": 1, "matmul_silu_mul_quant": 1, "matmul": 3}
    assert fused("gated_matmul") == {**norms, "quantize": 1, "silu_mul_quant": 1, "matmul": 4}
    assert fused("act_mul") == {**norms, "quantize": 2, "matmul": 4}
    assert fused("merge_qkv", "merge_gate_up") == {**norms, "quantize": 2, "matmul": 7}
    gate = {"matmul_silu_mul_quant": 1, "matmul": 3}
    assert fused("add_norm") == {"rms_norm_quant": 2, "quantize": 1, **gate}


def matmul_on_the_cpu(inputs, outputs, attributes):
    """What the GPU's kernel computes, for a plan that is run without one."""
    if attributes["scheme"] == "int8-zeros@cuda":
        x, x_scales, zeros, weight, scales, sums, *bias = inputs
    else:
        x, x_scales, weight, scales, *bias = inputs
        zeros = sums = torch.zeros(())
    block = find_scheme(attributes["scheme"]).block(x.shape[1])

    def call() -> None:
        whole = reference.dequantize_weight(weight, scales, "e4m3", block, None, None, torch.float32)
        by_element = x_scales[:, None] if x_scales.dim() == 1 else x_scales.repeat_interleave(128, 1)
        assert sums.dim() == 0 or torch.equal(sums, ops.row_sums(weight))
        product = ((x.float() - zeros.unsqueeze(-1)) * by_element) @ whole.t()
        outputs[0].copy_(product + bias[0] if bias else product)

    return call


@pytest.mark.parametrize(
    "disabled", [(), ("gated_matmul",), ("fuse_quantize",)], ids=["gated", "fused", "alone"]
)
@pytest.mark.parametrize("name", ["fp8", "fp8-block", "int8", "int8-zeros"])
def test_the_gpus_plan_gives_the_cpus_logits(demo, name, disabled, monkeypatch):
    monkeypatch.setitem(bind.BINDERS, "matmul", matmul_on_the_cpu)
    ids = list(range(40, 100))
    options = {"device": "cpu", "max_num_seqs": 1, "disabled_passes": disabled}
    logits = []
    for ending in ("", "@cuda"):
        with LLM("demo", quantization=name + ending, **options) as llm:
            logits.append(llm.logits(ids))
    # Sums in another order move some of the rounded activations by a step, and those after them more.
    assert (logits[1] - logits[0]).norm() <= 0.03 * logits[0].norm()
    assert (logits[1][0] - logits[0][0]).norm() <= 0.01 * logits[0][0].norm()


def test_a_gpus_plan_does_not_run_on_the_cpu():
    for name in ("fp8@cuda", "int4@cuda", "int4-fp8@cuda"):
        with (
            LLM("demo", device="cpu", max_num_seqs=1, quantization=name) as llm,
            pytest.raises(CompileError, match=f"the plan holds {name}, whose products are for GPUs"),
        ):
            llm.logits([1, 2, 3])


def test_schemes_by_compute_capability(demo, monkeypatch):
    for name in ("fp8", "fp8-block", "int8", "int8-zeros", "int4-g32", "int4-g64-fp8"):
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
            assert on_cuda(name, capability) == on_cuda(f"{name}@cuda", capability) == f"{name}@cuda"
        with pytest.raises(
            QuantizationError,
            match=r"quantised weights are for GPUs of compute capability 8\.0 and later; this one has 7\.5",
        ):
            on_cuda(name, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    options = EngineConfig(quantization="int4", head_quantization="fp8")
    with pytest.raises(QuantizationError, match=r"this one has 7\.0"):
        compile_for(demo.config, options, torch.device("cuda", 0), torch.bfloat16)


def test_zero_points_are_made_by_a_step_of_their_own(demo):
    """No norm leaves them; q, k, v and gate, up share what is made of one input."""
    one = replace(demo.config, num_layers=1, sliding_window=())
    plan = compile_model(one, quantization="int8-zeros@cuda")
    found = count_ops(plan)
    assert found["quantize_zeros"] == 4 and found["matmul"] == 4 and "quantize" not in found
    step = next(step for step in plan.steps if step.op == "quantize_zeros")
    assert [plan.buffers[name].dtype for name in step.outputs] == ["int8", "float32", "int32"]


def test_sizes_that_the_gpus_products_do_not_take(demo):
    with pytest.raises(QuantizationError, match="fp8@cuda takes rows of a multiple of 16, 16 bytes; this"):
        compile_model(replace(demo.config, intermediate_size=648), quantization="fp8@cuda")
    with pytest.raises(
        QuantizationError, match=r"int8@cuda takes a multiple of 8 rows.*this weight has 4001"
    ):
        compile_model(replace(demo.config, vocab_size=4001), head_quantization="int8@cuda")


@pytest.mark.parametrize(
    "name",
    [
        "int8-weight",
        "int4",
        "int4-zeros",
        "int4-fp8",
        "int4-channel-fp8",
        "nvfp4",
        "mxfp4",
        "fp8-weight",
        "fp8-block-weight",
    ],
)
def test_weights_in_the_layout_of_cuda_take_the_bytes_that_the_plan_says(demo, name):
    plan = compile_model(demo.config, quantization=f"{name}@cuda")
    weights = load_weights(plan, demo, device="cpu", dtype=torch.float32)
    for spec in plan.weights.values():
        assert tuple(weights[spec.name].shape) == spec.shape
        if spec.quantized:
            assert weights[spec.name].dtype == getattr(torch, spec.dtype)
