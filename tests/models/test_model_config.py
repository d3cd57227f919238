"""config.json of transformers 4 and 5, what it leaves to its family, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastkernels.config import ConfigError, ModelConfig, RopeScaling, UnsupportedModelError
from tests.checkpoints import CASES, SIZES, make_model

LLAMA: dict[str, Any] = {**SIZES, "architectures": ["LlamaForCausalLM"]}


def _config(**changes: Any) -> ModelConfig:
    merged = {**LLAMA, **changes}
    return ModelConfig.from_dict({key: value for key, value in merged.items() if value is not ...})


def test_both_layouts_of_rope_say_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    old = _config(rope_theta=500000.0, rope_scaling=scaling)
    new = _config(rope_parameters={"rope_theta": 500000.0, **scaling})
    assert old == new
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)
    oldest = _config(rope_scaling={"type": "linear", "factor": 2})
    assert oldest.rope_scaling == RopeScaling("linear", 2.0, 128)
    assert _config(rope_theta=1e6, rope_scaling=None).rope_theta == 1e6
    assert _config(rope_scaling=None).rope_scaling == RopeScaling()


def test_dtype_of_either_name() -> None:
    assert _config(torch_dtype="bfloat16").dtype == "bfloat16"
    assert _config(dtype="float16").torch_dtype == torch.float16
    assert _config().dtype == "float32"


def test_yarn_resolves_its_attention_factor() -> None:
    def factor(**rope: Any) -> float:
        config = _config(rope_scaling={"rope_type": "yarn", "factor": 4.0, **rope})
        return config.rope_scaling.attention_factor

    assert factor() == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(attention_factor=1.5) == 1.5
    ratio = (0.1 * 1.3 * math.log(4) + 1) / (0.1 * 0.7 * math.log(4) + 1)
    assert factor(mscale=1.3, mscale_all_dim=0.7) == pytest.approx(ratio)
    scaling = _config(
        rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    ).rope_scaling
    assert scaling.factor == 4.0


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"sliding_window": 5}, (None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 5}, (5, 5, 5)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 5, "max_window_layers": 0}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 5),
        ),
        ("Qwen3ForCausalLM", {"sliding_window": 5, "use_sliding_window": True}, (None, None, None)),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (5, None, 5),
        ),
    ],
)
def test_sliding_window_by_layer(
    architecture: str, changes: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    assert _config(architectures=[architecture], **changes).sliding_window == expected


@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_writes(case: str) -> None:
    reference = make_model(case)
    config = ModelConfig.from_dict(
        {**reference.config.to_dict(), "architectures": [CASES[case].architecture]}
    )
    attention = reference.model.layers[0].self_attn
    assert config.model_type == reference.config.model_type
    assert config.attention_bias == (attention.q_proj.bias is not None)
    assert config.o_bias == (attention.o_proj.bias is not None)
    assert config.mlp_bias == (reference.model.layers[0].mlp.up_proj.bias is not None)
    assert config.tie_word_embeddings == reference.config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.attention_scale == attention.scaling
    assert config.rope_scaling.kind == reference.config.rope_parameters["rope_type"]


def test_silent_keys() -> None:
    config = _config(num_key_value_heads=..., head_dim=..., eos_token_id=[2, 7], bos_token_id=None)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim) == (4, 40, 40)
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2, 7))
    assert _config(architectures=["Qwen3ForCausalLM"], head_dim=...).head_dim == 128
    assert _config(architectures=..., model_type="mistral").architecture == "MistralForCausalLM"
    assert _config(partial_rotary_factor=0.5).rotary_dim == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; fastkernels knows LlamaForCausalLM"),
        ({"architectures": [], "model_type": "bert"}, "the architecture 'bert'"),
        ({"architectures": ...}, "the architecture 'none named'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'; fastkernels takes 'silu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'; fastkernels knows default, linear"),
        ({"rope_parameters": {"full_attention": {}}}, "each layer type its own rope"),
        ({"torch_dtype": "float64"}, "dtype 'float64'; fastkernels takes float32, float16, bfloat16"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["linear"] * 3,
            },
            "a layer of type 'linear'",
        ),
    ],
)
def test_models_that_are_not_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "config.json has no hidden_size"),
        ({"vocab_size": "many"}, "vocab_size = 'many'; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key-value heads"),
        ({"head_dim": 81}, "rotates 81 of 81 head dimensions"),
        ({"rms_norm_eps": math.nan}, "nan for rms_norm_eps"),
        ({"rope_theta": -1}, "-1 for rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "None for the factor of rope scaling 'linear'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "None for llama3's low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor 4.0, which must be above low_freq_factor 4.0",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'; it must be a token id"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "lists the attention of 1 layers; the model has 3",
        ),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**changes)
