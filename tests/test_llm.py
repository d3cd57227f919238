"""LLM end to end, against transformers and against itself."""

import functools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastkernels
from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import ChatTemplateError
from fastkernels.compiler import EngineMemoryError
from fastkernels.config import ConfigError
from fastkernels.errors import DeviceError, EngineClosedError, ModelNotFoundError, RequestError
from tests.checkpoints import CASES, make_checkpoint, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 1003
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * num_tokens + seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llm"), "qwen2")


@pytest.fixture(scope="module")
def llm(folder: Path):
    with LLM(folder, device="cpu", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo():
    with LLM("demo", device="cpu", max_num_seqs=4) as llm:
        yield llm


# --- the same as transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_is_transformers(case: str, tmp_path: Path) -> None:
    reference = make_model(case)
    reference.generation_config.eos_token_id = None  # 64 tokens, whatever they are
    prompts = [prompt_of(1), prompt_of(17), prompt_of(40)]
    with LLM(make_checkpoint(tmp_path, case), device="cpu", max_num_seqs=4, max_num_tokens=32) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        logits = llm.logits(prompts[2])
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        assert output.token_ids == expected[0, len(prompt) :].tolist()
    with torch.no_grad():
        exact = reference(torch.tensor([prompts[2]])).logits[0]
    assert logits.shape == exact.shape and logits.dtype == torch.float32
    assert (logits - exact).abs().max() <= 2e-4 * exact.abs().max()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_logits_in_half_precision_are_as_good_as_transformers(
    case: str, dtype: str, device: torch.device, tmp_path: Path
) -> None:
    """At most twice the error of transformers in that dtype; both against its fp32, on the same weights."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    folder = make_checkpoint(tmp_path, case, dtype=torch_dtype)
    prompt = prompt_of(40)

    def transformers_logits(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            return model.to(device)(torch.tensor([prompt], device=device)).logits[0].float().cpu()

    exact = transformers_logits(torch.device("cpu"), torch.float32)
    plain = transformers_logits(device, torch_dtype)
    with LLM(folder, device=device.type, dtype=dtype, max_num_seqs=4) as llm:
        logits = llm.logits(prompt)
    assert (logits - exact).norm() <= 2 * (plain - exact).norm()


def test_stop_tokens_of_the_checkpoint_end_the_output(folder: Path, llm: LLM) -> None:
    free = llm.generate(prompt_of(5), SamplingParams(max_tokens=60, ignore_eos=True))[0]
    stop = free.token_ids[20]
    output = llm.generate(
        prompt_of(5), SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
    )[0]
    assert output.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert output.finish_reason == "stop"


# --- batching changes nothing -----------------------------------------------------------------------------


MIXED = [prompt_of(n) for n in (1, 2, 3, 5, 8, 13, 16, 17, 21, 31, 32, 33, 47, 64, 65, 90, 100)]
PAGE_BYTES = 3 * 2 * 2 * 16 * 80 * 4  # layers, K and V, heads, tokens, head size, fp32


@pytest.fixture(scope="module")
def alone(folder: Path):
    """What each of MIXED gives alone, on a device."""

    @functools.cache
    def on(device: str) -> list[list[int]]:
        with LLM(folder, device=device, dtype="fp32", max_num_seqs=1) as llm:
            return [llm.generate(prompt, GREEDY)[0].token_ids for prompt in MIXED]

    return on


@pytest.mark.parametrize("preempting", [False, True])
@pytest.mark.parametrize("max_num_tokens", [7, 64, 512])
def test_every_prompt_gives_what_it_gives_alone(folder, alone, device, max_num_tokens, preempting) -> None:
    cache = {"kv_cache_bytes": 14 * PAGE_BYTES} if preempting else {}
    sizes = {"max_num_seqs": 17, "max_num_tokens": max_num_tokens, **cache}
    with LLM(folder, device=device.type, dtype="fp32", **sizes) as llm:
        outputs = llm.generate(MIXED, GREEDY)
        assert (llm.stats.num_preemptions > 0) == preempting
        assert (llm.stats.num_replays > 0) == (device.type == "cuda")
    assert [output.token_ids for output in outputs] == alone(device.type)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    alone = llm.generate(prompt_of(9), params)[0].token_ids
    together = llm.generate([prompt_of(20), prompt_of(9), prompt_of(33)], params)[1].token_ids
    other = llm.generate(
        prompt_of(9), SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, ignore_eos=True)
    )
    assert alone == together != other[0].token_ids


def test_logits_do_not_depend_on_chunks_or_what_runs(folder: Path, llm: LLM) -> None:
    whole = llm.logits(prompt_of(60))
    stream = llm.stream(prompt_of(12), GREEDY)
    first = next(stream)
    beside = llm.logits(prompt_of(60))
    rest = [token for piece in stream for token in piece.token_ids]
    assert first.token_ids + rest == llm.generate(prompt_of(12), GREEDY)[0].token_ids
    torch.testing.assert_close(beside, whole, rtol=0, atol=0)
    with LLM(folder, device="cpu", max_num_seqs=3, max_num_tokens=11) as chunked:
        torch.testing.assert_close(chunked.logits(prompt_of(60)), whole, rtol=1e-5, atol=1e-5)


# --- text, streams, chats ---------------------------------------------------------------------------------


def test_streamed_pieces_make_up_the_text(demo: LLM) -> None:
    prompts, params = ["def fibonacci(n):", "class Queue:"], SamplingParams(max_tokens=30, ignore_eos=True)
    outputs = demo.generate(prompts, params)
    texts, tokens, last = ["", ""], [[], []], [None, None]
    for piece in demo.stream(prompts, params):
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.token_ids
        last[piece.index] = piece.output or last[piece.index]
    for index, output in enumerate(outputs):
        assert texts[index] == output.text == last[index].text != ""
        assert tokens[index] == output.token_ids == last[index].token_ids
        assert output.prompt_token_ids == demo.tokenizer.encode(prompts[index])
        assert output.timings.ttft_ms > 0 and output.timings.tokens_per_s > 0


def test_a_stop_text_cuts_the_output_and_is_never_streamed(demo: LLM) -> None:
    free = demo.generate("def fibonacci(n):", SamplingParams(max_tokens=40))[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 6]
    params = SamplingParams(max_tokens=40, stop=(stop,))
    output = demo.generate("def fibonacci(n):", params)[0]
    assert output.text == free[: free.index(stop)] and output.finish_reason == "stop"
    assert "".join(piece.text for piece in demo.stream("def fibonacci(n):", params)) == output.text


def test_streams_run_beside_each_other(demo: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [demo.generate(prompt, params)[0].text for prompt in ("import os", "return self")]
    first, second = demo.stream("import os", params), demo.stream("return self", params)
    texts = ["", ""]
    for _ in range(5):
        texts[0] += next(first).text
        texts[1] += next(second).text
    texts[1] += "".join(piece.text for piece in second)
    texts[0] += "".join(piece.text for piece in first)
    assert texts == expected


def test_closing_a_stream_aborts_its_request(demo: LLM) -> None:
    stream = demo.stream("import os", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert not demo._engine.has_work and demo._engine.kv_cache.num_used == 0


def test_a_stream_that_is_never_read_queues_nothing(demo: LLM) -> None:
    demo.stream("import os")
    assert not demo._engine.has_work


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    output = llm.generate(prompt_of(6), SamplingParams(max_tokens=4, logprobs=3, ignore_eos=True))[0]
    exact = llm.logits(output.prompt_token_ids + output.token_ids)[5:9].log_softmax(-1)
    for entry, token, row in zip(output.logprobs, output.token_ids, exact, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_parameters_one_each(llm: LLM) -> None:
    outputs = llm.generate(
        [prompt_of(4), prompt_of(4)],
        [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5, ignore_eos=True)],
    )
    assert len(outputs[0].token_ids) <= 3 and len(outputs[1].token_ids) == 5


def test_random_weights_at_a_checkpoints_shapes(folder: Path) -> None:
    with LLM(folder, device="cpu", random_weights=True, max_num_seqs=1) as llm:
        output = llm.generate(prompt_of(4), GREEDY)[0]
    assert len(output.token_ids) == 24 and output.text == ""


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty; it must have at least one character"),
        ("x = 1\n" * 2000, r"the prompt has \d+ tokens; the context takes 2048"),
        ([1, 4096], "the prompt has token id 4096; the model takes 0 to 4095"),
        ([-1, 3], "the prompt has token id -1; the model takes 0 to 4095"),
        ([], "there is no prompt; give at least one"),
        ([[]], "the prompt is empty"),
        (["import os", ""], "prompt 1: the prompt is empty"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_bad_prompt_is_refused_and_harms_nobody(demo: LLM, prompt, sentence) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = demo.generate("import os", params)[0].text
    stream = demo.stream("import os", params)
    text = next(stream).text
    with pytest.raises(RequestError, match=sentence):
        demo.generate(prompt)
    assert text + "".join(piece.text for piece in stream) == expected


def test_text_needs_a_tokenizer(llm: LLM) -> None:
    with pytest.raises(RequestError, match="has no tokenizer; give token ids"):
        llm.generate("text")
    with pytest.raises(RequestError, match="stop texts need a tokenizer"):
        llm.generate([1, 2], SamplingParams(stop=("x",)))


def test_chats_need_a_template(demo: LLM) -> None:
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        demo.chat([{"role": "user", "content": "hello"}])


def test_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="there are 2 prompts and 1 SamplingParams"):
        llm.generate([[1], [2]], [SamplingParams()])


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"there is no model '.*nowhere': give a checkpoint folder, 'demo'"
    ):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="names the shapes of a model, not a checkpoint"):
        LLM("llama-3.1-8b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="torch sees no CUDA GPU; use cpu or auto"):
        LLM("demo", device="cuda")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size is 3; it must be a power of two"):
        LLM("demo", page_size=3)
    with pytest.raises(TypeError, match="batch_size"):
        LLM("demo", batch_size=3)


def test_a_cache_that_does_not_fit_is_refused_with_the_arithmetic(folder: Path) -> None:
    with pytest.raises(
        EngineMemoryError, match=r"one sequence of 128 tokens takes 8 pages x 60.00 KiB = 480.00 KiB"
    ):
        LLM(folder, device="cpu", max_seq_len=128, kv_cache_bytes=300_000)
    with pytest.raises(
        EngineMemoryError, match=r"kv_cache_bytes asks for 8.00 TiB, and .* are available on cpu"
    ):
        LLM(folder, device="cpu", kv_cache_bytes=1 << 43)
    with LLM(folder, device="cpu", kv_cache_bytes=300_000) as llm:  # nothing asked for: the context shrinks
        assert llm.num_pages == 4 and llm.max_seq_len == 64
        with pytest.raises(RequestError, match="the context takes 64"):
            llm.generate(prompt_of(64))


def test_the_model_cannot_be_stretched(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 129; the model's context has 128 tokens"):
        LLM(folder, device="cpu", max_seq_len=129)


def test_a_closed_llm_says_so(folder: Path) -> None:
    llm = LLM(folder, device="cpu", max_num_seqs=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="the LLM is closed"):
        llm.generate([1, 2])


def test_importing_the_package_does_not_import_the_engine() -> None:
    import subprocess
    import sys

    code = "import sys, fastkernels; print([m for m in sys.modules if 'runtime' in m and 'fastkernels' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastkernels.nothing
