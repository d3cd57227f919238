import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 64), (3, 80), (7, 1003), (5, 4096), (2, 40000), (0, 64), (4, 3, 128)]
)
def test_matches_reference(shape, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    weight = torch.randn(shape[-1], device=device, dtype=dtype)
    out = poisoned(*shape, dtype=dtype, device=device)
    assert ops.rms_norm(x, weight, 1e-5, out=out) is out
    assert_as_good_as_torch(
        out, reference.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)
    )
    assert torch.equal(out, ops.rms_norm(x, weight, 1e-5)), "two runs differ"


def test_strided_input_and_in_place(device):
    merged = torch.randn(5, 12 * 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(64, device=device, dtype=torch.bfloat16)
    heads = merged[:, 64 : 9 * 64].view(5, 8, 64)
    expected = ops.rms_norm(heads.contiguous(), weight)
    before = merged.clone()
    ops.rms_norm(heads, weight, out=heads)
    assert torch.equal(heads, expected)
    assert torch.equal(merged[:, :64], before[:, :64]) and torch.equal(
        merged[:, 9 * 64 :], before[:, 9 * 64 :]
    )


def test_opcheck_and_compile(device):
    x, weight = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    torch.library.opcheck(torch.ops.fastkernels.rms_norm.default, (x, weight, 1e-6, torch.empty_like(x)))
    compiled = torch.compile(lambda a, w: ops.rms_norm(a, w) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), ops.rms_norm(x, weight) + 1)


def test_refuses_what_it_does_not_take():
    x, weight = torch.randn(3, 64), torch.randn(64)
    with pytest.raises(ValueError, match="x is float64, but the op takes bf16, fp16, fp32"):
        ops.rms_norm(x.double(), weight)
    with pytest.raises(ValueError, match="weight is fp16, but the op takes fp32"):
        ops.rms_norm(x, weight.half())
    with pytest.raises(ValueError, match=r"weight has shape \[63\], but the op takes \[size\]"):
        ops.rms_norm(x, weight[:63])
    with pytest.raises(ValueError, match="last dimension of x must be contiguous"):
        ops.rms_norm(torch.randn(64, 64).t(), weight)
    with pytest.raises(ValueError, match="takes 2 or 3 dimensions"):
        ops.rms_norm(weight, weight)
    with pytest.raises(ValueError, match="out is on meta, but x is on cpu"):
        ops.rms_norm(x, weight, out=torch.empty(3, 64, device="meta"))
