"""The graph a definition is traced to, and what the compiler says of a definition it cannot take."""

from importlib import import_module

import pytest
import torch
from torch import nn

from fastkernels.compiler.graph import CompileError
from fastkernels.compiler.trace import trace
from fastkernels.models import LlamaForCausalLM
from tests.compiler.configs import CONFIGS


def test_every_node_of_a_layer_in_order():
    graph = trace(CONFIGS["qwen3"])
    layer = [node.op for node in graph.nodes if any("layers.1." in value.name for value in node.outputs)]
    assert layer == [
        *("rms_norm", "linear", "view", "linear", "view", "rms_norm", "rms_norm", "linear", "view", "rope"),
        *("paged_attention", "view", "linear", "add"),
        *("rms_norm", "linear", "silu", "linear", "mul", "linear", "add"),
    ]
    assert [node.op for node in graph.nodes].count("append_kv") == 3


def test_row_shapes_and_names():
    graph = trace(CONFIGS["llama"])
    shapes = {value.name: value.row_shape for node in graph.nodes for value in node.outputs}
    assert shapes["layers.2.self_attn.q_proj"] == (320,)
    assert shapes["layers.2.self_attn.rope.0"] == (4, 80)
    assert shapes["layers.2.self_attn.rope.1"] == (2, 80)
    assert shapes["logits"] == (1003,)
    assert len(shapes) == sum(len(node.outputs) for node in graph.nodes), "names are unique"


def test_a_window_is_an_attribute_of_its_layer():
    config = CONFIGS["mistral"]
    windows = [node.attributes["window"] for node in trace(config).nodes if node.op == "paged_attention"]
    assert windows == [7, 7, 7]


def test_tied_embedding_is_one_weight():
    graph = trace(CONFIGS["llama-tied"])
    assert "lm_head.weight" not in graph.weights
    head = graph.nodes[-2]
    assert head.output.name == "lm_head"
    assert head.weights == ("model.embed_tokens.weight",)


def _trace_of(monkeypatch: pytest.MonkeyPatch, model_class: type[LlamaForCausalLM]) -> None:
    trace_file = import_module("fastkernels.compiler.trace")  # the package's attribute is the function
    monkeypatch.setattr(trace_file, "build", lambda config: model_class(config))
    trace(CONFIGS["llama"])


class _WithExp(LlamaForCausalLM):
    def forward(self, token_ids, positions):
        return torch.exp(super().forward(token_ids, positions))


class _WithSum(LlamaForCausalLM):
    def forward(self, token_ids, positions):
        return super().forward(token_ids, positions).sum(0)


class _Pair(LlamaForCausalLM):
    def forward(self, token_ids, positions):
        logits = super().forward(token_ids, positions)
        return logits, logits


class _WithNewLeaf(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Conv1d(3, 3, 1)

    def forward(self, token_ids, positions):
        return super().forward(token_ids, positions) + self.extra.bias.sum()


def test_unknown_function_is_named(monkeypatch):
    with pytest.raises(CompileError, match=r"no step for .*exp.*may use RMSNorm, .*silu and view"):
        _trace_of(monkeypatch, _WithExp)


def test_a_value_without_rows_is_named(monkeypatch):
    with pytest.raises(CompileError, match=r"sum.*does not give a row a token"):
        _trace_of(monkeypatch, _WithSum)


def test_two_results_are_refused(monkeypatch):
    with pytest.raises(CompileError, match="must return one tensor"):
        _trace_of(monkeypatch, _Pair)


def test_a_parameter_outside_a_leaf_is_refused(monkeypatch):
    with pytest.raises(CompileError, match="extra"):
        _trace_of(monkeypatch, _WithNewLeaf)
