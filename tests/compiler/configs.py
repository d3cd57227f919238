"""Small configurations of every family, made without a checkpoint."""

from dataclasses import replace

from fastkernels.config import ModelConfig

_BASE = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=1003,
    hidden_size=160,
    intermediate_size=232,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=80,
    max_position_embeddings=128,
)

CONFIGS: dict[str, ModelConfig] = {
    "llama": _BASE,
    "llama-tied": replace(_BASE, tie_word_embeddings=True),
    "llama-biased": replace(_BASE, attention_bias=True, o_bias=True, mlp_bias=True),
    "mistral": replace(
        _BASE, architecture="MistralForCausalLM", model_type="mistral", sliding_window=(7, 7, 7)
    ),
    "qwen2": replace(_BASE, architecture="Qwen2ForCausalLM", model_type="qwen2", attention_bias=True),
    "qwen3": replace(_BASE, architecture="Qwen3ForCausalLM", model_type="qwen3"),
}
