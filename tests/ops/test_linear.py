import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 2, 3, 5, 8, 9, 15, 16]
SIZES = [  # in_size, out_size; a chunk is 64 along in_size, a block 8 of them
    (8, 1),
    (64, 16),
    (72, 17),
    (504, 15),
    (512, 33),
    (520, 1003),
    (1024, 64),
    (4096, 160),
    (2872, 96),
]


def taken(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernel takes bf16 and fp16")


def operands(num_tokens, in_size, out_size, dtype, device):
    x = torch.randn(num_tokens, in_size, device=device, dtype=dtype)
    weight = torch.randn(out_size, in_size, device=device, dtype=dtype) * in_size**-0.5
    return x, weight, torch.randn(out_size, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_size, out_size", SIZES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_matches_reference(num_tokens, in_size, out_size, dtype, device):
    taken(dtype, device)
    x, weight, bias = operands(num_tokens, in_size, out_size, dtype, device)
    for b in (None, bias):
        out = poisoned(num_tokens, out_size, dtype=dtype, device=device)
        assert ops.linear(x, weight, b, out=out) is out
        plain = reference.linear(x, weight, b)
        exact = reference.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_as_good_as_torch(out, plain, exact)
        assert torch.equal(out, ops.linear(x, weight, b, constant_weight=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_others(dtype, device):
    taken(dtype, device)
    x, weight, bias = operands(16, 1096, 333, dtype, device)
    together = ops.linear(x, weight, bias)
    for count in (1, 3, 4, 8, 9):
        assert torch.equal(ops.linear(x[:count], weight, bias), together[:count])


def test_odd_in_sizes_on_the_cpu():
    for in_size in (1, 7, 33, 1003):
        x, weight, bias = operands(3, in_size, 13, torch.float32, "cpu")
        exact = reference.linear(x.double(), weight.double(), bias.double())
        assert_as_good_as_torch(ops.linear(x, weight, bias), reference.linear(x, weight, bias), exact)


def test_strided_operands(device):
    wide_x = torch.randn(5, 512, device=device, dtype=torch.bfloat16)
    wide_weight = torch.randn(40, 384, device=device, dtype=torch.bfloat16)
    wide_out = poisoned(5, 64, dtype=torch.bfloat16, device=device)
    x, weight, out = wide_x[:, 64:320], wide_weight[:, 128:], wide_out[:, 8:48]
    ops.linear(x, weight, out=out)
    assert torch.equal(out, ops.linear(x.contiguous(), weight.contiguous()))
    assert wide_out[:, :8].isnan().all() and wide_out[:, 48:].isnan().all()


def test_large_values_and_nan(device):
    x = torch.full((2, 64), 3e4, device=device, dtype=torch.bfloat16)
    weight = torch.full((16, 64), 2e4, device=device, dtype=torch.bfloat16)
    assert torch.isfinite(ops.linear(x, weight)).all()
    x[1, 3] = float("nan")
    result = ops.linear(x, weight)
    assert torch.isfinite(result[0]).all() and result[1].isnan().all()


def test_empty(device):
    x = torch.randn(0, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(16, 64, device=device, dtype=torch.bfloat16)
    assert ops.linear(x, weight).shape == (0, 16)
    assert ops.linear(weight[:2], weight[:0]).shape == (2, 0)


def test_offsets_beyond_32_bits(device):
    """The last rows of a weight of more than 2^31 elements."""
    if device.type == "cpu":
        pytest.skip("4 GiB of weight are for the GPU")
    rows = (1 << 31) // 1024 + 40
    weight = torch.empty(rows, 1024, device=device, dtype=torch.bfloat16).fill_(0.0)
    weight[-17:] = torch.randn(17, 1024, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 1024, device=device, dtype=torch.bfloat16)
    assert torch.equal(ops.linear(x, weight)[:, -17:], ops.linear(x, weight[-17:].clone()))


def test_opcheck_and_compile(device):
    x, weight, bias = operands(3, 64, 24, torch.bfloat16, device)
    out = torch.empty(3, 24, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastkernels.linear.default, (x, weight, bias, False, out))
    compiled = torch.compile(lambda a: ops.linear(a, weight) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.linear(x, weight) + 1)


def test_refuses_what_it_does_not_take(device):
    x, weight, bias = operands(3, 64, 24, torch.bfloat16, device)
    with pytest.raises(ValueError, match="num_tokens is 17, but the op takes at most 16"):
        ops.linear(x[:1].expand(17, -1), weight)
    with pytest.raises(ValueError, match=r"weight has shape \[24, 32\], but the op takes \[out_size"):
        ops.linear(x, weight[:, :32])
    with pytest.raises(ValueError, match="weight is fp16, but the op takes bf16"):
        ops.linear(x, weight.half())
    with pytest.raises(ValueError, match=r"bias has shape \[23\], but the op takes \[out_size\]"):
        ops.linear(x, weight, bias[:23])
    with pytest.raises(ValueError, match=r"x has shape \[64\], but the op takes \[num_tokens, in_size\]"):
        ops.linear(x[0], weight)
    with pytest.raises(ValueError, match="the last dimension of weight must be contiguous"):
        ops.linear(x, torch.randn(64, 24, device=device, dtype=torch.bfloat16).t())
    with pytest.raises(ValueError, match=r"out has shape \[3, 23\], but the op takes \[num_tokens"):
        ops.linear(x, weight, out=torch.empty(3, 23, device=device, dtype=torch.bfloat16))
    if device.type == "cuda":
        with pytest.raises(ValueError, match="linear on CUDA: x is fp32, but the op takes bf16, fp16"):
            ops.linear(x.float(), weight.float())
        with pytest.raises(ValueError, match="linear on CUDA: in_size is 60; it must be a multiple of 8"):
            ops.linear(x[:, :60], weight[:, :60])
        with pytest.raises(Exception, match="must be aligned to 16 bytes"):
            ops.linear(x[:, 1:57], weight[:, 1:57])
