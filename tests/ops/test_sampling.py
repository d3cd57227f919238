import math

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB_SIZES = [1, 2, 31, 1003, 4096, 128256]


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, steps=0):
    """ops.sample with parameters given once for all rows or as a list with one a row."""
    num_seqs, device = len(logits), logits.device

    def per_row(value, dtype):
        values = value if isinstance(value, list) else [value] * num_seqs
        return torch.tensor(values, dtype=dtype, device=device)

    seeds = per_row(list(range(num_seqs)) if seeds is None else seeds, torch.int64)
    out_ids = poisoned(num_seqs, dtype=torch.int32, device=device)
    out_logprobs = poisoned(num_seqs, dtype=torch.float32, device=device)
    results = ops.sample(
        logits,
        per_row(temperature, torch.float32),
        per_row(top_k, torch.int32),
        per_row(top_p, torch.float32),
        per_row(min_p, torch.float32),
        seeds,
        per_row(steps, torch.int32),
        out_ids=out_ids,
        out_logprobs=out_logprobs,
    )
    assert results[0] is out_ids and results[1] is out_logprobs
    return results


def draw_many(row, count, **parameters):
    """How often each id is drawn from one row with the seeds 0 to count - 1."""
    ids, _ = sample(row.expand(count, -1), **parameters)
    assert ((ids >= 0) & (ids < len(row))).all()
    return torch.bincount(ids.cpu().long(), minlength=len(row))


def chi_square_p_value(observed, probabilities):
    """Cells expecting fewer than 5 are pooled; impossible ones must be empty."""
    assert observed[probabilities == 0].sum() == 0, "a token outside the distribution was drawn"
    expected = probabilities.double() * observed.sum()
    small = (expected < 5) & (expected > 0)
    cells = torch.cat([expected[expected >= 5], expected[small].sum()[None]])
    seen = torch.cat([observed[expected >= 5].double(), observed[small].sum()[None].double()])
    seen, cells = seen[cells > 0], cells[cells > 0]
    if len(cells) == 1:  # nothing to compare
        return 1.0
    statistic = ((seen - cells) ** 2 / cells).sum()
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_and_logprobs(vocab_size, dtype, device):
    logits = (torch.randn(3, vocab_size, device=device) * 4).to(dtype)
    ids, logprobs = sample(logits, temperature=[0.0, -1.0, math.nan])
    exact = logits.double()
    lowest_of_largest = (exact == exact.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(ids.long(), lowest_of_largest)
    expected = exact.log_softmax(-1).gather(-1, ids.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=3e-6)
    again, again_logprobs = sample(logits, temperature=0.0)
    assert torch.equal(ids, again) and torch.equal(logprobs, again_logprobs), "two runs differ"


def test_greedy_ties_take_the_lowest_id(device):
    logits = torch.zeros(4, 5000, device=device)
    logits[1, [17, 4000, 4999]] = 2.0
    logits[2] = -0.0
    logits[2, 3] = 0.0  # -0 and +0 are equal
    logits[3, 2048:] = torch.inf
    ids, logprobs = sample(logits, temperature=0.0)
    assert ids.tolist() == [0, 17, 0, 2048]
    assert logprobs[3].item() == pytest.approx(-math.log(5000 - 2048), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1003, 4096, 128256])
def test_logprob_of_a_drawn_token_is_at_temperature_one(vocab_size, dtype, device):
    logits = (torch.randn(4, vocab_size, device=device) * 3).to(dtype)
    ids, logprobs = sample(
        logits, temperature=[0.5, 1.0, 1.7, 3.0], top_k=[0, 50, 0, 9], top_p=[0.9, 1.0, 1.0, 0.5]
    )
    expected = logits.double().log_softmax(-1).gather(-1, ids.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=3e-6)


FILTERS = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 7},
    {"top_k": 40, "top_p": 0.7},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.6, "temperature": 1.8},
    {"top_p": 0.8, "min_p": 0.3, "temperature": 0.6},
    {"top_p": 0.0},
    {"top_k": 1 << 30, "top_p": 2.0, "min_p": -1.0},
    {"top_k": -3, "top_p": math.nan, "min_p": math.nan},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", ["coarse", "fine"])
