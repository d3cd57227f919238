"""Sampling from vocabularies that several blocks of a GPU share: the CPU's choices are the reference."""

import math

import pytest
import torch

from fastkernels import ops
from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")

PARAMETERS = [
    {},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 511},
    {"top_k": 513, "top_p": 0.99},
    {"top_k": 30000, "top_p": 0.8},
    {"top_k": 128255},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 2.5},
    {"top_p": 1e-9},
    {"min_p": 0.01},
    {"temperature": 0.05, "top_k": 9},
    {"temperature": math.inf, "top_k": 3000, "top_p": 0.5},
    {"temperature": 0.0},
]


def sample(logits, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, first_seed=0):
    num_seqs, device = len(logits), logits.device

    def full(value, dtype):
        return torch.full((num_seqs,), value, dtype=dtype, device=device)

    return ops.sample(
        logits,
        full(temperature, torch.float32),
        full(top_k, torch.int32),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        torch.arange(first_seed, first_seed + num_seqs, device=device) * 7919,
        full(3, torch.int32),
        out_ids=poisoned(num_seqs, dtype=torch.int32, device=device),
        out_logprobs=poisoned(num_seqs, dtype=torch.float32, device=device),
    )


def rows_of(kind: str, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(6, vocab_size, generator=generator)
    if kind == "normal":
        return noise * 3
    if kind == "peaked":
        noise[:, 1234 % vocab_size] = 20.0
        return noise * 2
    if kind == "flat":
        return noise * 1e-4
    if kind == "equal":
        return torch.full((6, vocab_size), 1.5)
    if kind == "coarse":
        return (noise * 2).round() / 2
    rows = noise * 3  # "special"
    rows[0, ::3] = -torch.inf
    rows[1, ::2] = torch.nan
    rows[2, vocab_size // 2 :: 997] = torch.inf
    rows[3] = -torch.inf
    rows[4, 5:] = torch.nan
    return rows


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "equal", "coarse", "special"])
@pytest.mark.parametrize("vocab_size", [1023, 33001, 128256, 262147])
def test_cuda_chooses_as_the_cpu_does(vocab_size, kind, dtype):
    stride = -(-vocab_size // 8) * 8
    rows = torch.zeros(6, stride).to(dtype)
    rows[:, :vocab_size] = rows_of(kind, vocab_size).to(dtype)
    logits, on_cuda = rows[:, :vocab_size], rows.cuda()[:, :vocab_size]
    for parameters in PARAMETERS:
        ids, logprobs = sample(logits, **parameters)
        cuda_ids, cuda_logprobs = sample(on_cuda, **parameters)
        assert torch.equal(ids, cuda_ids.cpu()), parameters
        torch.testing.assert_close(cuda_logprobs.cpu(), logprobs, rtol=1e-6, atol=4e-6)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_a_row_of_a_large_vocabulary_does_not_depend_on_its_batch(parameters, dtype):
    """Batches of 1 to 300 rows split a row over 8 to 2 blocks."""
    logits = (torch.randn(300, 40960, device="cuda") * 3).to(dtype)
    ids, logprobs = sample(logits, **parameters)
    for first, size in ((0, 1), (3, 17), (100, 70), (299, 1)):
        part = sample(logits[first : first + size], first_seed=first, **parameters)
        assert torch.equal(part[0], ids[first : first + size])
        assert torch.equal(part[1], logprobs[first : first + size])
    again = sample(logits, **parameters)
    assert torch.equal(again[0], ids) and torch.equal(again[1], logprobs)


@pytest.mark.parametrize("vocab_size", [128256, 262144])
def test_greedy_takes_the_lowest_of_equal_ids_anywhere(vocab_size, device):
    logits = torch.zeros(8, vocab_size, device=device, dtype=torch.bfloat16)
    at = [0, 1023, 1024, 32767, 32768, vocab_size // 2, vocab_size - 2, vocab_size - 1]
    for row, first in enumerate(at):
        logits[row, first:] = 3.0
        logits[row, first + 1 :: 2] = 2.5
    assert sample(logits, temperature=0.0)[0].tolist() == at
