"""The decoder that Llama, Mistral and Qwen share: pre-norm, rotary attention, gated MLP.

Written to be traced by torch.fx: no control flow on data, reshapes only by .view(-1, ...), and every module
and parameter named as in a Hugging Face checkpoint. All tensors of one forward are flat over tokens:
[num_tokens, ...].
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastkernels.config import ModelConfig
from fastkernels.models.layers import Attention, RMSNorm, RotaryEmbedding


class SelfAttention(nn.Module):
    """Projections around the attention of one layer."""

    def __init__(self, config: ModelConfig, layer_index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.num_q_heads = config.num_q_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.rotary_emb = rotary_emb
        self.attention = Attention(
            layer_index,
            config.num_q_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_scale,
            config.sliding_window[layer_index],
        )

    def queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [num_tokens, hidden_size] -> q and k by heads, before the rotation."""
        q = self.q_proj(hidden).view(-1, self.num_q_heads, self.head_dim)
        k = self.k_proj(hidden).view(-1, self.num_kv_heads, self.head_dim)
        return q, k

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        q, k = self.queries_and_keys(hidden)
        v = self.v_proj(hidden).view(-1, self.num_kv_heads, self.head_dim)
        q, k = self.rotary_emb(positions, q, k)
        out = self.attention(q, k, v)
        return self.o_proj(out.view(-1, self.num_q_heads * self.head_dim))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, self_attn: SelfAttention) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Embedding, layers, final norm. All layers share one rotary table: ``model.rotary_emb`` in a trace."""

    def __init__(self, config: ModelConfig, attention_class: type[SelfAttention]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, attention_class(config, index, self.rotary_emb))
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embed_tokens(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        return self.norm(hidden)


class CausalLM(nn.Module):
    """A decoder and its vocabulary projection. A family overrides ``attention_class`` where it differs."""

    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.attention_class)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def aliases(self) -> dict[str, str]:
        """Parameters that are another one, which a checkpoint need not hold: name -> the other's name."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def tie_weights(self) -> None:
        """Makes each alias the parameter it stands for (again, after parameters were replaced)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def build_table(self, max_position: int, device: str | None = None) -> Tensor:
        """Makes the rotary table, which a forward needs: see ``RotaryEmbedding.build_table``."""
        return self.model.rotary_emb.build_table(max_position, device)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids and positions [num_tokens] int64, of one sequence -> logits [num_tokens, vocab_size]."""
        return self.lm_head(self.model(token_ids, positions))