def test_distribution(spread, filters, dtype, device):
    """Nothing outside the exact set is drawn, every likely token is, and as often as it should be."""
    logits = torch.randn(257) * 1.5
    if spread == "coarse":  # many ties, at the edges of top-k and top-p too
        logits = (logits * 2).round() / 2
    row = logits.to(dtype)
    exact = reference.token_probabilities(
        row.double(), **{"temperature": 1.0} | {k: v for k, v in filters.items() if not math.isnan(v)}
    )
    draws = 6000
    counts = draw_many(row.to(device), draws, **filters)
    missing = (counts == 0) & (exact * draws > 25)  # each has a chance of e^-25
    assert not missing.any(), f"never drawn: {missing.nonzero().flatten().tolist()}"
    assert chi_square_p_value(counts, exact) > 1e-3


def test_chi_square_catches_a_wrong_distribution():
    """The bound fails a temperature that is 10 % off and a set that is one token short."""
    row = torch.randn(257) * 1.5
    exact = reference.token_probabilities(row.double(), 1.0, top_k=40)
    assert chi_square_p_value(draw_many(row, 6000, temperature=1.1, top_k=40), exact) < 1e-3
    assert chi_square_p_value(draw_many(row, 6000, top_k=39), exact) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_set_in_a_large_vocabulary(dtype, device):
    """A flat top, so that every token of the set is drawn; the edges lie inside runs of ties."""
    generator = torch.Generator().manual_seed(1)
    row = torch.rand(128256, generator=generator) * 4 - 12
    top = torch.randperm(128256, generator=generator)[:24]
    row[top] = 3.0 + (torch.arange(24) // 10) * 0.25  # 10, 10 and 4 equal logits
    row = row.to(dtype)
    for filters in ({"top_k": 17}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7, "min_p": 0.7}):
        exact = reference.token_probabilities(row.double(), 1.0, **filters)
        counts = draw_many(row.to(device), 250, **filters)
        assert torch.equal(counts > 0, exact > 0), filters


def test_all_equal_logits(device):
    row = torch.full((1003,), -2.5, device=device)
    counts = draw_many(row, 3000, top_k=100, top_p=0.5)
    assert torch.equal(counts.nonzero().flatten(), torch.arange(50))
    counts = draw_many(row, 20000)
    assert chi_square_p_value(counts, torch.full((1003,), 1 / 1003)) > 1e-3


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_tiny_vocabularies(vocab_size, device):
    row = torch.tensor([0.3, 1.1])[:vocab_size]
    counts = draw_many(row.to(device), 4000, top_p=0.9999)
    assert chi_square_p_value(counts, row.double().softmax(-1)) > 1e-3 or vocab_size == 1
    assert counts.sum() == 4000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype, device):
    logits = (torch.randn(9, 4099, device=device) * 2).to(dtype)
    parameters = {
        "temperature": [0.0, 0.7, 1.0, 1.3, 1.0, 2.0, 0.0, 1.0, 0.9],
        "top_k": [0, 50, 0, 5, 3000, 0, 7, 0, 1],
        "top_p": [1.0, 0.9, 0.5, 1.0, 0.99, 1.0, 0.1, 1.0, 0.9],
        "min_p": [0.0, 0.0, 0.0, 0.1, 0.0, 0.02, 0.0, 0.0, 0.0],
        "seeds": [5, 1 << 40, -3, 4, 5, 6, 7, 8, 9],
        "steps": [0, 1, 2, 3, 70000, 5, 6, 7, 8],
    }
    ids, logprobs = sample(logits, **parameters)
    for i in range(9):
        alone = sample(logits[i : i + 1], **{name: values[i : i + 1] for name, values in parameters.items()})
        assert (ids[i], logprobs[i]) == (alone[0][0], alone[1][0])
    backwards = sample(logits.flip(0), **{name: values[::-1] for name, values in parameters.items()})
    assert torch.equal(backwards[0].flip(0), ids) and torch.equal(backwards[1].flip(0), logprobs)


