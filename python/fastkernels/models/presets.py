"""Named configurations with the shapes of released models, for benchmarks that need no checkpoint on disk."""

from __future__ import annotations

from fastkernels.config import ConfigError, ModelConfig, RopeScaling

PRESETS: dict[str, ModelConfig] = {
    "llama-3.1-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    "llama-3.2-1b": ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    "qwen3-8b": ModelConfig(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        bos_token_id=151643,
        eos_token_ids=(151645,),
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration called ``name``. Raises ConfigError listing the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
