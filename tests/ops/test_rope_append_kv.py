import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.rope_cases import (
    DTYPES,
    MAX_POSITION,
    assert_same_bits,
    cos_sin_table,
    merged_qkv,
    poisoned_cache,
    random_slots,
)
from tests.tolerances import assert_as_good_as_torch, poisoned

# num_tokens, (num_q_heads, num_kv_heads), head_dim, rotary_dim, num_pages, page_size
SHAPES = [
    (1, (1, 1), 2, 2, 1, 1),
    (1, (32, 8), 128, 128, 4, 16),
    (7, (4, 2), 64, 64, 3, 4),
    (5, (3, 1), 80, 80, 2, 8),
    (6, (8, 8), 96, 24, 2, 16),
    (9, (5, 1), 80, 20, 4, 3),
    (4, (2, 1), 256, 0, 2, 2),
    (300, (8, 2), 64, 64, 30, 16),
    (0, (4, 2), 64, 64, 2, 16),
]


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, heads, head_dim, rotary_dim, num_pages, page_size", SHAPES)
def test_matches_rope_then_append(
    num_tokens, heads, head_dim, rotary_dim, num_pages, page_size, dtype, interleaved, device
):
    merged, q, k, v = merged_qkv(num_tokens, heads, head_dim, dtype, device)
    before, table = merged.clone(), cos_sin_table(rotary_dim, device)
    positions = torch.randint(MAX_POSITION, (num_tokens,), device=device)
    slots = random_slots(num_tokens, num_pages * page_size, device)
    cache = poisoned_cache(num_pages, heads[1], page_size, head_dim, dtype, device)
    untouched = cache.clone()
    q_out = poisoned(num_tokens, heads[0], head_dim, dtype=dtype, device=device)
    result = ops.rope_append_kv(q, k, v, positions, table, interleaved, cache, slots, q_out=q_out)
    assert result is q_out
    assert_same_bits(merged, before)

    # Bit for bit the two ops one after the other, and as near to the exact result as rope is held to.
    q_rope, k_rope = ops.rope(q, k, positions, table, interleaved)
    assert_same_bits(q_out, q_rope)
    assert_same_bits(cache, reference.append_kv(k_rope, v, untouched, slots))
    plain, _ = reference.rope(q.float(), k.float(), positions, table, interleaved)
    exact, _ = reference.rope(q.double(), k.double(), positions, table, interleaved)
    assert_as_good_as_torch(q_out, plain.to(dtype), exact)

    again = untouched.clone()
    ops.rope_append_kv(q, k, v, positions.int(), table, interleaved, again, slots, q_out=q)
    assert_same_bits(q, q_out)
    assert_same_bits(again, cache)


def test_the_cache_holds_the_oracle_keys(device):
    _, q, k, v = merged_qkv(11, (4, 2), 64, torch.float32, device)
    table, positions = cos_sin_table(64, device), torch.arange(11, device=device)
    cache = torch.randn(3, 2, 2, 4, 64, device=device)
    slots = random_slots(11, 12, device)
    _, expected = reference.rope_append_kv(
        q.double(), k.double(), v.double(), positions, table, False, cache.double(), slots
    )
    _, plain = reference.rope_append_kv(q, k, v, positions, table, False, cache, slots)
    ops.rope_append_kv(q, k, v, positions, table, False, cache, slots)
    assert_as_good_as_torch(cache, plain, expected)


def test_a_slot_past_the_cache(device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    q, table = torch.randn(3, 2, 64, device=device), cos_sin_table(64, device)
    cache, positions = torch.randn(2, 2, 2, 4, 64, device=device), torch.arange(3, device=device)
    before, slots = cache.clone(), torch.tensor([8, -5, 2**62], device=device)
    out = ops.rope_append_kv(q, q, q, positions, table, False, cache, slots)
    assert_same_bits(cache, before)
    assert_same_bits(out, ops.rope(q, q, positions, table)[0])
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"rope_append_kv: slot_mapping holds 8, but .* lie in \[-1, 8\)"):
        ops.rope_append_kv(q, q, q, positions, table, False, cache, slots)
    with pytest.raises(ValueError, match=r"positions holds 97, but the rows of cos_sin lie in \[0, 97\)"):
        ops.rope_append_kv(q, q, q, positions + 97, table, False, cache, slots)


def test_opcheck_and_compile(device):
    q, k, v = (torch.randn(3, h, 16, device=device) for h in (4, 2, 2))
    table, positions = cos_sin_table(16, device), torch.arange(3, device=device)
    cache, slots = torch.randn(2, 2, 2, 4, 16, device=device), torch.tensor([5, -1, 0], device=device)
    args = (q, k, v, positions, table, True, cache, slots, torch.empty_like(q))
    torch.library.opcheck(torch.ops.fastkernels.rope_append_kv.default, args)

    def layer(a, b, c, d):
        return ops.rope_append_kv(a * 2, b, c, positions, table, False, d, slots) + 1

    eager, traced = cache.clone(), cache.clone()
    expected = layer(q, k, v, eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, traced), expected)
    assert torch.equal(traced, eager), "compiled code lost the write to the cache"


def test_refuses_what_it_does_not_take():
    q, k, positions = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.arange(3)
    table, cache = cos_sin_table(16, torch.device("cpu")), torch.randn(2, 2, 2, 4, 16)
    slots = torch.tensor([5, -1, 0])

    def call(q=q, k=k, v=k, positions=positions, table=table, cache=cache, slots=slots, **kwargs):
        ops.rope_append_kv(q, k, v, positions, table, False, cache, slots, **kwargs)

    with pytest.raises(ValueError, match="rope_append_kv: q is float64, but the op takes bf16, fp16, fp32"):
        call(q=q.double())
    with pytest.raises(ValueError, match=r"k has shape \[3, 2, 8\].*with the tokens and head_dim of q"):
        call(k=k[..., :8])
    with pytest.raises(ValueError, match=r"v has shape \[3, 1, 16\], but the op takes the shape of k"):
        call(v=k[:, :1])
    with pytest.raises(ValueError, match="positions is fp32, but the op takes int32, int64"):
        call(positions=positions.float())
    with pytest.raises(ValueError, match="cos_sin must be contiguous"):
        call(table=torch.randn(97, 32)[:, :16])
    with pytest.raises(ValueError, match="kv_cache is fp16, but the op takes fp32"):
        call(cache=cache.half())
    with pytest.raises(ValueError, match="kv_cache must be contiguous"):
        call(cache=torch.randn(2, 2, 2, 8, 16)[:, :, :, ::2])
    with pytest.raises(ValueError, match="slot_mapping is int32, but the op takes int64"):
        call(slots=slots.int())
    with pytest.raises(ValueError, match="slot_mapping is on meta, but k is on cpu"):
        call(slots=slots.to("meta"))
    with pytest.raises(ValueError, match=r"q_out has shape \[3, 2, 16\], but the op takes the shape of q"):
        call(q_out=k)