def test_seed_and_step_both_change_the_draw(device):
    row = torch.zeros(1, 4096, device=device)
    by_step = {sample(row, seeds=3, steps=step)[0].item() for step in range(20)}
    by_seed = {sample(row, seeds=seed << 32, steps=3)[0].item() for seed in range(20)}
    assert len(by_step) > 15 and len(by_seed) > 15
    assert sample(row, seeds=3, steps=4)[0].item() == sample(row, seeds=3, steps=4)[0].item()


def test_successive_steps_of_one_seed_follow_the_distribution(device):
    row = (torch.randn(64) * 1.5).to(device)
    ids, _ = sample(row.expand(8000, -1), seeds=1234, steps=list(range(8000)))
    assert (
        chi_square_p_value(torch.bincount(ids.cpu().long(), minlength=64), row.cpu().double().softmax(-1))
        > 1e-3
    )


def test_known_draws(device):
    """A seed gives the same text from release to release and on any device."""
    logits = torch.arange(1000, dtype=torch.float32, device=device).sin()[None].expand(6, -1)
    ids, _ = sample(logits, seeds=[0, 1, 2, 0, 1, -1], steps=[0, 0, 0, 1, 1, 12345])
    assert ids.tolist() == KNOWN_DRAWS


KNOWN_DRAWS = [398, 888, 423, 970, 670, 523]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(dtype, device):
    wide = (torch.randn(5, 3 * 1100, device=device) * 2).to(dtype)
    for first in (0, 8, 1, 13):
        rows = wide[::2, first : first + 1003]
        dense = rows.contiguous()
        for top_p in (1.0, 0.8):
            strided, plain = sample(rows, top_p=top_p), sample(dense, top_p=top_p)
            assert torch.equal(strided[0], plain[0])
            torch.testing.assert_close(strided[1], plain[1], rtol=0, atol=3e-6)


def test_rows_of_inf_and_nan(device):
    vocab_size = 2050
    logits = torch.full((6, vocab_size), -torch.inf, device=device)
    logits[1] = torch.nan
    logits[2, 1234] = -3.0
    logits[3] = torch.nan
    logits[3, 77] = 1.0
    logits[4, [5, 2049]] = torch.inf
    logits[5] = torch.randn(vocab_size)
    logits[5, ::2] = torch.nan
    for parameters in (
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ):
        ids, logprobs = sample(logits, **parameters)
        assert ids[:4].tolist() == [0, 0, 1234, 77]
        assert logprobs[:4].tolist() == [-torch.inf, -torch.inf, 0.0, 0.0]
        assert ids[4].item() in (5, 2049) and logprobs[4].item() == pytest.approx(-math.log(2))
        assert ids[5].item() % 2 == 1
    forbidden = draw_many(logits[5], 2000)
    assert forbidden[::2].sum() == 0


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-38, 1e-44])
def test_a_tiny_temperature_is_greedy(temperature, device):
    logits = torch.randn(8, 1003, device=device) * 5
    for filters in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}):
        assert torch.equal(sample(logits, temperature=temperature, **filters)[0].long(), logits.argmax(-1))


def test_an_infinite_temperature_is_uniform_over_what_is_possible(device):
    row = torch.randn(40)
    row[20:] = -torch.inf
    counts = draw_many(row.to(device), 4000, temperature=torch.inf)
    assert chi_square_p_value(counts, (row > -torch.inf).double() / 20) > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_and_cuda_choose_the_same(dtype):
    logits = (torch.randn(200, 5003) * 2).to(dtype)
    for parameters in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 700, "top_p": 0.95, "min_p": 0.01}):
        on_cpu, on_cuda = sample(logits, 0.8, **parameters), sample(logits.cuda(), 0.8, **parameters)
        assert torch.equal(on_cpu[0], on_cuda[0].cpu())


