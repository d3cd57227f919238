"""attn_implementation="fastkernels" for the models of transformers; importing this module registers it.

Taken: causal prefill, decoding with a dynamic cache, left or right padding (padded tokens are taken out
before the kernel, their output is zero), sliding windows, soft caps, attention that is not causal. Anything
else raises NotImplementedError with the sentence that says what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from fastkernels import ops

NAME = "fastkernels"


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise NotImplementedError(f'attn_implementation="{NAME}" does not take {what}; use "sdpa" for it')


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that the attention below gets: bool [batch_size, kv_length], None where nothing is padded."""
    _refuse(use_vmap or (not allow_is_causal_skip and q_length > 1), "custom masks or packed sequences")
    in_place = isinstance(q_offset, int) and kv_offset + kv_length == q_offset + q_length
    _refuse(not in_place, "static caches or keys of another sequence")
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].bool()
    return None if bool(attention_mask.all()) else attention_mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, num_q_heads, q_length, head_dim]; key, value [batch, num_kv_heads, kv_length, head_dim].

    attention_mask: bool [batch, kv_length] of ``padding_mask``, or None
    Returns [batch, q_length, num_q_heads, head_dim] and no attention weights.
    """
    _refuse(dropout > 0.0, "dropout")
    _refuse(torch.is_grad_enabled() and query.requires_grad, "training: call the model under torch.no_grad()")
    _refuse(bool(kwargs.get("output_attentions")), "output_attentions")
    _refuse(kwargs.get("s_aux") is not None, "attention sinks")
    _refuse(kwargs.get("position_bias") is not None, "position biases")
    _refuse(value.shape[-1] != key.shape[-1], "values of another head size than the keys")
    _refuse(attention_mask is not None and attention_mask.dim() != 2, "masks of four dimensions")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    _refuse(not causal and bool(sliding_window), "sliding windows without causality")

    batch, num_heads, q_length, head_dim = query.shape
    kv_length = key.shape[2]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [tokens, heads, head_dim]
    if attention_mask is None:
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * q_length
        cu_seqlens_k = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * kv_length
    else:
        _refuse(attention_mask.shape[1] != kv_length, "a mask of another length than the keys")
        q_mask = attention_mask[:, kv_length - q_length :]
        queries, keys = q_mask.flatten().nonzero().flatten(), attention_mask.flatten().nonzero().flatten()
        rows = [rows[0][queries], rows[1][keys], rows[2][keys]]
        cu_seqlens_q = _cumulative(q_mask)
        cu_seqlens_k = _cumulative(attention_mask)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in rows)
    out = ops.attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        scale=scaling,
        causal=causal,
        window=sliding_window or 0,
        soft_cap=softcap or 0.0,
    )
    if attention_mask is not None:
        out = out.new_zeros(batch * q_length, num_heads, head_dim).index_copy_(0, queries, out)
    return out.view(batch, q_length, num_heads, head_dim), None


def _cumulative(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


register()
