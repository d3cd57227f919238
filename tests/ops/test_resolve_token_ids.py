import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import poisoned


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 127, 128, 129, 8192])
def test_matches_reference(num_tokens, device):
    sampled = torch.randint(50000, (65,), device=device, dtype=torch.int32)
    token_ids = torch.randint(-65, 65, (num_tokens,), device=device, dtype=torch.int32)
    out = poisoned(num_tokens, dtype=torch.int32, device=device)
    assert ops.resolve_token_ids(token_ids, sampled, out=out) is out
    assert torch.equal(out, reference.resolve_token_ids(token_ids, sampled))
    assert torch.equal(out, ops.resolve_token_ids(token_ids, sampled)), "two runs differ"
    assert ops.resolve_token_ids(token_ids, sampled, out=token_ids) is token_ids
    assert torch.equal(token_ids, out)


def test_by_hand_and_past_sampled(device, monkeypatch):
    monkeypatch.delenv("FASTKERNELS_DEBUG", raising=False)
    sampled = torch.tensor([100, 200], device=device, dtype=torch.int32)
    token_ids = torch.tensor([5, -1, -2, -3, 0, -(2**31)], device=device, dtype=torch.int32)
    assert ops.resolve_token_ids(token_ids, sampled).tolist() == [5, 100, 200, -1, 0, -1]
    assert reference.resolve_token_ids(token_ids, sampled).tolist() == [5, 100, 200, -1, 0, -1]
    monkeypatch.setenv("FASTKERNELS_DEBUG", "1")
    with pytest.raises(
        ValueError, match="token_ids holds -3, but token ids and references to sampled lie in"
    ):
        ops.resolve_token_ids(token_ids, sampled)


def test_opcheck_and_compile(device):
    sampled = torch.tensor([100, 200], device=device, dtype=torch.int32)
    token_ids = torch.tensor([5, -1, -2], device=device, dtype=torch.int32)
    args = (token_ids, sampled, torch.empty_like(token_ids))
    torch.library.opcheck(torch.ops.fastkernels.resolve_token_ids.default, args)
    compiled = torch.compile(
        lambda i, s: ops.resolve_token_ids(i, s) + 1, fullgraph=True, backend="aot_eager"
    )
    assert compiled(token_ids, sampled).tolist() == [6, 101, 201]


def test_refuses_what_it_does_not_take():
    token_ids, sampled = torch.tensor([5, -1], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="token_ids is int64, but the op takes int32"):
        ops.resolve_token_ids(token_ids.long(), sampled)
    with pytest.raises(ValueError, match="sampled is fp32, but the op takes int32"):
        ops.resolve_token_ids(token_ids, sampled.float())
    with pytest.raises(ValueError, match=r"sampled has shape \[2, 2\], but the op takes one dimension"):
        ops.resolve_token_ids(token_ids, sampled.view(2, 2))
    with pytest.raises(ValueError, match="sampled must be contiguous"):
        ops.resolve_token_ids(token_ids, sampled[::2])
    with pytest.raises(ValueError, match=r"out has shape \[4\], but the op takes the shape of token_ids"):
        ops.resolve_token_ids(token_ids, sampled, out=sampled)
    with pytest.raises(ValueError, match="sampled is on meta, but token_ids is on cpu"):
        ops.resolve_token_ids(token_ids, sampled.to("meta"))
