"""Steps and buffers of a graph, and the graphs that cannot be lowered."""

from dataclasses import replace

import pytest

from fastkernels.compiler import compile_model
from fastkernels.compiler.graph import CompileError, Node, Value
from fastkernels.compiler.lower import lower
from fastkernels.compiler.trace import trace
from tests.compiler.configs import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_is_a_buffer(name):
    plan = compile_model(CONFIGS[name])
    for step in plan.steps:
        for buffer in (*step.inputs, *step.outputs):
            assert buffer in plan.buffers
    for buffer in plan.buffers.values():
        if buffer.kind == "alias":
            root = plan.buffers[buffer.base]
            assert root.kind == "arena"
            assert buffer.offset >= 0 and buffer.offset + buffer.row_size <= root.row_size


def test_a_step_begins_with_token_ids_and_the_work_map():
    steps = compile_model(CONFIGS["llama"]).steps
    begin = ["resolve_token_ids", "embedding", "rms_norm", "attention_plan", "linear"]
    assert [step.op for step in steps[:5]] == begin
    assert steps[3].attributes == {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 80, "window": 0}


def test_a_buffer_is_written_before_it_is_read():
    plan = compile_model(CONFIGS["qwen3"])
    written = set()
    for step in plan.steps:
        for name in step.inputs:
            root = plan.root(name)
            assert root.kind != "arena" or root.name in written, f"{step.op} reads {root.name}"
        written |= {plan.root(name).name for name in step.outputs}


def test_the_plan_prints_a_line_a_step():
    plan = compile_model(CONFIGS["llama"])
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.steps)
    assert "layers.0.self_attn.qkv_proj[0:320]" in lines[5] and "interleaved=False" in lines[5]


def test_unknown_op_is_named():
    graph = trace(CONFIGS["llama"])
    odd = Node("convolve", (graph.nodes[0].output,), (Value("odd", (160,)),))
    with pytest.raises(CompileError, match=r"the node odd is a 'convolve', which no step does; there are"):
        lower(replace(graph, nodes=(graph.nodes[0], odd, *graph.nodes[1:])))


def test_a_residual_still_needed_is_refused():
    graph = trace(CONFIGS["llama"])
    embed = graph.nodes[0].output
    x, normed, total, late = (Value(name, (160,)) for name in ("x", "normed", "total", "late"))
    weight = ("model.norm.weight",)
    nodes = (
        graph.nodes[0],
        Node("rms_norm", (embed,), (x,), weight, {"eps": 1e-6}),
        Node("add_rms_norm", (x, embed), (normed, total), weight, {"eps": 1e-6}),
        Node("add", (embed, normed), (late,)),
        Node("gather_rows", (late,), (graph.output,)),
    )
    with pytest.raises(CompileError, match="add_rms_norm normed updates in place embed_tokens, which"):
        lower(replace(graph, nodes=nodes))


def test_a_view_past_the_row_is_refused():
    graph = trace(CONFIGS["llama"])
    embed = graph.nodes[0].output
    slice_ = Node("slice", (embed,), (Value("end", (100,)),), attributes={"begin": 100})
    with pytest.raises(CompileError, match=r"slice end wants elements 100 to 200 of the 160 in a row"):
        lower(replace(graph, nodes=(graph.nodes[0], slice_)))


def test_a_graph_without_a_head_is_refused():
    graph = trace(CONFIGS["llama"])
    with pytest.raises(CompileError, match="no gather_rows"):
        lower(replace(graph, nodes=graph.nodes[:-1]))
