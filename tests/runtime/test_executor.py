"""The executor against the plain model definition: chunks, decode, batches, any pass switched off."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.checkpoint.weights import load_weights as load_definition
from fastkernels.compiler import PASSES, compile_model
from fastkernels.models import build
from fastkernels.runtime.executor import Executor
from fastkernels.runtime.weights import load_weights, random_weights
from tests.checkpoints import MAX_POSITION, SIZES, make_checkpoint
from tests.compiler.configs import CONFIGS
from tests.conftest import CUDA_REASON

# Issue 2's bound: max abs error <= this x max abs logit, in fp32.
LOGITS_TOLERANCE = 2e-4
# The same sums in another order, in fp32.
PASS_TOLERANCE = 1e-5

CASES = ["llama-tied", "llama-biased", "llama-yarn", "mistral", "qwen2-window", "qwen3", "qwen3-window"]
MAX_NUM_TOKENS, MAX_NUM_SEQS, PAGE_SIZE, NUM_PAGES = 48, 4, 8, 64
PROMPT_LEN = 45


class Model:
    """A checkpoint, and the logits its plain definition gives for one prompt."""

    def __init__(self, folder: Path, case: str) -> None:
        self.checkpoint = Checkpoint(make_checkpoint(folder, case))
        with torch.device("meta"):
            definition = build(self.checkpoint.config)
        self.definition = load_definition(definition, self.checkpoint, dtype=torch.float32)
        self.definition.build_table(MAX_POSITION)
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(0, SIZES["vocab_size"], (PROMPT_LEN,), generator=generator)
        self.logits = self.logits_of(self.prompt)

    def logits_of(self, token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.definition(token_ids, torch.arange(len(token_ids)))

    def executor(self, device: torch.device | str = "cpu", disabled_passes: tuple[str, ...] = ()) -> Executor:
        plan = compile_model(self.checkpoint.config, disabled_passes=disabled_passes)
        return Executor(
            plan,
            load_weights(plan, self.checkpoint, device=_indexed(device), dtype=torch.float32),
            device=device,
            dtype=torch.float32,
            max_num_tokens=MAX_NUM_TOKENS,
            max_num_seqs=MAX_NUM_SEQS,
            max_seq_len=MAX_POSITION,
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
        )


def _indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("executor"), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("executor"), "qwen3")


@pytest.fixture
def executor(model: Model, device: torch.device) -> Iterator[Executor]:
    executor = model.executor(device)
    yield executor
    executor.close()


# Pages of sequence row r: out of order, and no two rows share one.
PAGES = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2)).view(MAX_NUM_SEQS, -1)


def fill(executor: Executor, chunks: dict[int, tuple[Tensor, int]], padding: int = 0) -> tuple[int, int]:
    """Packs a step: row -> (its tokens, how many came before). Asks for logits of each chunk's last token.

    Returns num_tokens with the padding, and num_logits.
    """
    executor.inputs.advance()
    host = executor.inputs.host
    host.seq_lens.fill(0)
    host.logits_indices.fill(0)
    host.page_table[:, : PAGES.shape[1]] = PAGES.numpy()
    end = num_logits = 0
    for row in range(MAX_NUM_SEQS):
        host.cu_seqlens_q[row] = end
        if row in chunks:
            tokens, past = chunks[row]
            positions = torch.arange(past, past + len(tokens))
            rows = slice(end, end + len(tokens))
            host.token_ids[rows] = tokens.numpy()
            host.positions[rows] = positions.numpy()
            host.slot_mapping[rows] = (
                PAGES[row][positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            ).numpy()
            host.seq_lens[row] = past + len(tokens)
            end += len(tokens)
            host.logits_indices[num_logits] = end - 1
            num_logits += 1
    host.cu_seqlens_q[MAX_NUM_SEQS] = end
    padded = slice(end, end + padding)
    host.token_ids[padded], host.positions[padded], host.slot_mapping[padded] = 0, 0, -1
    executor.inputs.upload(executor.inputs.max_pages_per_seq)
    return end + padding, num_logits


def step(executor: Executor, chunks: dict[int, tuple[Tensor, int]], padding: int = 0) -> Tensor:
    return executor.run(*fill(executor, chunks, padding)).cpu().clone()


def assert_close(found: Tensor, expected: Tensor, scale: Tensor, tolerance: float = LOGITS_TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found - expected).abs().max() / scale.abs().max()
    assert error <= tolerance, f"max abs error is {error:.3g} x max abs logit, the limit {tolerance}"


@pytest.mark.parametrize("cuts", [[], [7, 23], [40, 41, 42, 43, 44]], ids=["whole", "chunks", "decode"])
def test_logits_of_a_prompt(model, executor, cuts):
    """However the prompt is cut, the last token of every chunk has the definition's logits."""
    bounds = [0, *cuts, PROMPT_LEN]
    for begin, end in pairwise(bounds):
        logits = step(executor, {0: (model.prompt[begin:end], begin)})
        assert_close(logits, model.logits[end - 1 : end], model.logits)


