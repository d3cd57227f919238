"""The definitions against transformers in fp32, and what the compiler relies on in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from fastkernels.checkpoint import Checkpoint, load_weights
from fastkernels.config import ModelConfig, UnsupportedModelError, known_architectures
from fastkernels.models import ARCHITECTURES, CausalLM, build
from fastkernels.models.layers import LEAF_MODULES, Attention, RMSNorm, RotaryEmbedding
from fastkernels.models.presets import PRESETS, preset
from tests.checkpoints import CASES, MAX_POSITION, SIZES, make_checkpoint, make_model

TINY = ModelConfig.from_dict({**SIZES, "architectures": ["LlamaForCausalLM"]})


def _load(path: Path) -> CausalLM:
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_weights(model, checkpoint)
    model.build_table(MAX_POSITION)
    return model


def _reference(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, case)
    token_ids = torch.randint(0, SIZES["vocab_size"], (97,))
    expected = _reference(path)(token_ids[None]).logits[0]
    actual = _load(path)(token_ids, torch.arange(97))
    assert actual.shape == (97, SIZES["vocab_size"])
    assert (actual - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
def test_dynamic_scaling_equals_incremental_decoding_beyond_the_trained_context(tmp_path: Path) -> None:
    """transformers decodes token by token with a cache past 128; the definition sees all tokens at once."""
    path = make_checkpoint(tmp_path, "llama-dynamic")
    reference, model = _reference(path), _load(path)
    length = MAX_POSITION + 24
    token_ids = torch.randint(0, SIZES["vocab_size"], (length,))
    out = reference(token_ids[None, :100], use_cache=True)
    pieces = [out.logits[0]]
    for i in range(100, length):
        out = reference(token_ids[None, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits[0])
    expected = torch.cat(pieces)
    model.build_table(length)
    actual = model(token_ids, torch.arange(length))
    assert (actual - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
def test_half_precision_is_no_further_off_than_transformers() -> None:
    """bf16 weights, both against transformers in fp32 on the same weights: at most twice its error."""
    exact = make_model("qwen3", dtype=torch.bfloat16).float()
    reference = make_model("qwen3", dtype=torch.bfloat16)
    model = build(ModelConfig.from_dict(exact.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}))
    model.load_state_dict(exact.state_dict())
    model.build_table(MAX_POSITION)
    model.to(torch.bfloat16)
    assert model.model.rotary_emb.cos_sin is not None
    assert model.model.rotary_emb.cos_sin.dtype == torch.float32, "the table keeps its precision"
    token_ids = torch.randint(0, SIZES["vocab_size"], (64,))
    expected = exact(token_ids[None]).logits[0]
    error = (model(token_ids, torch.arange(64)).float() - expected).abs().max()
    reference_error = (reference(token_ids[None]).logits[0].float() - expected).abs().max()
    assert 0 < error <= 2 * reference_error


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_MODULES)


@pytest.mark.parametrize("case", ["llama-tied", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_traces_to_leaves_and_views(case: str, tmp_path: Path) -> None:
    model = _load(make_checkpoint(tmp_path, case))
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules())
    called = {type(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module"}
    assert called == set(LEAF_MODULES)
    methods = {node.target for node in graph.nodes if node.op == "call_method"}
    assert methods == {"view"}
    for node in graph.nodes:
        if node.op == "call_method":
            assert node.args[1] == -1 and len(node.args) in (3, 4)
    functions = {getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"}
    assert functions == {"add", "mul", "silu", "getitem"}
    rotary = {
        node.target
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], RotaryEmbedding)
    }
    assert rotary == {"model.rotary_emb"}
    token_ids, positions = torch.randint(0, 1003, (9,)), torch.arange(9)
    traced = fx.GraphModule(model, graph)
    assert torch.equal(traced(token_ids, positions), model(token_ids, positions))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_the_meta_device(name: str) -> None:
    num_parameters = {  # as released
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "qwen3-8b": 8_190_735_360,
    }
    with torch.device("meta"):
        model = build(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters[name]
    assert model.model.rotary_emb.cos_sin is None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    table = model.build_table(16)
    assert table.device.type == "cpu" and table.shape == (16, preset(name).rotary_dim)


def test_tied_embeddings_are_one_parameter() -> None:
    model = build(replace(TINY, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert build(TINY).aliases == {}


@pytest.mark.parametrize("case", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_parameters_are_named_as_in_the_checkpoint(case: str) -> None:
    reference = make_model(case)
    architectures = [CASES[case].architecture]
    config = ModelConfig.from_dict({**reference.config.to_dict(), "architectures": architectures})
    expected = {name: p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in build(config).named_parameters()} == expected


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="'GPT2LMHeadModel'; fastkernels knows Llama"):
        build(replace(TINY, architecture="GPT2LMHeadModel"))
    with pytest.raises(ValueError, match="no preset is called 'gpt-2'; there are llama-"):
        preset("gpt-2")


def test_config_and_models_know_the_same_architectures() -> None:
    assert set(known_architectures()) == set(ARCHITECTURES)


def test_rotary_table_must_be_made_and_long_enough() -> None:
    rotary = RotaryEmbedding(TINY)
    q, k = torch.randn(1, 4, 80), torch.randn(1, 1, 80)
    with pytest.raises(RuntimeError, match=r"call build_table\(max_position\) first"):
        rotary(torch.tensor([0]), q, k)
    rotary.build_table(8)
    with pytest.raises(IndexError):
        rotary(torch.tensor([8]), q, k)


def test_rotary_table_follows_the_module_but_not_its_dtype() -> None:
    rotary = RotaryEmbedding(TINY)
    table = rotary.build_table(8).clone()
    rotary.half()
    assert rotary.cos_sin is not None and torch.equal(rotary.cos_sin, table)
    assert rotary.state_dict() == {}
    rotary.to("meta")
    assert rotary.cos_sin is None


def _attention_by_loops(module: Attention, q: Any, k: Any, v: Any) -> torch.Tensor:
    out = torch.zeros_like(q, dtype=torch.float64)
    group = module.num_q_heads // module.num_kv_heads
    for t in range(q.shape[0]):
        first = 0 if module.sliding_window is None else max(0, t - module.sliding_window + 1)
        for h in range(module.num_q_heads):
            scores = k[first : t + 1, h // group].double() @ q[t, h].double() * module.scale
            if module.soft_cap is not None:
                scores = module.soft_cap * torch.tanh(scores / module.soft_cap)
            out[t, h] = scores.softmax(0) @ v[first : t + 1, h // group].double()
    return out


@pytest.mark.parametrize("sliding_window", [None, 1, 4])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_against_loops(sliding_window: int | None, soft_cap: float | None) -> None:
    module = Attention(0, 6, 2, 16, 0.3, sliding_window, soft_cap)
    q, k, v = torch.randn(11, 6, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    actual = module(q, k, v)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), _attention_by_loops(module, q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: RMSNorm(48, 1e-5), lambda: RMSNorm(48, 0.5)])
def test_rms_norm_formula(make: Callable[[], RMSNorm]) -> None:
    norm = make()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48))
    x = torch.randn(5, 3, 48)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
