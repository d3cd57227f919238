"""append_kv and rope_append_kv into caches of one-byte elements."""

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.rope_cases import DTYPES, MAX_POSITION, cos_sin_table, merged_qkv, random_slots

BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
# num_tokens, (num_q_heads, num_kv_heads), head_dim, rotary_dim
SHAPES = [
    (1, (1, 1), 2, 2),
    (1, (32, 8), 128, 128),
    (7, (4, 2), 64, 32),
    (5, (3, 1), 80, 80),
    (9, (6, 3), 5, 4),
    (4, (2, 1), 256, 0),
    (200, (8, 4), 64, 64),
    (0, (4, 2), 64, 64),
]


def cache_of(num_tokens, heads, head_dim, dtype, device):
    """(cache, slots, scales): every byte of the cache is 0x55."""
    cache = torch.full((num_tokens // 8 + 2, 2, heads, 16, head_dim), 0x55, dtype=torch.uint8, device=device)
    scales = {
        "k_scale": torch.rand(heads, device=device) * 0.05 + 0.003,
        "v_scale": torch.rand(heads, device=device) * 0.05 + 0.003,
    }
    return cache.view(dtype), random_slots(num_tokens, cache.shape[0] * 16, device), scales


def assert_same_bytes(a, b):
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, heads, head_dim, rotary_dim", SHAPES)
def test_append_matches_reference(num_tokens, heads, head_dim, rotary_dim, dtype, kv_dtype, device):
    _, _, k, v = merged_qkv(num_tokens, heads, head_dim, dtype, device)
    cache, slots, scales = cache_of(num_tokens, heads[1], head_dim, kv_dtype, device)
    for options in (scales, {}):
        expected = reference.append_kv(k, v, cache, slots, **options)
        assert ops.append_kv(k, v, cache, slots, **options) is cache
        assert_same_bytes(cache, expected)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, heads, head_dim, rotary_dim", SHAPES)
def test_matches_rope_then_append(
    num_tokens, heads, head_dim, rotary_dim, dtype, kv_dtype, interleaved, device
):
    _, q, k, v = merged_qkv(num_tokens, heads, head_dim, dtype, device)
    table = cos_sin_table(rotary_dim, device)
    positions = torch.randint(MAX_POSITION, (num_tokens,), device=device)
    cache, slots, scales = cache_of(num_tokens, heads[1], head_dim, kv_dtype, device)
    expected = cache.clone()
    q_out = ops.rope_append_kv(q, k, v, positions, table, interleaved, cache, slots, **scales)
    q_rope, k_rope = ops.rope(q, k, positions, table, interleaved)
    ops.append_kv(k_rope, v, expected, slots, **scales)
    assert torch.equal(q_out, q_rope)
    assert_same_bytes(cache, expected)
    offset = torch.randn(heads[1], head_dim, device=device)
    ops.rope_append_kv(q, k, v, positions, table, interleaved, cache, slots, **scales, k_offset=offset)
    ops.append_kv(k_rope.float() - offset, v.float(), expected, slots, **scales)
    assert_same_bytes(cache, expected)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_rounding_and_saturation(kv_dtype, device):
    """Every fp16 there is: ties, denormals, what is too large, infinities and NaN."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).to(device)
    k = x.view(256, 2, 128)
    cache = torch.zeros(16, 2, 2, 16, 128, dtype=torch.uint8, device=device).view(kv_dtype)
    slots = torch.arange(256, device=device)
    expected = reference.append_kv(k, -k, cache, slots)
    ops.append_kv(k, -k, cache, slots)
    if kv_dtype.is_floating_point:  # the sign of NaN is nobody's
        cache, expected = (torch.nan_to_num(c.float(), nan=1e9) for c in (cache, expected))
    assert torch.equal(cache, expected)


def test_refuses_what_it_does_not_take(device):
    k = torch.randn(3, 2, 64, device=device)
    slots = torch.arange(3, device=device)
    cache = torch.zeros(2, 2, 2, 16, 64, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="kv_cache is fp16, but the op takes fp32, float8_e4m3fn"):
        ops.append_kv(k, k, cache.half(), slots)
    with pytest.raises(ValueError, match=r"k_scale has shape \[3\], but the op takes \[num_kv_heads\]"):
        ops.append_kv(k, k, cache, slots, k_scale=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="v_scale is given, but kv_cache is fp32"):
        ops.append_kv(k, k, cache.float(), slots, v_scale=torch.ones(2, device=device))
    turned = (k, k, k, slots, cos_sin_table(64, device), False)
    for offset, message in (
        (
            torch.zeros(64, device=device),
            r"k_offset has shape \[64\], but the op takes \[num_kv_heads, head_dim\]",
        ),
        (torch.zeros(2, 64, device=device).half(), "k_offset is fp16, but the op takes fp32"),
        (torch.zeros(64, 2, device=device).t(), "k_offset must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rope_append_kv(*turned, cache, slots, k_offset=offset)
    with pytest.raises(ValueError, match="k_offset is given, but kv_cache is fp32"):
        ops.rope_append_kv(*turned, cache.float(), slots, k_offset=torch.zeros(2, 64, device=device))
