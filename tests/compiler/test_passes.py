"""What each pass makes of a graph, and what it leaves alone."""

from collections import Counter
from dataclasses import replace

import pytest

from fastkernels.compiler import PASSES, UnknownPassError, arena_layout, compile_model
from fastkernels.compiler.graph import Node, QuantizedPart, Value
from fastkernels.compiler.passes.add_norm import add_norm
from fastkernels.compiler.passes.gated_linear import gated_linear
from fastkernels.compiler.passes.gated_matmul import gated_matmul
from fastkernels.compiler.passes.merge_qkv import merge_qkv
from fastkernels.compiler.trace import trace
from fastkernels.models.presets import PRESETS
from tests.compiler.configs import CONFIGS

NUM_LAYERS = 3
# resolve_token_ids, attention_plan, embedding, lm_head, gather_rows, final norm
OUTSIDE = 6
BIASED_GATES = ("llama-biased",)


def _ops(name: str, **options) -> Counter:
    return Counter(step.op for step in compile_model(CONFIGS[name], **options).steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_before_and_after(name):
    """A layer is 16 kernels as traced (18 with head norms) and 8 fused (10); 9 with biases of gate and up."""
    head_norms = 2 if name == "qwen3" else 0
    report = compile_model(CONFIGS[name]).report
    assert report.kernels_before == OUTSIDE + NUM_LAYERS * (16 + head_norms)
    assert report.kernels_after == OUTSIDE + NUM_LAYERS * (8 + head_norms + (name in BIASED_GATES))
    assert list(report.after_pass) == list(PASSES)
    assert report.after_pass["merge_qkv"] == report.kernels_before - 2 * NUM_LAYERS


@pytest.mark.parametrize("name", CONFIGS)
def test_without_passes_every_op_is_its_own(name):
    ops = _ops(name, disabled_passes=list(PASSES))
    assert set(ops) == {
        *("resolve_token_ids", "attention_plan", "embedding", "rms_norm", "linear", "rope", "append_kv"),
        *("paged_attention", "add", "silu", "mul", "gather_rows"),
    }
    assert ops["linear"] == NUM_LAYERS * 7 + 1
    assert ops["add"] == NUM_LAYERS * 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("disabled", PASSES)
def test_one_pass_off(name, disabled):
    plan = compile_model(CONFIGS[name], disabled_passes=[disabled])
    assert plan.report.disabled_passes == (disabled,)
    assert disabled not in plan.report.after_pass
    fused = {
        "rope_append": "rope_append_kv",
        "act_mul": "silu_mul",
        "add_norm": "add_rms_norm",
        "gated_linear": "linear_silu_mul",
        "gated_matmul": "matmul_silu_mul_quant",
    }
    found = {step.op for step in plan.steps}
    if disabled in fused:
        assert fused[disabled] not in found
    if disabled in ("merge_gate_up", "act_mul"):  # two tensors are not the halves of one
        assert not {"silu_mul", "linear_silu_mul"} & found
    else:
        assert ("silu_mul" in found) == (disabled == "gated_linear" or name in BIASED_GATES)


def test_merged_projection_and_its_views():
    plan = compile_model(CONFIGS["qwen2"])
    spec = plan.weights["model.layers.1.self_attn.qkv_proj.weight"]
    assert spec.how == "concat_rows"
    assert spec.sources == tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    assert spec.shape == (320 + 160 + 160, 160)
    assert spec.source_rows == (320, 160, 160)
    assert plan.weights["model.layers.1.self_attn.qkv_proj.bias"].shape == (640,)
    k = plan.buffers["layers.1.self_attn.view_2"]
    assert (k.kind, k.base, k.offset, k.row_shape) == ("alias", "layers.1.self_attn.qkv_proj", 320, (2, 80))


def test_head_norms_and_rotation_stay_in_the_merged_projection():
    plan = compile_model(CONFIGS["qwen3"])
    views = ("layers.0.self_attn.view", "layers.0.self_attn.view_2")
    norms = [step for step in plan.steps if step.op == "rms_norm" and step.inputs[0] in views]
    assert len(norms) == 2
    assert all(step.inputs[0] == step.outputs[0] for step in norms)
    rotation = next(step for step in plan.steps if step.op == "rope_append_kv")
    assert rotation.outputs == (rotation.inputs[0],)


def test_residual_is_updated_in_place():
    plan = compile_model(CONFIGS["llama"])
    adds = [step for step in plan.steps if step.op == "add_rms_norm"]
    assert {step.inputs[1] for step in adds} == {"embed_tokens"}
    assert {step.outputs[1] for step in adds} == {"embed_tokens"}


def test_projections_of_unlike_biases_stay_apart():
    graph = trace(CONFIGS["qwen2"])
    nodes = tuple(
        replace(node, weights=node.weights[:1]) if node.outputs and "k_proj" in node.outputs[0].name else node
        for node in graph.nodes
    )
    assert merge_qkv(replace(graph, nodes=nodes)).nodes == nodes


def test_a_residual_that_is_read_later_is_not_overwritten():
    x, h, total, normed, late, out = (
        Value(name, (8,)) for name in ("x", "h", "total", "normed", "late", "out")
    )
    nodes = (
        Node("add", (h, x), (total,)),
        Node("rms_norm", (total,), (normed,), ("model.norm.weight",), {"eps": 1e-6}),
        Node("add", (h, x), (late,)),
        Node("mul", (late, normed), (out,)),
    )
    graph = replace(trace(CONFIGS["llama"]), nodes=nodes, output=out)
    assert add_norm(graph).nodes == nodes


def test_select_rows_projects_only_what_is_asked_for():
    def head(**options):
        plan = compile_model(CONFIGS["llama"], **options)
        return [step.op for step in plan.steps[plan.head_start :]]

    assert head() == ["gather_rows", "linear"]
    assert head(disabled_passes=["select_rows"]) == ["gather_rows"]


def test_passes_do_not_change_their_graph():
    graph = trace(CONFIGS["qwen3"])
    nodes, weights = graph.nodes, dict(graph.weights)
    for run in PASSES.values():
        run(graph)
    assert graph.nodes == nodes and graph.weights == weights


def test_unknown_pass_is_named():
    with pytest.raises(UnknownPassError, match=r"no pass is called 'fuse_all'; there are merge_qkv, "):
        compile_model(CONFIGS["llama"], disabled_passes=["fuse_all"])


def test_a_gate_with_a_bias_or_another_reader_keeps_its_kernel():
    x, gate_up, act, other = (
        Value(name, (size,)) for name, size in (("x", 8), ("gate_up", 8), ("act", 4), ("other", 8))
    )
    linear = Node("linear", (x,), (gate_up,), ("model.norm.weight",))
    silu_mul = Node("silu_mul", (gate_up,), (act,))
    graph = replace(trace(CONFIGS["llama"]), nodes=(linear, silu_mul), output=act)
    (fused,) = gated_linear(graph).nodes
    assert fused == Node("linear_silu_mul", (x,), (act, gate_up), ("model.norm.weight",))
    with_bias = replace(linear, weights=("model.norm.weight",) * 2)
    read_again = Node("mul", (gate_up, x), (other,))
    for nodes in ((with_bias, silu_mul), (linear, silu_mul, read_again)):
        assert gated_linear(replace(graph, nodes=nodes)).nodes == nodes


def test_a_gate_of_bytes_goes_along_with_its_product():
    scheme = "fp8@cuda"
    config = replace(PRESETS["llama-3.2-1b"], num_layers=2, sliding_window=())
    plan = compile_model(config, quantization=scheme)
    before = compile_model(config, quantization=scheme, disabled_passes=["gated_matmul"])
    fused = [step for step in plan.steps if step.op == "matmul_silu_mul_quant"]
    assert len(fused) == 2 and len(plan.steps) == len(before.steps) - 2
    acts = [index for index, step in enumerate(before.steps) if step.op == "silu_mul_quant"]
    for step, index in zip(fused, acts, strict=True):
        matmul, act = before.steps[index - 1 : index + 1]
        assert step.inputs == matmul.inputs and step.outputs == (*act.outputs, *matmul.outputs)
        assert step.attributes == {**matmul.attributes, **act.attributes}
        room = plan.buffers[step.outputs[-1]]
        assert (room.kind, room.row_shape) == ("arena", (2 * config.intermediate_size,))
    assert plan.weights == before.weights
    layout = arena_layout(plan, max_num_tokens=64, max_num_seqs=4, element_bytes=2)
    places = sorted(layout.offsets[name] for name in (*fused[0].inputs[:2], *fused[0].outputs))
    assert len(set(places)) == 5, "the gated product reads its input while it writes all of its outputs"


@pytest.mark.parametrize(
    "scheme",
    ["fp8-block@cuda", "int8@cuda", "int8-zeros@cuda", "int4@cuda", "int4-fp8@cuda", "fp8", "int8", None],
)
def test_other_schemes_have_no_gated_matmul(scheme):
    """Nor do plans for the CPU."""
    plan = compile_model(PRESETS["llama-3.2-1b"], quantization=scheme)
    assert not any(step.op == "matmul_silu_mul_quant" for step in plan.steps)
    before = compile_model(PRESETS["llama-3.2-1b"], quantization=scheme, disabled_passes=["gated_matmul"])
    assert plan.steps == before.steps


def test_a_gate_of_bytes_with_a_bias_or_another_reader_keeps_its_kernel():
    biased = replace(PRESETS["llama-3.2-1b"], mlp_bias=True)
    plan = compile_model(biased, quantization="fp8@cuda")
    assert not any(step.op == "matmul_silu_mul_quant" for step in plan.steps)
    assert any(step.op == "silu_mul_quant" for step in plan.steps)
    graph = trace(CONFIGS["llama"])
    weight = replace(graph.weights["model.norm.weight"], name="w")
    weight = replace(weight, quantized=QuantizedPart(weight, "fp8@cuda", "packed"))
    x, gate_up, act, other = (
        Value(name, (size,)) for name, size in (("x", 8), ("gate_up", 8), ("act", 4), ("other", 8))
    )
    scales = Value("act_scales", (), dtype="float32")
    matmul = Node("matmul", (x,), (gate_up,), ("w",), {"scheme": "fp8@cuda"})
    silu_mul_quant = Node("silu_mul_quant", (gate_up,), (act, scales), attributes={"per": "token"})
    read_again = Node("mul", (gate_up, x), (other,))
    graph = replace(graph, nodes=(matmul, silu_mul_quant), output=act, weights={"w": weight})
    (fused,) = gated_matmul(graph).nodes
    attributes = {"scheme": "fp8@cuda", "per": "token"}
    assert fused == Node("matmul_silu_mul_quant", (x,), (act, scales, gate_up), ("w",), attributes)
    nodes = (matmul, silu_mul_quant, read_again)
    assert gated_matmul(replace(graph, nodes=nodes)).nodes == nodes
