import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # in_size, out_size; on CUDA a block has 8 rows of gate and of up, a chunk is 64 along in_size
    (8, 1),
    (64, 8),
    (72, 9),
    (520, 1003),
    (2048, 7),
    (2872, 96),
]


def operands(num_tokens, in_size, out_size, dtype, device):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernel takes bf16 and fp16")
    x = torch.randn(num_tokens, in_size, device=device, dtype=dtype)
    return x, torch.randn(2 * out_size, in_size, device=device, dtype=dtype) * in_size**-0.5 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_size, out_size", SIZES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 16])
def test_matches_reference(num_tokens, in_size, out_size, dtype, device):
    x, weight = operands(num_tokens, in_size, out_size, dtype, device)
    out = poisoned(num_tokens, out_size, dtype=dtype, device=device)
    assert ops.linear_silu_mul(x, weight, out=out) is out
    exact = reference.linear_silu_mul(x.double(), weight.double())
    assert_as_good_as_torch(out, reference.linear_silu_mul(x, weight), exact)
    assert torch.equal(out, ops.linear_silu_mul(x, weight, constant_weight=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_others(dtype, device):
    x, weight = operands(16, 1096, 333, dtype, device)
    together = ops.linear_silu_mul(x, weight)
    for count in (1, 3, 4, 8, 9):
        assert torch.equal(ops.linear_silu_mul(x[:count], weight), together[:count])


def test_strided_operands(device):
    wide_x = torch.randn(5, 512, device=device, dtype=torch.bfloat16)
    wide_weight = torch.randn(80, 384, device=device, dtype=torch.bfloat16)
    wide_out = poisoned(5, 64, dtype=torch.bfloat16, device=device)
    x, weight, out = wide_x[:, 64:320], wide_weight[:, 128:], wide_out[:, 8:48]
    ops.linear_silu_mul(x, weight, out=out)
    assert torch.equal(out, ops.linear_silu_mul(x.contiguous(), weight.contiguous()))
    assert wide_out[:, :8].isnan().all() and wide_out[:, 48:].isnan().all()


def test_large_gates_and_nan(device):
    """silu is 0 far below and the gate itself far above; a NaN stays in its token."""
    x = torch.full((2, 64), 30.0, device=device, dtype=torch.bfloat16)
    weight = torch.ones(4, 64, device=device, dtype=torch.bfloat16)
    weight[0] = -1.0
    weight[2:] /= 1920.0
    x[1, 3] = float("nan")
    result = ops.linear_silu_mul(x, weight)
    assert result[0, 0] == 0 and result[0, 1].item() == pytest.approx(1920.0, rel=1e-2)
    assert result[1].isnan().all()


def test_empty(device):
    weight = torch.randn(16, 64, device=device, dtype=torch.bfloat16)
    assert ops.linear_silu_mul(weight[:0], weight).shape == (0, 8)
    assert ops.linear_silu_mul(weight[:2], weight[:0]).shape == (2, 0)


def test_opcheck_and_compile(device):
    x, weight = operands(3, 64, 24, torch.bfloat16, device)
    out = torch.empty(3, 24, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastkernels.linear_silu_mul.default, (x, weight, False, out))
    compiled = torch.compile(
        lambda a: ops.linear_silu_mul(a, weight) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.linear_silu_mul(x, weight) + 1)


def test_refuses_what_it_does_not_take(device):
    x, weight = operands(3, 64, 24, torch.bfloat16, device)
    with pytest.raises(ValueError, match="num_tokens is 17, but the op takes at most 16"):
        ops.linear_silu_mul(x[:1].expand(17, -1), weight)
    with pytest.raises(ValueError, match="weight has 47 rows; gate and up have as many each"):
        ops.linear_silu_mul(x, weight[:47])
    with pytest.raises(ValueError, match=r"weight has shape \[48, 32\], but the op takes \[2 \* out_size"):
        ops.linear_silu_mul(x, weight[:, :32])
    with pytest.raises(ValueError, match="weight is fp16, but the op takes bf16"):
        ops.linear_silu_mul(x, weight.half())
    with pytest.raises(ValueError, match=r"x has shape \[64\], but the op takes \[num_tokens, in_size\]"):
        ops.linear_silu_mul(x[0], weight)
    with pytest.raises(ValueError, match="the last dimension of weight must be contiguous"):
        ops.linear_silu_mul(x, torch.randn(64, 48, device=device, dtype=torch.bfloat16).t())
    with pytest.raises(ValueError, match=r"out has shape \[3, 23\], but the op takes \[num_tokens"):
        ops.linear_silu_mul(x, weight, out=torch.empty(3, 23, device=device, dtype=torch.bfloat16))
    if device.type == "cuda":
        with pytest.raises(
            ValueError, match="linear_silu_mul on CUDA: x is fp32, but the op takes bf16, fp16"
        ):
            ops.linear_silu_mul(x.float(), weight.float())
        with pytest.raises(
            ValueError, match="linear_silu_mul on CUDA: in_size is 60; it must be a multiple of 8"
        ):
            ops.linear_silu_mul(x[:, :60], weight[:, :60])
        with pytest.raises(Exception, match="must be aligned to 16 bytes"):
            ops.linear_silu_mul(x[:, 1:57], weight[:, 1:57])
