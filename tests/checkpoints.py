"""Small random checkpoints of every family and rope scaling, saved by transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

MAX_POSITION = 128  # of every case: the rope scalings start from 32, so that they are felt within it


@dataclass(frozen=True)
class Case:
    """One checkpoint: the class transformers builds it with, and what its configuration has besides SIZES."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)


# Odd on purpose: head 80, one key-value head, 3 layers, a vocabulary that is no multiple of anything.
SIZES: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 160,
    "intermediate_size": 232,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(rope_type: str, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **rest}}


CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM"),
    "llama-tied": Case("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biased": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Case("LlamaForCausalLM", _rope("linear", factor=3.0)),
    "llama-dynamic": Case("LlamaForCausalLM", _rope("dynamic", factor=2.0)),
    "llama-llama3": Case(
        "LlamaForCausalLM",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": Case("LlamaForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-yarn-mscale": Case(
        "LlamaForCausalLM",
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=1.3,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "llama-head64": Case(
        "LlamaForCausalLM", {"head_dim": 64, "num_attention_heads": 5, "num_key_value_heads": 5}
    ),
    "mistral": Case("MistralForCausalLM", {"sliding_window": 7, "num_key_value_heads": 2}),
    "mistral-no-window": Case("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": Case("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen2-tied": Case("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": Case(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3-tied": Case("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3-window": Case(
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-yarn": Case("Qwen3ForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
}


def make_model(case: str | Case, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The case as transformers builds it, on the CPU, in evaluation mode, with weights that make its logits
    vary.

    Weights have standard deviation 1 / sqrt(fan in), norms lie around 1 and biases around 0, so that no part
    can be left out unseen.
    """
    import transformers

    case = CASES[case] if isinstance(case, str) else case
    model_class = getattr(transformers, case.architecture)
    config = model_class.config_class(**{**SIZES, **case.options})
    config._attn_implementation = "eager"
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(module, nn.Embedding):
                    parameter.copy_(noise * 0.5)
                elif isinstance(module, nn.Linear) and name == "weight":
                    if not (module is model.lm_head and config.tie_word_embeddings):
                        parameter.copy_(noise * parameter.shape[1] ** -0.5)
                elif name == "bias":
                    parameter.copy_(noise * 0.3)
                else:
                    parameter.copy_(1 + noise * 0.2)
    return model.to(dtype).eval()


def make_checkpoint(
    folder: Path,
    case: str | Case,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Saves the case's model under ``folder`` as transformers does; returns the checkpoint's own folder."""
    path = folder / (case if isinstance(case, str) else case.architecture)
    make_model(case, seed=seed, dtype=dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path