# --- penalties ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 1003, 4096, 40000])
def test_penalize(vocab_size, dtype, device):
    num_slots, slots = 7, [3, -1, 0, 6, 7, 3]
    wide = (torch.randn(len(slots), vocab_size + 5) * 3).to(dtype).to(device)
    in_prompt = torch.rand(num_slots, vocab_size) < 0.3
    output_counts = (torch.rand(num_slots, vocab_size) * 1.6).int() * torch.randint(
        1, 5, (num_slots, vocab_size)
    )
    token_counts = (output_counts + in_prompt * ops.IN_PROMPT).int().to(device)
    repetition = torch.tensor([1.3, 1.3, 0.8, 1.0, 2.0, 1.0])
    presence = torch.tensor([0.5, 0.5, 0.0, -1.5, 1.0, 0.0])
    frequency = torch.tensor([0.25, 0.5, -0.3, 0.7, 1.0, 0.0])
    before = wide.clone()
    logits = wide[:, :vocab_size]
    result = ops.penalize(
        logits,
        token_counts,
        torch.tensor(slots, dtype=torch.int32, device=device),
        *(x.to(device) for x in (repetition, presence, frequency)),
    )
    assert result is logits
    penalised = [0, 2, 3]  # the others have no slot or no penalty
    rows = [slots[i] for i in penalised]
    exact = reference.penalize(
        before[penalised, :vocab_size].double().cpu(),
        in_prompt[rows],
        output_counts[rows],
        *(x[penalised].double() for x in (repetition, presence, frequency)),
    )
    # Computed in fp32 and rounded once: as the exact result rounded, but for ties of rounding.
    expected, actual = exact.to(dtype), logits[penalised].cpu()
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
    others = [1, 4, 5]
    assert torch.equal(wide[others], before[others]) and torch.equal(
        wide[:, vocab_size:], before[:, vocab_size:]
    )


def test_count_tokens(device):
    token_counts = torch.zeros(4, 10, dtype=torch.int32, device=device)
    token_counts[2, 9] = ops.IN_PROMPT + 2
    token_ids = torch.tensor([3, 9, 3, -1, 10, 5, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 2, 0, 1, 1, -1, 4], dtype=torch.int32, device=device)
    assert ops.count_tokens(token_ids, slots, token_counts) is token_counts
    expected = torch.zeros(4, 10, dtype=torch.int32)
    expected[0, 3], expected[2, 9] = 2, ops.IN_PROMPT + 3
    assert torch.equal(token_counts.cpu(), expected)


def test_top_logprobs(device):
    logits = torch.randn(5, 1003, device=device).bfloat16()
    logits[:, 100:] -= 20
    ids, logprobs = ops.top_logprobs(logits, 7)
    exact = logits.double().log_softmax(-1)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(logprobs.double(), exact.topk(7).values, rtol=0, atol=3e-6)
    torch.testing.assert_close(exact.gather(-1, ids.long()), exact.topk(7).values, rtol=0, atol=0)


# --- dispatcher, compilation, errors ------------------------------------------------------------------------


def arguments(device="cpu", num_seqs=3, vocab_size=64):
    return {
        "logits": torch.randn(num_seqs, vocab_size, device=device),
        "temperature": torch.ones(num_seqs, device=device),
        "top_k": torch.full((num_seqs,), 9, dtype=torch.int32, device=device),
        "top_p": torch.full((num_seqs,), 0.9, device=device),
        "min_p": torch.zeros(num_seqs, device=device),
        "seeds": torch.arange(num_seqs, device=device),
        "steps": torch.zeros(num_seqs, dtype=torch.int32, device=device),
    }


def penalty_arguments(device="cpu"):
    ones = torch.ones(3, device=device)
    counts = torch.ones(2, 64, dtype=torch.int32, device=device)
    slots = torch.zeros(3, dtype=torch.int32, device=device)
    return torch.randn(3, 64, device=device), counts, slots, ones * 1.2, ones, ones


def test_opcheck_and_compile(device):
    given = arguments(device)
    ids = torch.empty(3, dtype=torch.int32, device=device)
    logprobs = torch.empty(3, device=device)
    torch.library.opcheck(torch.ops.fastkernels.sample.default, (*given.values(), ids, logprobs))
    penalties = penalty_arguments(device)
    torch.library.opcheck(torch.ops.fastkernels.penalize.default, penalties)
    torch.library.opcheck(
        torch.ops.fastkernels.count_tokens.default, (ids.fill_(4), penalties[2], penalties[1])
    )

    def next_token(logits, counts, slots, repetition, presence, frequency):
        ids, logprobs = ops.sample(
            ops.penalize(logits.clone(), counts, slots, repetition, presence, frequency), **rest
        )
        return ids, logprobs, ops.count_tokens(ids, slots, counts.clone())

    rest = {name: x for name, x in given.items() if name != "logits"}
    compiled = torch.compile(next_token, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(*penalties), next_token(*penalties), strict=True):
        assert torch.equal(result, expected)


