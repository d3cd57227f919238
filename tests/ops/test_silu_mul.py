import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (1, 7), (3, 8), (5, 1003), (1, 14336), (17, 4096), (3, 4097), (300, 64), (0, 64), (2, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, size", SIZES)
def test_matches_reference(num_tokens, size, dtype, device):
    x = torch.randn(num_tokens, 2 * size, device=device, dtype=dtype) * 3
    out = poisoned(num_tokens, size, dtype=dtype, device=device)
    assert ops.silu_mul(x, out=out) is out
    plain, exact = reference.silu_mul(x), reference.silu_mul(x.double())
    assert_as_good_as_torch(out, plain, exact)
    assert torch.equal(out, ops.silu_mul(x)), "two runs differ"


def test_over_the_whole_range_of_the_gate(device):
    gate = torch.linspace(-120, 120, 4801, device=device)
    x = torch.stack((gate, torch.ones_like(gate)), dim=1)
    exact = reference.silu_mul(x.double())
    error = (ops.silu_mul(x).double() - exact).abs()
    assert (error <= 1e-6 + 1e-6 * exact.abs()).all(), f"max abs error {error.max():.3g}"
    extremes = torch.tensor([[1e30, 2.0], [-1e30, 2.0], [float("nan"), 1.0]], device=device)
    result = ops.silu_mul(extremes).flatten().tolist()
    assert result[0] == pytest.approx(2e30) and result[1] == 0 and result[2] != result[2]


def test_strided_and_into_the_gate(device):
    wide = torch.randn(5, 3 * 128, device=device, dtype=torch.bfloat16)
    before, x = wide.clone(), wide[:, 128:]
    expected = ops.silu_mul(x.contiguous())
    gate = x[:, :128]
    assert ops.silu_mul(x, out=gate) is gate
    assert torch.equal(gate, expected)
    assert torch.equal(wide[:, :128], before[:, :128]) and torch.equal(wide[:, 256:], before[:, 256:])
    odd = torch.randn(5 * 128 + 1, device=device, dtype=torch.bfloat16)[1:].view(5, 128)
    assert_as_good_as_torch(ops.silu_mul(odd), reference.silu_mul(odd), reference.silu_mul(odd.double()))


def test_opcheck_and_compile(device):
    x = torch.randn(3, 64, device=device)
    torch.library.opcheck(torch.ops.fastkernels.silu_mul.default, (x, torch.empty(3, 32, device=device)))
    compiled = torch.compile(lambda a: ops.silu_mul(a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.silu_mul(x) + 1)


def test_refuses_what_it_does_not_take():
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="x is float64, but the op takes bf16, fp16, fp32"):
        ops.silu_mul(x.double())
    with pytest.raises(
        ValueError, match=r"x has shape \[3, 63\], but the op takes \[num_tokens, 2 \* size\]"
    ):
        ops.silu_mul(x[:, :63])
    with pytest.raises(ValueError, match=r"x has shape \[64\], but the op takes \[num_tokens, 2 \* size\]"):
        ops.silu_mul(x[0])
    with pytest.raises(ValueError, match="last dimension of x must be contiguous"):
        ops.silu_mul(torch.randn(64, 64).t())
    with pytest.raises(ValueError, match="out is fp16, but the op takes fp32"):
        ops.silu_mul(x, out=torch.empty(3, 32).half())
    with pytest.raises(ValueError, match=r"out has shape \[3, 64\], but the op takes \[num_tokens, size\]"):
        ops.silu_mul(x, out=torch.empty(3, 64))
    with pytest.raises(ValueError, match="out is on meta, but x is on cpu"):
        ops.silu_mul(x, out=torch.empty(3, 32, device="meta"))
    with pytest.raises(ValueError, match="expected a tensor or an array that speaks DLPack, got list"):
        ops.silu_mul([1.0, 2.0])
