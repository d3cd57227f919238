import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# num_tokens, vocab_size, hidden_size
SHAPES = [
    (1, 1, 1),
    (1, 97, 4096),
    (7, 1003, 80),
    (5, 31, 1003),
    (33, 64, 1024),
    (700, 50, 264),
    (0, 4, 8),
    (3, 4, 0),
]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, vocab_size, hidden_size", SHAPES)
def test_copies_the_rows(num_tokens, vocab_size, hidden_size, dtype, index_dtype, device):
    table = torch.randn(vocab_size, hidden_size, device=device).to(dtype)
    token_ids = torch.randint(vocab_size, (num_tokens,), device=device, dtype=index_dtype)
    out = poisoned(num_tokens, hidden_size, dtype=dtype, device=device)
    assert ops.embedding(token_ids, table, out=out) is out
    assert torch.equal(out, reference.embedding(token_ids, table))
    assert torch.equal(out, torch.nn.functional.embedding(token_ids, table))
    assert torch.equal(out, ops.embedding(token_ids, table)), "two runs differ"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_an_id_outside_the_vocabulary(index_dtype, device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    table = torch.randn(10, 64, device=device)
    far = torch.iinfo(index_dtype)
    token_ids = torch.tensor([3, -1, 10, far.max, far.min, 0], device=device, dtype=index_dtype)
    out = ops.embedding(token_ids, table, out=poisoned(6, 64, dtype=torch.float32, device=device))
    assert torch.equal(out, reference.embedding(token_ids, table))
    assert torch.equal(out[1:5], torch.zeros(4, 64, device=device)) and torch.equal(out[0], table[3])
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"token_ids holds -1, but the rows of table lie in \[0, 10\)"):
        ops.embedding(token_ids, table)


def test_strided_and_odd_addresses(device):
    wide = torch.randn(20, 3 * 64, device=device, dtype=torch.bfloat16)
    token_ids = torch.tensor([19, 0, 7], device=device)
    target = poisoned(3, 200, dtype=torch.bfloat16, device=device)
    for offset in (64, 1):
        table, out = wide[:, offset : offset + 64], target[:, 100 : 100 + 64]
        ops.embedding(token_ids, table, out=out)
        assert torch.equal(out, table[token_ids])
    assert target[:, :100].isnan().all() and target[:, 164:].isnan().all()


def test_opcheck_and_compile(device):
    token_ids, table = torch.tensor([3, 0], device=device), torch.randn(5, 16, device=device)
    out = torch.empty(2, 16, device=device)
    torch.library.opcheck(torch.ops.fastkernels.embedding.default, (token_ids, table, out))
    compiled = torch.compile(lambda i, t: ops.embedding(i, t) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(token_ids, table), table[token_ids] + 1)


def test_refuses_what_it_does_not_take():
    token_ids, table = torch.tensor([3, 0]), torch.randn(5, 16)
    with pytest.raises(ValueError, match="token_ids is fp32, but the op takes int32, int64"):
        ops.embedding(token_ids.float(), table)
    with pytest.raises(ValueError, match=r"token_ids has shape \[1, 2\], but the op takes \[num_tokens\]"):
        ops.embedding(token_ids[None], table)
    with pytest.raises(ValueError, match="table is float64, but the op takes bf16, fp16, fp32"):
        ops.embedding(token_ids, table.double())
    with pytest.raises(
        ValueError, match=r"table has shape \[80\], but the op takes \[vocab_size, hidden_size\]"
    ):
        ops.embedding(token_ids, table.flatten())
    with pytest.raises(ValueError, match="last dimension of table must be contiguous"):
        ops.embedding(token_ids, table.t())
    with pytest.raises(ValueError, match="token_ids must be contiguous"):
        ops.embedding(torch.arange(4)[::2], table)
    with pytest.raises(ValueError, match="table is on meta, but token_ids is on cpu"):
        ops.embedding(token_ids, table.to("meta"))
    with pytest.raises(ValueError, match="out is fp16, but the op takes fp32"):
        ops.embedding(token_ids, table, out=torch.empty(2, 16).half())
    with pytest.raises(ValueError, match=r"out has shape \[3, 16\], but the op takes \[2, 16\]"):
        ops.embedding(token_ids, table, out=torch.empty(3, 16))
