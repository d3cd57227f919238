import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# num_rows, num_tokens, size
SHAPES = [(1, 1, 1), (1, 97, 4096), (7, 3, 80), (5, 31, 1003), (64, 8192, 264), (0, 4, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, num_tokens, size", SHAPES)
def test_copies_the_rows(num_rows, num_tokens, size, dtype, device):
    x = torch.randn(num_tokens, size, device=device).to(dtype)
    row_indices = torch.randint(num_tokens, (num_rows,), device=device, dtype=torch.int32)
    out = poisoned(num_rows, size, dtype=dtype, device=device)
    assert ops.gather_rows(x, row_indices, out=out) is out
    assert torch.equal(out, x[row_indices.long()])
    assert torch.equal(out, reference.gather_rows(x, row_indices))


def test_an_index_outside_x(device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    x = torch.randn(10, 3, device=device)
    row_indices = torch.tensor([3, -1, 10, 2**31 - 1, -(2**31)], device=device, dtype=torch.int32)
    out = ops.gather_rows(x, row_indices, out=poisoned(5, 3, dtype=torch.float32, device=device))
    assert torch.equal(out[0], x[3]) and torch.equal(out[1:], torch.zeros(4, 3, device=device))
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"row_indices holds -1, but the rows of x lie in \[0, 10\)"):
        ops.gather_rows(x, row_indices)


def test_strided(device):
    x = torch.randn(20, 192, device=device, dtype=torch.float16)[:, 64:128]
    row_indices = torch.tensor([19, 0, 7], device=device, dtype=torch.int32)
    assert torch.equal(ops.gather_rows(x, row_indices), x[row_indices.long()])


def test_opcheck_and_compile(device):
    x, row_indices = torch.randn(5, 16, device=device), torch.tensor([3, 0], device=device, dtype=torch.int32)
    out = torch.empty(2, 16, device=device)
    torch.library.opcheck(torch.ops.fastkernels.gather_rows.default, (x, row_indices, out))
    compiled = torch.compile(lambda a, i: ops.gather_rows(a, i) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, row_indices), x[row_indices.long()] + 1)


def test_refuses_what_it_does_not_take():
    x, row_indices = torch.randn(5, 16), torch.tensor([3, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="x is int64, but the op takes bf16, fp16, fp32"):
        ops.gather_rows(x.long(), row_indices)
    with pytest.raises(ValueError, match=r"x has shape \[80\], but the op takes \[num_tokens, size\]"):
        ops.gather_rows(x.flatten(), row_indices)
    with pytest.raises(ValueError, match="row_indices is int64, but the op takes int32"):
        ops.gather_rows(x, row_indices.long())
    with pytest.raises(ValueError, match=r"row_indices has shape \[\], but the op takes \[num_rows\]"):
        ops.gather_rows(x, row_indices[0])
    with pytest.raises(ValueError, match="last dimension of x must be contiguous"):
        ops.gather_rows(x.t(), row_indices)
    with pytest.raises(ValueError, match="row_indices must be contiguous"):
        ops.gather_rows(x, torch.arange(4, dtype=torch.int32)[::2])
    with pytest.raises(ValueError, match="row_indices is on meta, but x is on cpu"):
        ops.gather_rows(x, row_indices.to("meta"))
    with pytest.raises(ValueError, match=r"out has shape \[2, 15\], but the op takes \[2, 16\]"):
        ops.gather_rows(x, row_indices, out=torch.empty(2, 15))
