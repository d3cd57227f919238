"""Inputs that the tests of rope, rope_append_kv and append_kv share."""

import torch

from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAX_POSITION = 97


def cos_sin_table(rotary_dim: int, device: torch.device) -> torch.Tensor:
    """[MAX_POSITION, rotary_dim] fp32, cosines then sines."""
    pairs = torch.arange(rotary_dim // 2, device=device, dtype=torch.float64)
    frequencies = 10000.0 ** (-pairs / max(1, rotary_dim // 2))
    angles = torch.arange(MAX_POSITION, device=device, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def merged_qkv(
    num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merged, q, k, v): q, k and v are slices of one projection, as the engine has them."""
    num_q_heads, num_kv_heads = heads
    merged = torch.randn(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    q, k, v = merged.split([num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
    return (
        merged,
        q.view(num_tokens, num_q_heads, head_dim),
        k.view(num_tokens, num_kv_heads, head_dim),
        v.view(num_tokens, num_kv_heads, head_dim),
    )


def random_slots(num_tokens: int, num_slots: int, device: torch.device) -> torch.Tensor:
    """Different slots of the cache; every third token is padding."""
    slots = torch.randperm(num_slots)[:num_tokens].to(device)
    slots[2::3] = -1
    return slots


def poisoned_cache(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    return poisoned(num_pages, 2, num_kv_heads, page_size, head_dim, dtype=dtype, device=device)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal, where NaN equals NaN."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
