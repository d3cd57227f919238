"""The leaves a model definition is written in, which the compiler recognises and replaces by ops.

Their own bodies are plain PyTorch for one sequence, so that a definition runs as it stands and is the
reference the compiled engine is held to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkernels.config import ModelConfig
from fastkernels.models.rope_scaling import build_cos_sin


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]"""
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """Rotates the leading rotary_dim dimensions of each head by the angles of the token's position.

    cos_sin: fp32 [max_position, rotary_dim], cos then sin; None until ``build_table``. It follows the module
    to another device, stays fp32 whatever dtype the module is cast to, and is no part of the state dict.
    """

    cos_sin: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary_dim = config.rotary_dim
        self.interleaved = config.rope_interleaved
        self.cos_sin = None

    def build_table(self, max_position: int, device: torch.device | str | None = None) -> Tensor:
        """Makes and returns the table for positions 0 .. max_position - 1."""
        self.cos_sin = build_cos_sin(self.config, max_position).to(device or "cpu")
        return self.cos_sin

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [num_tokens, num_q_heads, head_dim], k [num_tokens, num_kv_heads, head_dim] at
        positions [num_tokens] -> q and k rotated, same shapes and dtypes.

        Raises RuntimeError before ``build_table``, IndexError for a position past the table.
        """
        if self.cos_sin is None:
            raise RuntimeError("the rotary table is not made yet: call build_table(max_position) first")
        cos, sin = self.cos_sin[positions][:, None, :].chunk(2, dim=-1)  # [num_tokens, 1, rotary_dim / 2]
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, kept = x[..., : self.rotary_dim].float(), x[..., self.rotary_dim :]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        halves = [first * cos - second * sin, second * cos + first * sin]
        turned = torch.stack(halves, dim=-1).flatten(-2) if self.interleaved else torch.cat(halves, dim=-1)
        return torch.cat([turned.to(x.dtype), kept], dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Called by .to(), .cuda() and the like: takes the device from fn, but not its dtype."""
        super()._apply(fn, recurse)
        if self.cos_sin is not None:
            device = fn(torch.empty(0, device=self.cos_sin.device)).device
            self.cos_sin = None if device.type == "meta" else self.cos_sin.to(device)
        return self

    def extra_repr(self) -> str:
        kind, theta = self.config.rope_scaling.kind, self.config.rope_theta
        return f"{kind}, rotary_dim={self.rotary_dim}, theta={theta}"


class Attention(nn.Module):
    """Causal attention of one sequence; the compiler gives it a paged KV cache and many sequences.

    Query head h reads key-value head h // (num_q_heads / num_kv_heads). With a sliding window, token t sees
    the keys (t - sliding_window, t]; with a soft cap, scores become soft_cap * tanh(scores / soft_cap) before
    the softmax.
    """

    def __init__(
        self,
        layer_index: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [num_tokens, num_q_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim]
        -> [num_tokens, num_q_heads, head_dim] in q's dtype. Tokens are in order, from the sequence's first.
        Computed in fp32; holds the whole [num_q_heads, num_tokens, num_tokens] score matrix.
        """
        group = self.num_q_heads // self.num_kv_heads
        keys = k.float().repeat_interleave(group, dim=1)
        values = v.float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        token = torch.arange(q.shape[0], device=q.device)
        distance = token[:, None] - token[None, :]
        hidden = distance < 0
        if self.sliding_window is not None:
            hidden = hidden | (distance >= self.sliding_window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).contiguous()

    def extra_repr(self) -> str:
        return (
            f"layer {self.layer_index}, {self.num_q_heads} over {self.num_kv_heads} heads of "
            f"{self.head_dim}, "
            f"sliding_window={self.sliding_window}, soft_cap={self.soft_cap}"
        )


LEAF_MODULES: tuple[type[nn.Module], ...] = (RMSNorm, RotaryEmbedding, Attention, nn.Linear, nn.Embedding)
"""What torch.fx must not trace into."""
