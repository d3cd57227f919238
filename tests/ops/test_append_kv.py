import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.rope_cases import DTYPES, assert_same_bits, merged_qkv, poisoned_cache, random_slots

# num_tokens, num_kv_heads, head_dim, num_pages, page_size
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 8, 128, 4, 16),
    (7, 2, 64, 3, 4),
    (5, 1, 80, 2, 8),
    (9, 3, 5, 4, 3),
    (300, 4, 64, 30, 16),
    (0, 2, 64, 2, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, num_kv_heads, head_dim, num_pages, page_size", SHAPES)
def test_matches_reference(num_tokens, num_kv_heads, head_dim, num_pages, page_size, dtype, device):
    _, _, k, v = merged_qkv(num_tokens, (2, num_kv_heads), head_dim, dtype, device)
    cache = poisoned_cache(num_pages, num_kv_heads, page_size, head_dim, dtype, device)
    slots = random_slots(num_tokens, num_pages * page_size, device)
    expected = reference.append_kv(k, v, cache, slots)
    assert ops.append_kv(k, v, cache, slots) is cache
    assert_same_bits(cache, expected)


def test_odd_addresses(device):
    k = torch.randn(6 * 2 * 64 + 1, device=device, dtype=torch.float16)[1:].view(6, 2, 64)
    cache = poisoned_cache(2, 2, 4, 64, torch.float16, device)
    slots = random_slots(6, 8, device)
    expected = reference.append_kv(k, -k, cache, slots)
    assert_same_bits(ops.append_kv(k, -k, cache, slots), expected)


def test_a_slot_past_the_cache(device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    k, cache = torch.randn(3, 2, 64, device=device), poisoned_cache(2, 2, 4, 64, torch.float32, device)
    slots = torch.tensor([8, -5, 2**62], device=device)
    before = cache.clone()
    assert_same_bits(ops.append_kv(k, k, cache, slots), before)
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"slot_mapping holds 8, but .* lie in \[-1, 8\)"):
        ops.append_kv(k, k, cache, slots)
    ops.append_kv(k, k, cache, torch.tensor([-1, 0, 7], device=device))


def test_opcheck_and_compile(device):
    k, v = torch.randn(2, 3, 2, 16, device=device)
    cache, slots = torch.randn(2, 2, 2, 4, 16, device=device), torch.tensor([5, -1, 0], device=device)
    torch.library.opcheck(torch.ops.fastkernels.append_kv.default, (k, v, cache, slots))

    def layer(a, b, c):
        return ops.append_kv(a * 2, b, c, slots) + 1

    eager, traced = cache.clone(), cache.clone()
    expected = layer(k, v, eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k, v, traced), expected)
    assert torch.equal(traced, eager), "compiled code lost the write to the cache"


def test_refuses_what_it_does_not_take():
    k, cache, slots = torch.randn(3, 2, 16), torch.randn(2, 2, 2, 4, 16), torch.tensor([5, -1, 0])
    with pytest.raises(ValueError, match="k is float64, but the op takes bf16, fp16, fp32"):
        ops.append_kv(k.double(), k, cache, slots)
    with pytest.raises(
        ValueError, match=r"k has shape \[3, 32\], but the op takes \[num_tokens, num_kv_heads"
    ):
        ops.append_kv(k.flatten(1), k, cache, slots)
    with pytest.raises(ValueError, match="v is fp16, but the op takes fp32"):
        ops.append_kv(k, k.half(), cache, slots)
    with pytest.raises(ValueError, match=r"v has shape \[2, 2, 16\], but the op takes the shape of k"):
        ops.append_kv(k, k[:2], cache, slots)
    with pytest.raises(ValueError, match="kv_cache is bf16, but the op takes fp32"):
        ops.append_kv(k, k, cache.bfloat16(), slots)
    with pytest.raises(
        ValueError, match=r"kv_cache has shape \[2, 2, 1, 4, 16\].*with the heads and head_dim"
    ):
        ops.append_kv(k, k, cache[:, :, :1], slots)
    with pytest.raises(ValueError, match="kv_cache must be contiguous"):
        ops.append_kv(k, k, torch.randn(2, 2, 4, 2, 16).transpose(2, 3), slots)
    with pytest.raises(ValueError, match="slot_mapping is int32, but the op takes int64"):
        ops.append_kv(k, k, cache, slots.int())
    with pytest.raises(ValueError, match=r"slot_mapping has shape \[2\], but the op takes \[num_tokens\]"):
        ops.append_kv(k, k, cache, slots[:2])
    with pytest.raises(ValueError, match="kv_cache is on meta, but k is on cpu"):
        ops.append_kv(k, k, cache.to("meta"), slots)
    with pytest.raises(ValueError, match="last dimension of v must be contiguous"):
        ops.append_kv(k, torch.randn(3, 16, 2).transpose(1, 2), cache, slots)