def test_logits_of_every_token(model, executor):
    """One body, then the head in pieces of max_num_seqs rows."""
    num_tokens, _ = fill(executor, {0: (model.prompt, 0)})
    executor.run_body(num_tokens)
    pieces = []
    for begin in range(0, PROMPT_LEN, MAX_NUM_SEQS):
        rows = torch.arange(begin, min(begin + MAX_NUM_SEQS, PROMPT_LEN), dtype=torch.int32)
        executor.inputs.logits_indices[: len(rows)] = rows.to(executor.device)
        pieces.append(executor.run_head(len(rows)).cpu().clone())
    assert_close(torch.cat(pieces), model.logits, model.logits)


def test_a_batch_of_prefill_and_decode(model, executor):
    """Three sequences at different places, in rows that are not all used, with padding behind."""
    others = [model.prompt.flip(0)[:20], model.prompt[5:30]]
    expected = [model.logits_of(tokens) for tokens in others]
    step(executor, {0: (model.prompt[:30], 0), 3: (others[0][:11], 0)})
    logits = step(
        executor, {0: (model.prompt[30:31], 30), 2: (others[1], 0), 3: (others[0][11:20], 11)}, padding=5
    )
    assert_close(logits[:1], model.logits[30:31], model.logits)
    assert_close(logits[1:2], expected[1][-1:], model.logits)
    assert_close(logits[2:3], expected[0][-1:], model.logits)


def test_a_step_repeats_bit_for_bit(model, executor):
    chunks = {0: (model.prompt, 0)}
    first = step(executor, chunks)
    assert torch.equal(step(executor, chunks), first)


def test_sampled_ids_are_taken_from_the_device(model, executor):
    """Token id -r - 1 is what logits row r sampled in the step before."""
    step(executor, {1: (model.prompt[:12], 0)})
    executor.inputs.sampled[3] = int(model.prompt[12])
    logits = step(executor, {1: (torch.tensor([-4]), 12)})
    assert_close(logits, model.logits[12:13], model.logits)


@pytest.mark.parametrize("disabled", [*((name,) for name in PASSES), tuple(PASSES)], ids="-".join)
def test_without_a_pass_the_logits_are_the_same(qwen3, disabled):
    executor = qwen3.executor(disabled_passes=disabled)
    step(executor, {0: (qwen3.prompt[:31], 0)})
    logits = step(executor, {0: (qwen3.prompt[31:], 31)})
    assert_close(logits, qwen3.logits[-1:], qwen3.logits, PASS_TOLERANCE)


def test_without_a_pass_biases_are_kept(tmp_path):
    model = Model(tmp_path, "llama-biased")
    for disabled in ((), ("merge_qkv",), ("merge_gate_up",)):
        logits = step(model.executor(disabled_passes=disabled), {0: (model.prompt, 0)})
        assert_close(logits, model.logits[-1:], model.logits, PASS_TOLERANCE)


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_replay_is_bitwise_the_eager_run(dtype):
    """One graph, three batches of other compositions than the one it was captured with."""
    config = CONFIGS["qwen3"]
    plan = compile_model(config)
    executor = Executor(
        plan,
        random_weights(plan, device=_indexed("cuda"), dtype=dtype),
        device="cuda",
        dtype=dtype,
        max_num_tokens=MAX_NUM_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_seq_len=MAX_POSITION,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
    )
    executor.capture(16, MAX_NUM_SEQS)
    prompt = torch.arange(5, 50)
    batches = [
        ({0: (prompt[:16], 0)}, 0),
        ({0: (prompt[16:17], 16), 1: (prompt[:9], 0)}, 6),
        ({0: (prompt[17:18], 17), 1: (prompt[9:10], 9), 3: (prompt[:3], 0)}, 11),
    ]
    for chunks, padding in batches:
        num_tokens, _ = fill(executor, chunks, padding)
        eager = executor.run(num_tokens, MAX_NUM_SEQS).clone()
        caches = [cache.clone() for cache in executor.kv_caches]
        for cache in executor.kv_caches:
            cache[PAGES[3]] = 0
        replayed = executor.replay(num_tokens, MAX_NUM_SEQS)
        assert torch.equal(replayed[: len(chunks)], eager[: len(chunks)])
        assert all(torch.equal(a, b) for a, b in zip(caches, executor.kv_caches, strict=True))
    # Decodes alone, by a graph that has no kernel for longer queries.
    executor.capture(16, MAX_NUM_SEQS, 1)
    num_tokens, _ = fill(executor, {0: (prompt[18:19], 18), 1: (prompt[10:11], 10)}, 14)
    eager = executor.run(num_tokens, MAX_NUM_SEQS).clone()
    assert torch.equal(executor.replay(num_tokens, MAX_NUM_SEQS, 1)[:2], eager[:2])
    assert executor.ledger.graphs_bytes >= 0
    with pytest.raises(
        KeyError, match="no CUDA graph of 3 tokens and 1 logits rows was captured; there are 16"
    ):
        executor.replay(3, 1)


