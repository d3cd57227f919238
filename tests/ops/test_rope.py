import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.rope_cases import DTYPES, MAX_POSITION, assert_same_bits, cos_sin_table, merged_qkv
from tests.tolerances import assert_as_good_as_torch, poisoned

# num_tokens, (num_q_heads, num_kv_heads), head_dim, rotary_dim
SHAPES = [
    (1, (1, 1), 2, 2),
    (1, (32, 8), 128, 128),
    (3, (4, 2), 64, 64),
    (5, (3, 1), 80, 80),
    (7, (8, 8), 96, 24),
    (6, (5, 1), 80, 20),
    (2, (2, 1), 256, 64),
    (4, (3, 3), 6, 2),
    (4, (2, 1), 64, 0),
    (65, (6, 2), 48, 16),
    (300, (8, 2), 64, 64),
    (0, (4, 2), 64, 64),
]


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, heads, head_dim, rotary_dim", SHAPES)
def test_matches_reference(num_tokens, heads, head_dim, rotary_dim, dtype, interleaved, device):
    _, q, k, _ = merged_qkv(num_tokens, heads, head_dim, dtype, device)
    table = cos_sin_table(rotary_dim, device)
    positions = torch.randint(MAX_POSITION, (num_tokens,), device=device)
    q_out = poisoned(num_tokens, heads[0], head_dim, dtype=dtype, device=device)
    k_out = poisoned(num_tokens, heads[1], head_dim, dtype=dtype, device=device)
    result = ops.rope(q, k, positions, table, interleaved, q_out=q_out, k_out=k_out)
    assert result[0] is q_out and result[1] is k_out
    # The kernel computes in fp32 and rounds once; so does what it is held to.
    plain = reference.rope(q.float(), k.float(), positions, table, interleaved)
    exact = reference.rope(q.double(), k.double(), positions, table, interleaved)
    for out, p, e, x in zip(result, plain, exact, (q, k), strict=True):
        assert_as_good_as_torch(out, p.to(dtype), e)
        assert_same_bits(out[..., rotary_dim:], x[..., rotary_dim:])
    again = ops.rope(q, k, positions.int(), table, interleaved)
    assert_same_bits(again[0], q_out)
    assert_same_bits(again[1], k_out)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 24, 18])
def test_in_place_in_a_merged_projection(rotary_dim, interleaved, device):
    merged, q, k, _ = merged_qkv(9, (4, 2), 64, torch.bfloat16, device)
    before, table = merged.clone(), cos_sin_table(rotary_dim, device)
    positions = torch.arange(9, device=device)
    expected = ops.rope(q.contiguous(), k.contiguous(), positions, table, interleaved)
    ops.rope(q, k, positions, table, interleaved, q_out=q, k_out=k)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])
    assert_same_bits(merged[:, 6 * 64 :], before[:, 6 * 64 :])


def test_a_turn_by_hand(device):
    table = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]], device=device
    )  # the first pair by 90 degrees
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]], device=device)
    x = torch.cat((x, torch.zeros(1, 1, 1, device=device)), dim=-1)
    position = torch.tensor([1], device=device)
    neox, _ = ops.rope(x, x, position, table)
    assert neox.flatten().tolist() == [-3, 2, 1, 4, 5, 0]
    pairs, _ = ops.rope(x, x, position, table, True)
    assert pairs.flatten().tolist() == [-2, 1, 3, 4, 5, 0]


def test_heads_strided_and_odd_addresses(device):
    table, positions = cos_sin_table(64, device), torch.tensor([5, 0, 96], device=device)
    wide = torch.randn(3, 4, 160, device=device)
    q, k = wide[:, ::2, 64:128], wide[:, 1::2, 1:65]
    expected = ops.rope(q.contiguous(), k.contiguous(), positions, table)
    result = ops.rope(q, k, positions, table)
    exact = reference.rope(q.double(), k.double(), positions, table)
    for out, contiguous, e in zip(result, expected, exact, strict=True):
        assert_as_good_as_torch(out, contiguous, e)


def test_a_position_outside_the_table(device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    table, q = cos_sin_table(16, device), torch.randn(3, 2, 16, device=device)
    positions = torch.tensor([-1, MAX_POSITION, 2**31 - 1], device=device)
    inside = torch.tensor([0, MAX_POSITION - 1, MAX_POSITION - 1], device=device)
    assert_same_bits(ops.rope(q, q, positions, table)[0], ops.rope(q, q, inside, table)[0])
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"positions holds -1, but the rows of cos_sin lie in \[0, 97\)"):
        ops.rope(q, q, positions, table)


def test_opcheck_and_compile(device):
    q, k = torch.randn(3, 4, 16, device=device), torch.randn(3, 2, 16, device=device)
    table, positions = cos_sin_table(16, device), torch.arange(3, device=device)
    args = (q, k, positions, table, False, torch.empty_like(q), torch.empty_like(k))
    torch.library.opcheck(torch.ops.fastkernels.rope.default, args)

    def layer(a, b):
        x, y = ops.rope(a * 2, b, positions, table)
        return x + 1, y

    expected = layer(q, k)
    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_refuses_what_it_does_not_take():
    q, k, positions = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.arange(3)
    table = cos_sin_table(16, torch.device("cpu"))
    with pytest.raises(ValueError, match="q is float64, but the op takes bf16, fp16, fp32"):
        ops.rope(q.double(), k, positions, table)
    with pytest.raises(ValueError, match="k is fp16, but the op takes fp32"):
        ops.rope(q, k.half(), positions, table)
    with pytest.raises(
        ValueError, match=r"q has shape \[3, 64\], but the op takes \[num_tokens, num_q_heads"
    ):
        ops.rope(q.flatten(1), k, positions, table)
    with pytest.raises(ValueError, match=r"k has shape \[2, 2, 16\].*with the tokens and head_dim of q"):
        ops.rope(q, k[:2], positions, table)
    with pytest.raises(ValueError, match="positions is fp32, but the op takes int32, int64"):
        ops.rope(q, k, positions.float(), table)
    with pytest.raises(ValueError, match=r"positions has shape \[2\], but the op takes \[num_tokens\]"):
        ops.rope(q, k, positions[:2], table)
    with pytest.raises(ValueError, match="positions must be contiguous"):
        ops.rope(q, k, torch.arange(6)[::2], table)
    with pytest.raises(ValueError, match="cos_sin is bf16, but the op takes fp32"):
        ops.rope(q, k, positions, table.bfloat16())
    with pytest.raises(ValueError, match="cos_sin has no rows"):
        ops.rope(q, k, positions, table[:0])
    with pytest.raises(ValueError, match="rotary_dim, the width of cos_sin, is 15, but the op takes an even"):
        ops.rope(q, k, positions, table[:, :15].contiguous())
    with pytest.raises(
        ValueError, match="is 18, but the op takes an even number up to head_dim, which is 16"
    ):
        ops.rope(q, k, positions, torch.randn(97, 18))
    with pytest.raises(ValueError, match="last dimension of q must be contiguous"):
        ops.rope(torch.randn(3, 16, 4).transpose(1, 2), k, positions, table)
    with pytest.raises(ValueError, match="cos_sin is on meta, but q is on cpu"):
        ops.rope(q, k, positions, table.to("meta"))
    with pytest.raises(ValueError, match=r"q_out has shape \[3, 2, 16\], but the op takes the shape of q"):
        ops.rope(q, k, positions, table, q_out=k)
    with pytest.raises(ValueError, match="k_out is fp16, but the op takes fp32"):
        ops.rope(q, k, positions, table, k_out=k.half())
