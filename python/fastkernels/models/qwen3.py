"""Qwen3: q and k are normalised over the head before they are rotated. Source: Yang et al. 2025."""

from typing import ClassVar

from torch import Tensor

from fastkernels.config import ModelConfig
from fastkernels.models.decoder import CausalLM, SelfAttention
from fastkernels.models.layers import RMSNorm, RotaryEmbedding


class Qwen3Attention(SelfAttention):
    """One norm weight of head_dim for all query heads, one for all key heads."""

    def __init__(self, config: ModelConfig, layer_index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__(config, layer_index, rotary_emb)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(hidden)
        return self.q_norm(q), self.k_norm(k)


class Qwen3ForCausalLM(CausalLM):
    """The shared decoder around ``Qwen3Attention``."""

    attention_class: ClassVar[type[SelfAttention]] = Qwen3Attention
