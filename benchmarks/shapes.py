"""The shapes the ops are measured at."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shapes:
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tokens: tuple[int, ...]
    seqs: tuple[int, ...]
    dtype: torch.dtype


def shapes_for(device: torch.device, quick: bool) -> Shapes:
    """Llama-3.1-8B in bf16 on a GPU, Llama-3.2-1B in fp32 on the CPU; quick: less of it, on the CPU a toy."""
    if device.type == "cuda":
        tokens = (1, 64, 4096) if quick else (1, 16, 64, 512, 4096, 8192)
        seqs = (1, 64) if quick else (1, 16, 64, 256)
        return Shapes(4096, 14336, 32, 8, 128, 128256, tokens, seqs, torch.bfloat16)
    if quick:
        return Shapes(256, 512, 4, 2, 64, 1024, (1, 16), (1, 4), torch.float32)
    return Shapes(2048, 8192, 32, 8, 64, 128256, (1, 16, 512), (1, 16), torch.float32)


def tokens_label(num_tokens: int) -> str:
    return "1 token" if num_tokens == 1 else f"{num_tokens} tokens"
