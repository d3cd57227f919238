"""Likelihoods of whole prompts, many a step: those of the logits of each alone."""

from pathlib import Path

import pytest
import torch

from fastkernels import LLM, SamplingParams
from fastkernels.errors import RequestError
from tests.checkpoints import CASES, make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [2, 3, 17, 40, 64, 100, 128, 129, 5, 33]
FIRSTS = [1, 2, 1, 39, 30, 1, 127, 1, 4, 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("prompts"), CASES["llama-tied"])


def prompts() -> list[list[int]]:
    return [torch.randint(3, 1003, (length,)).tolist() for length in LENGTHS]


@pytest.mark.parametrize(("max_num_tokens", "max_num_seqs"), [(512, 64), (40, 3), (7, 1)])
def test_logprobs_are_those_of_the_logits(folder, device, max_num_tokens, max_num_seqs):
    """One prompt has a token more than the context: its last is never run. With few rows and small steps."""
    given = prompts()
    options = {"device": device.type, "dtype": "fp32", "max_num_seqs": max_num_seqs}
    with LLM(folder, **options, max_num_tokens=max_num_tokens) as llm:
        found = llm.prompt_logprobs(given, FIRSTS)
        assert llm.prompt_logprobs([given[3]])[0].logprobs.shape == (39,)
        for prompt, first, one in zip(given, FIRSTS, found, strict=True):
            logits = llm.logits(prompt[:-1])[first - 1 :]
            targets = torch.tensor(prompt[first:])
            exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            torch.testing.assert_close(one.logprobs, exact, rtol=1e-4, atol=1e-4)
            assert torch.equal(one.greedy, logits.argmax(-1) == targets)
        assert llm.stats.num_output_tokens == 0


def test_greedy_tokens_are_known_as_such(folder):
    with LLM(folder, device="cpu", max_num_seqs=2) as llm:
        (output,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
        (found,) = llm.prompt_logprobs([[5, 6, 7, *output.token_ids]], [3])
        assert found.greedy.tolist() == [True] * 9


def test_it_harms_no_request_that_runs(folder):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(folder, device="cpu", max_num_seqs=3, max_num_tokens=16) as llm:
        alone = llm.generate([5, 6, 7], params)[0].token_ids
        stream = llm.stream([5, 6, 7], params)
        pieces = [next(stream)]
        llm.prompt_logprobs(prompts(), FIRSTS)
        pieces += list(stream)
        assert [token for piece in pieces for token in piece.token_ids] == alone


def test_what_cannot_be_scored(folder):
    with LLM(folder, device="cpu", max_num_seqs=1, max_seq_len=64, kv_cache_bytes=1 << 20) as llm:
        for prompt, first, message in (
            ([4], 1, "logprobs from token 1 of a prompt of 1; it must be one from 1 on"),
            ([4, 5], 0, "logprobs from token 0 of a prompt of 2"),
            ([4, 5, 1003], 1, "has token id 1003; the model takes 0 to 1002"),
            ([4] * 66, 1, "the prompt has 65 tokens; the context takes 64"),
        ):
            with pytest.raises(RequestError, match=message):
                llm.prompt_logprobs([[7, 8, 9], prompt], [1, first])
        stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=12, ignore_eos=True))
        next(stream)
        with pytest.raises(
            RequestError, match=r"logits of 2 tokens need a row and 1 KV pages, and beside the r"
        ):
            llm.prompt_logprobs([[4, 5, 6]])
        stream.close()
        assert len(llm.prompt_logprobs([[4, 5, 6]])[0].logprobs) == 2
