import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (1, 64),
    (3, 80),
    (7, 1003),
    (5, 4096),
    (2, 40000),
    (0, 64),
    (4, 3, 128),
    (33, 5, 72),
    (300, 256),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, bias, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 3 + 5
    weight = torch.randn(shape[-1], device=device, dtype=dtype)
    b = torch.randn(shape[-1], device=device, dtype=dtype) if bias else None
    out = poisoned(*shape, dtype=dtype, device=device)
    assert ops.layer_norm(x, weight, b, 1e-5, out=out) is out
    plain = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, b, 1e-5)
    exact = reference.layer_norm(x.double(), weight.double(), None if b is None else b.double(), 1e-5)
    assert_as_good_as_torch(out, plain, exact)
    assert torch.equal(out, ops.layer_norm(x, weight, b, 1e-5)), "two runs differ"


def test_a_large_mean_does_not_cancel(device):
    # Integers whose sums fp32 holds exactly, so that only mean(x^2) - mean(x)^2 would lose digits.
    x = torch.randint(-8, 9, (4, 512), device=device).float() + 8192
    weight = torch.ones(512, device=device)
    exact = reference.layer_norm(x.double(), weight.double())
    assert_as_good_as_torch(
        ops.layer_norm(x, weight), torch.nn.functional.layer_norm(x, (512,), weight), exact
    )


def test_in_place_and_strided(device):
    merged = torch.randn(5, 4, 64, device=device, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    before, part = merged.clone(), merged[:, 1:3]
    expected = ops.layer_norm(part.contiguous(), weight, bias)
    ops.layer_norm(part, weight, bias, out=part)
    assert torch.equal(part, expected)
    assert torch.equal(merged[:, 0], before[:, 0]) and torch.equal(merged[:, 3], before[:, 3])


def test_opcheck_and_compile(device):
    x, weight, bias = (torch.randn(s, device=device) for s in ((3, 64), (64,), (64,)))
    for b in (bias, None):
        args = (x, weight, b, 1e-6, torch.empty_like(x))
        torch.library.opcheck(torch.ops.fastkernels.layer_norm.default, args)
    compiled = torch.compile(lambda a, w, b: ops.layer_norm(a, w, b) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), ops.layer_norm(x, weight, bias) + 1)


def test_refuses_what_it_does_not_take():
    x, weight, bias = torch.randn(3, 64), torch.randn(64), torch.randn(64)
    with pytest.raises(ValueError, match="x is int32, but the op takes bf16, fp16, fp32"):
        ops.layer_norm(x.int(), weight)
    with pytest.raises(ValueError, match="weight is fp16, but the op takes fp32"):
        ops.layer_norm(x, weight.half())
    with pytest.raises(ValueError, match="bias is bf16, but the op takes fp32"):
        ops.layer_norm(x, weight, bias.bfloat16())
    with pytest.raises(ValueError, match=r"bias has shape \[1\], but the op takes \[size\]"):
        ops.layer_norm(x, weight, bias[:1])
    with pytest.raises(ValueError, match="last dimension of x must be contiguous"):
        ops.layer_norm(torch.randn(64, 64).t(), weight)
    with pytest.raises(ValueError, match="bias is on meta, but x is on cpu"):
        ops.layer_norm(x, weight, bias.to("meta"))
    with pytest.raises(ValueError, match="takes 2 or 3 dimensions"):
        ops.layer_norm(weight, weight)
    with pytest.raises(ValueError, match="out is fp16, but the op takes fp32"):
        ops.layer_norm(x, weight, out=torch.empty(3, 64).half())
