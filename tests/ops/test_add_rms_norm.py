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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    residual = torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(shape[-1], device=device, dtype=dtype)
    updated, out = residual.clone(), poisoned(*shape, dtype=dtype, device=device)
    assert ops.add_rms_norm(x, updated, weight, 1e-5, out=out) is out
    assert torch.equal(updated, residual + x), "the residual is not the rounded sum"
    exact = reference.rms_norm(updated.double(), weight.double(), 1e-5)
    assert_as_good_as_torch(out, reference.add_rms_norm(x, residual, weight, 1e-5)[0], exact)
    assert torch.equal(out, ops.rms_norm(updated, weight, 1e-5)), "differs from rms_norm of the sum"
    again = residual.clone()
    assert torch.equal(out, ops.add_rms_norm(x, again, weight, 1e-5)), "two runs differ"


def test_in_place_and_strided(device):
    merged = torch.randn(5, 192, device=device, dtype=torch.float16)
    before = merged.clone()
    x, weight = merged[:, 64:128], torch.randn(64, device=device, dtype=torch.float16)
    residual = torch.randn(5, 2, 64, device=device, dtype=torch.float16)
    expected, expected_residual = x.contiguous(), residual[:, 1].contiguous()
    expected = ops.add_rms_norm(expected, expected_residual, weight)
    untouched = residual[:, 0].clone()
    assert ops.add_rms_norm(x, residual[:, 1], weight, out=x) is x
    assert torch.equal(x, expected) and torch.equal(residual[:, 1], expected_residual)
    assert torch.equal(residual[:, 0], untouched)
    assert torch.equal(merged[:, :64], before[:, :64]) and torch.equal(merged[:, 128:], before[:, 128:])


def test_odd_addresses(device):
    x = torch.randn(3 * 64 + 1, device=device, dtype=torch.bfloat16)[1:].view(3, 64)
    residual, weight = torch.randn_like(x.contiguous()), torch.randn(64, device=device, dtype=torch.bfloat16)
    updated = residual.clone()
    out = ops.add_rms_norm(x, updated, weight)
    exact = reference.rms_norm(updated.double(), weight.double())
    assert_as_good_as_torch(out, reference.rms_norm(updated, weight), exact)


def test_opcheck_and_compile(device):
    x, residual, weight = (torch.randn(s, device=device) for s in ((3, 64), (3, 64), (64,)))
    op = torch.ops.fastkernels.add_rms_norm.default
    torch.library.opcheck(op, (x, residual, weight, 1e-6, torch.empty_like(x)))

    def layer(a, r, w):
        return ops.add_rms_norm(a * 2, r, w) + 1

    eager, traced = residual.clone(), residual.clone()
    expected = layer(x, eager, weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, traced, weight), expected)
    assert torch.equal(traced, eager), "compiled code lost the write to the residual"


def test_refuses_what_it_does_not_take():
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    with pytest.raises(ValueError, match="x is float64, but the op takes bf16, fp16, fp32"):
        ops.add_rms_norm(x.double(), residual, weight)
    with pytest.raises(ValueError, match="residual is fp16, but the op takes fp32"):
        ops.add_rms_norm(x, residual.half(), weight)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 64\], but the op takes the shape of x"):
        ops.add_rms_norm(x, residual[:2], weight)
    with pytest.raises(ValueError, match=r"weight has shape \[63\], but the op takes \[size\]"):
        ops.add_rms_norm(x, residual, weight[:63])
    with pytest.raises(ValueError, match="last dimension of residual must be contiguous"):
        ops.add_rms_norm(x, torch.randn(64, 3).t(), weight)
    with pytest.raises(ValueError, match="takes 2 or 3 dimensions"):
        ops.add_rms_norm(weight, weight, weight)
    with pytest.raises(ValueError, match="residual is on meta, but x is on cpu"):
        ops.add_rms_norm(x, residual.to("meta"), weight)
    with pytest.raises(ValueError, match="out is the residual, but the op writes both"):
        ops.add_rms_norm(x, residual, weight, out=residual)
    with pytest.raises(ValueError, match=r"out has shape \[3, 63\]"):
        ops.add_rms_norm(x, residual, weight, out=torch.empty(3, 63))