def test_empty_batch(device):
    ids, logprobs = ops.sample(**arguments(device, num_seqs=0))
    assert ids.shape == logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(3, 64).double()}, "logits is float64, but the op takes bf16, fp16, fp32"),
        ({"logits": torch.randn(64)}, r"logits has shape \[64\], but the op takes \[num_seqs, vocab_size\]"),
        ({"logits": torch.randn(64, 3).t()}, "last dimension of logits must be contiguous"),
        ({"logits": torch.empty(3, 0)}, "vocab_size is 0, but the op takes 1 to 4194304"),
        ({"temperature": torch.ones(3).double()}, "temperature is float64, but the op takes fp32"),
        ({"top_k": torch.ones(3, dtype=torch.int64)}, "top_k is int64, but the op takes int32"),
        ({"top_p": torch.ones(4)}, r"top_p has shape \[4\], but the op takes \[num_seqs\], here \[3\]"),
        ({"min_p": torch.ones(6)[::2]}, "last dimension of min_p must be contiguous"),
        ({"seeds": torch.ones(3, dtype=torch.int32)}, "seeds is int32, but the op takes int64"),
        (
            {"steps": torch.ones(3, dtype=torch.int32, device="meta")},
            "steps is on meta, but logits is on cpu",
        ),
        ({"steps": 3}, "expected a tensor or an array that speaks DLPack, got int"),
        ({"out_ids": torch.ones(3, dtype=torch.int64)}, "out_ids is int64, but the op takes int32"),
        ({"out_logprobs": torch.ones(2)}, r"out_logprobs has shape \[2\]"),
    ],
)
def test_sample_refuses_what_it_does_not_take(change, message):
    with pytest.raises(ValueError, match=message):
        ops.sample(**arguments() | change)


def test_penalties_refuse_what_they_do_not_take():
    logits, counts, slots, repetition, presence, frequency = penalty_arguments()
    with pytest.raises(
        ValueError, match=r"token_counts has shape \[2, 63\], but the op takes \[num_slots, vocab_size\]"
    ):
        ops.penalize(logits, counts[:, :63], slots, repetition, presence, frequency)
    with pytest.raises(ValueError, match="token_counts is int64, but the op takes int32"):
        ops.penalize(logits, counts.long(), slots, repetition, presence, frequency)
    with pytest.raises(ValueError, match="token_counts must be contiguous"):
        ops.count_tokens(slots, slots, counts[:, ::2])
    with pytest.raises(ValueError, match=r"repetition has shape \[2\]"):
        ops.penalize(logits, counts, slots, repetition[:2], presence, frequency)
    with pytest.raises(ValueError, match="token_ids is int64, but the op takes int32"):
        ops.count_tokens(slots.long(), slots, counts)
    with pytest.raises(ValueError, match=r"token_ids has shape \[3, 1\], but the op takes \[num_seqs\]"):
        ops.count_tokens(slots[:, None], slots, counts)
    with pytest.raises(ValueError, match=r"slots has shape \[2\]"):
        ops.count_tokens(slots, slots[:2], counts)
    with pytest.raises(ValueError, match="presence is on meta, but logits is on cpu"):
        ops.penalize(logits, counts, slots, repetition, presence.to("meta"), frequency)


def test_top_logprobs_refuses_what_it_does_not_take():
    with pytest.raises(ValueError, match=r"k is 65, but the op takes 1 to vocab_size \(64\)"):
        ops.top_logprobs(torch.randn(3, 64), 65)
    with pytest.raises(ValueError, match="k is 0, but the op takes 1"):
        ops.top_logprobs(torch.randn(3, 64), 0)