# --- sizes, memory, and what is refused -------------------------------------------------------------------


def test_capture_and_replay_are_the_eager_run_on_the_cpu(qwen3):
    executor = qwen3.executor()
    executor.capture(PROMPT_LEN, 1)
    sizes = fill(executor, {0: (qwen3.prompt, 0)})
    eager = executor.run(*sizes).clone()
    assert torch.equal(executor.replay(*sizes), eager)
    assert executor.ledger.graphs_bytes == 0


def test_views_share_the_arena_and_the_ledger_counts_it(qwen3):
    executor = qwen3.executor()
    ledger = executor.ledger
    parameters = sum(p.numel() for p in qwen3.definition.parameters())
    assert ledger.weights_bytes == 4 * parameters
    assert ledger.num_pages == NUM_PAGES
    assert ledger.kv_bytes == sum(cache.nbytes for cache in executor.kv_caches)
    assert ledger.kv_bytes_per_page * NUM_PAGES == ledger.kv_bytes
    assert ledger.arena_bytes < ledger.arena_unshared_bytes / 3
    logits = step(executor, {0: (qwen3.prompt, 0)})
    assert logits.shape == (1, SIZES["vocab_size"])


def test_a_step_allocates_nothing(qwen3):
    """Of two rows of tokens and logits or more; the CPU's product with a single row has a temporary."""
    executor = qwen3.executor()
    sizes = fill(executor, {0: (qwen3.prompt[:9], 0), 1: (qwen3.prompt[:5], 0)})
    executor.run(*sizes)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        executor.run(*sizes)
    grown = [event.key for event in profile.key_averages() if event.self_cpu_memory_usage > 0]
    assert grown == []


def test_more_sizes_than_are_kept(qwen3, monkeypatch):
    monkeypatch.setattr("fastkernels.runtime.executor._BOUND_SIZES", 2)
    executor = qwen3.executor()
    for count in (1, 2, 3, 4, 1):
        logits = step(executor, {0: (qwen3.prompt[:count], 0)})
        assert_close(logits, qwen3.logits[count - 1 : count], qwen3.logits)
    assert len(executor._bodies) == 2


def test_no_logits_asked_for(qwen3):
    executor = qwen3.executor()
    num_tokens, _ = fill(executor, {0: (qwen3.prompt[:30], 0)})
    assert executor.run(num_tokens, 0).shape == (0, SIZES["vocab_size"])
    assert_close(step(executor, {0: (qwen3.prompt[30:], 30)}), qwen3.logits[-1:], qwen3.logits)


def test_sizes_that_are_refused(qwen3):
    executor = qwen3.executor()
    with pytest.raises(ValueError, match="num_tokens is 49; this executor takes 1 to 48"):
        executor.run(49, 1)
    with pytest.raises(ValueError, match="num_tokens is 0; this executor takes 1 to 48"):
        executor.run(0, 0)
    with pytest.raises(ValueError, match="num_logits is 5; this executor takes 0 to 4"):
        executor.run(8, 5)
    with pytest.raises(ValueError, match="num_pages is 0; a KV cache has at least 1"):
        executor.set_kv_cache(0)
    executor.close()
    with pytest.raises(ValueError, match="no KV cache yet; call set_kv_cache"):
        executor.run(1, 1)


def _executor_of(weights: dict[str, Tensor], **sizes: int) -> Executor:
    sizes = {"max_num_tokens": 8, "max_num_seqs": 2, "max_seq_len": 32, **sizes}
    plan = compile_model(CONFIGS["llama"])
    return Executor(plan, weights, device="cpu", dtype=torch.float32, **sizes)


def test_weights_that_are_refused():
    plan = compile_model(CONFIGS["llama"])
    weights = random_weights(plan, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="max_seq_len is 0; it must be at least 1"):
        _executor_of(weights, max_seq_len=0)
    with pytest.raises(
        ValueError, match=r"weight 'model.norm.weight' is torch.float16 \[160\] on cpu; the executor"
    ):
        _executor_of({**weights, "model.norm.weight": weights["model.norm.weight"].half()})
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"the weight 'lm_head\.weight' of the plan is missing"):
        _executor_of(weights)
