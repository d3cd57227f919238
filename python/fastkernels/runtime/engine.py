"""The loop: plan a step, pack it, launch it, and read what the step before it sampled.

On a GPU the host is one step ahead of what it has read: sampled ids stay on the device and feed the next
step, and the host reads step n while step n + 1 runs. Lengths are known in advance, so they end a request at
once; a stop token or stop text is seen one step late, and the token of the surplus step is dropped. On the
CPU a step has run when the launch returns, so it is read at once; the code is the same.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from fastkernels.checkpoint.generation_config import GenerationConfig
from fastkernels.config import SamplingParams
from fastkernels.errors import EngineClosedError, RequestError
from fastkernels.runtime.detokenize import OutputText, TokenDecoder
from fastkernels.runtime.kv_cache import KVCache
from fastkernels.runtime.pack import StepPacker
from fastkernels.runtime.prompt_logits import LogitsPiece, PromptLogprobs, prompt_logits, score_prompts
from fastkernels.runtime.sampler import SampledStep, Sampler, SamplingValues, resolve
from fastkernels.runtime.scheduler import Batch, Request, Scheduler
from fastkernels.runtime.step import StepBuffers

_ROUNDED_FROM, _ROUNDED_TO = 512, 64  # tokens of a step without a graph, on CUDA


class StepExecutor(Protocol):
    """What the engine asks of ``runtime.executor.Executor``."""

    inputs: StepBuffers

    def run(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> torch.Tensor: ...

    def replay(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> torch.Tensor: ...

    def run_body(self, num_tokens: int) -> None: ...

    def run_head(self, num_logits: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a chosen token, and of the likeliest tokens at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Generation(Request):
    """One request in the engine. Times are time.perf_counter's, in seconds.

    finish_reason: "stop" (stop token or stop text), "length" (max_tokens or the context), "abort"; None while
                   it runs
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    values: SamplingValues | None = None
    stop_ids: frozenset[int] = frozenset()
    text: OutputText | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    added_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens : self.num_known].tolist()


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made.

    host_us:       host work of the last step that ran: planning, packing, launching and reading, without the
                   wait for the device (and, on the CPU, without the model itself)
    total_host_us: the same, summed over the steps
    """

    num_steps: int = 0
    num_replays: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    max_pages_used: int = 0
    host_us: float = 0.0
    total_host_us: float = 0.0


@dataclass(slots=True)
class _UnderWay:
    """A step that was launched; step is None when it sampled nothing."""

    samples: list[Request]
    step: SampledStep | None


class Engine:
    """Serves requests over one executor.

    executor:     runs steps over ``inputs``; its KV cache has kv_cache.num_pages pages
    buckets:      token counts that ``executor.replay`` has a CUDA graph for; steps up to the largest are
                  padded to one
    max_seq_len:  tokens of a prompt and its output together
    pipelined:    read a step only after the next was launched; None: on CUDA
    Not thread-safe.
    """

    def __init__(
        self,
        executor: StepExecutor,
        kv_cache: KVCache,
        *,
        vocab_size: int,
        max_seq_len: int,
        max_num_tokens: int,
        generation_config: GenerationConfig | None = None,
        buckets: Sequence[int] = (),
        pipelined: bool | None = None,
    ) -> None:
        inputs = executor.inputs
        self.kv_cache = kv_cache
        self.max_seq_len = max_seq_len
        self.stats = EngineStats()
        self.scheduler = Scheduler(kv_cache, max_num_seqs=inputs.max_num_seqs, max_num_tokens=max_num_tokens)
        self._executor = executor
        self._inputs = inputs
        self._packer = StepPacker(inputs, kv_cache)
        self._sampler = Sampler(inputs, vocab_size)
        self._vocab_size = vocab_size
        self._defaults = generation_config or GenerationConfig()
        self._buckets = sorted(buckets)
        self._asynchronous = inputs.device.type == "cuda"
        self._pipelined = self._asynchronous if pipelined is None else pipelined
        self._under_way: _UnderWay | None = None
        self._next_id = 0
        self._closed = False

    # --- requests ------------------------------------------------------------------------------------

    def check_prompt(
        self, token_ids: Sequence[int] | np.ndarray, *, room_for_output: bool = True
    ) -> np.ndarray:
        """The prompt as int32 [num_tokens]. Raises RequestError when it cannot be served."""
        if len(token_ids) == 0:
            raise RequestError("the prompt is empty; it must have at least one token")
        try:
            ids = np.asarray(token_ids)
        except (ValueError, OverflowError):
            ids = np.empty(0)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("a prompt of token ids must be a flat list of integers")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self._vocab_size)][0])
            raise RequestError(f"the prompt has token id {bad}; the model takes 0 to {self._vocab_size - 1}")
        if len(ids) + room_for_output > self.max_seq_len:
            beside = ", of which at least one must be left for the output" if room_for_output else ""
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context takes {self.max_seq_len}{beside}"
            )
        return ids.astype(np.int32)

    def add(
        self,
        token_ids: Sequence[int] | np.ndarray,
        params: SamplingParams | None = None,
        decoder: TokenDecoder | None = None,
    ) -> Generation:
        """Queues a request. decoder: makes its text as the tokens come, which stop strings need.

        Raises RequestError for a prompt that cannot be served, EngineClosedError after ``close``.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed; make a new one to serve requests")
        params = params or SamplingParams()
        prompt = self.check_prompt(token_ids)
        if params.stop and decoder is None:
            raise RequestError("stop texts need a tokenizer, and this model has none; give stop_token_ids")
        generation = Generation.from_prompt(
            self._next_id, prompt, min(params.max_tokens, self.max_seq_len - len(prompt))
        )
        assert isinstance(generation, Generation)
        generation.params = params
        generation.values = resolve(params, self._defaults)
        eos = () if params.ignore_eos else self._defaults.eos_token_ids
        generation.stop_ids = frozenset((*params.stop_token_ids, *eos))
        generation.text = None if decoder is None else OutputText(decoder, params.stop)
        generation.added_at = time.perf_counter()
        self.scheduler.add(generation)
        self._next_id += 1
        self.stats.num_prompt_tokens += len(prompt)
        return generation

    def abort(self, generation: Generation) -> None:
        """Ends a request at once; harmless when it has ended."""
        if not generation.finished:
            self._finish(generation, "abort")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._under_way is not None

    def close(self) -> None:
        """Aborts what runs and lets go of the executor."""
        self._abort_all()
        self._closed = True
        self._executor = None  # type: ignore[assignment]

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """fp32 [num_tokens, vocab_size] on the CPU: what the model says after each token of one sequence.

        Runs at once, in chunks, beside the requests there are. Raises RequestError for a sequence that cannot
        be served, or while there is no row or too few pages left for it.
        """
        pieces = self._prompt_logits([self.check_prompt(token_ids, room_for_output=False)], [0])
        return torch.cat([piece.logits.to("cpu", torch.float32, copy=True) for piece in pieces])

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int] | np.ndarray], firsts: Sequence[int]
    ) -> list[PromptLogprobs]:
        """Of each prompt's tokens from number ``first``, at least 1, on: how likely they were.

        Many prompts a step, reduced on the device. Raises RequestError as ``logits``, before anything runs
        for prompts that cannot be served.
        """
        checked = [self._check_scored(*both) for both in zip(prompts, firsts, strict=True)]
        pieces = self._prompt_logits([prompt[:-1] for prompt in checked], [first - 1 for first in firsts])
        return score_prompts(pieces, checked, firsts)

    def _check_scored(self, token_ids: Sequence[int] | np.ndarray, first: int) -> np.ndarray:
        if not 1 <= first < len(token_ids):
            raise RequestError(
                f"logprobs from token {first} of a prompt of {len(token_ids)}; it must be one from 1 on"
            )
        before = self.check_prompt(token_ids[:-1], room_for_output=False)
        return np.append(before, self.check_prompt(token_ids[-1:], room_for_output=False))

    def _prompt_logits(self, prompts: Sequence[np.ndarray], firsts: Sequence[int]) -> Iterator[LogitsPiece]:
        if self._closed:
            raise EngineClosedError("the engine is closed; make a new one to serve requests")
        return prompt_logits(
            self._executor,
            self.scheduler,
            self._packer,
            lambda num_tokens: self._padded(num_tokens)[0],
            prompts,
            firsts,
        )

    # --- the loop ------------------------------------------------------------------------------------

    def step(self) -> list[Generation]:
        """One turn of the loop; returns the requests that got a token. Aborts all of them when it raises."""
        if self._closed:
            raise EngineClosedError("the engine is closed; make a new one to serve requests")
        try:
            if not self._asynchronous:
                return self._step()
            with torch.cuda.device(self._inputs.device):  # whose current stream the events are recorded on
                return self._step()
        except BaseException:
            self._abort_all()
            raise

    def _step(self) -> list[Generation]:
        began = time.perf_counter()
        waited = 0.0
        batch = self.scheduler.schedule()
        launched = None
        if batch.num_tokens:
            launched, waited = self._launch(batch)
        if self._pipelined:
            to_read, self._under_way = self._under_way, launched
        else:
            to_read = launched
        updated: list[Generation] = []
        if to_read is not None and to_read.step is not None:
            wait_began = time.perf_counter()
            to_read.step.wait()
            waited += time.perf_counter() - wait_began
            updated = self._read(to_read.samples, to_read.step)
        stats = self.stats
        if launched is not None:
            stats.host_us = (time.perf_counter() - began - waited) * 1e6
            stats.total_host_us += stats.host_us
        stats.num_preemptions = self.scheduler.num_preemptions
        return updated

    def _launch(self, batch: Batch) -> tuple[_UnderWay, float]:
        """Enqueues a step; returns it and, on the CPU, the seconds the model took."""
        num_tokens, num_logits = batch.num_tokens, len(batch.samples)
        for request in batch.admitted:
            assert isinstance(request, Generation) and request.values is not None
            self._sampler.admit(request, request.values)
        padded, replayed = self._padded(num_tokens)
        pages = self._packer.pack(batch, padded)
        num_top = 0
        rows = np.empty(num_logits, dtype=np.intp)
        sample_steps = np.empty(num_logits, dtype=np.int32)
        for i, request in enumerate(batch.samples):
            rows[i] = request.row
            sample_steps[i] = request.num_tokens - 1
            wanted = request.params.logprobs  # type: ignore[attr-defined]
            if wanted is not None and wanted > num_top:
                num_top = wanted
        self._sampler.pack(rows, sample_steps)
        self._inputs.upload(pages)
        ran = time.perf_counter()
        max_query_len = int(batch.decodes_only)  # 1, or 0: not told
        if replayed:
            logits = self._executor.replay(padded, min(padded, self._inputs.max_num_seqs), max_query_len)
            self.stats.num_replays += 1
        else:
            logits = self._executor.run(padded, num_logits, max_query_len)
        step = self._sampler.launch(logits, num_logits, num_top) if num_logits else None
        in_model = 0.0 if self._asynchronous else time.perf_counter() - ran
        stats = self.stats
        stats.num_steps += 1
        stats.max_pages_used = max(stats.max_pages_used, self.kv_cache.num_used)
        return _UnderWay(batch.samples, step), in_model

    def _padded(self, num_tokens: int) -> tuple[int, bool]:
        """Rows that a step of num_tokens tokens runs with, and whether as a graph."""
        bucket = bisect.bisect_left(self._buckets, num_tokens)
        if bucket < len(self._buckets):
            return self._buckets[bucket], True
        if self._asynchronous and num_tokens > _ROUNDED_FROM:  # few sizes: their launches are bound once
            rounded = -(-num_tokens // _ROUNDED_TO) * _ROUNDED_TO
            return min(rounded, self._inputs.max_num_tokens), False
        return num_tokens, False

    def _read(self, samples: list[Request], step: SampledStep) -> list[Generation]:
        """Gives each request the token it got, and ends those it ends."""
        now = time.perf_counter()
        token_ids = step.ids[: len(samples)].tolist()
        updated: list[Generation] = []
        for logits_row, (request, token_id) in enumerate(zip(samples, token_ids, strict=True)):
            if request.finished:
                continue  # the surplus token of a request that stopped one step before
            assert isinstance(request, Generation)
            if request.num_known == request.num_prompt_tokens:
                request.first_token_at = now
            request.last_token_at = now
            request.tokens[request.num_known] = token_id
            request.num_known += 1
            updated.append(request)
            if request.params.logprobs is not None:
                request.logprobs.append(_token_logprob(step, logits_row, token_id, request.params.logprobs))
            if token_id in request.stop_ids:
                self._finish(request, "stop")
                continue
            if request.text is not None:
                request.text.push(token_id)
                if request.text.stopped:
                    self._finish(request, "stop")
                    continue
            if request.num_known == request.max_num_tokens:
                self._finish(request, "length")
        self.stats.num_output_tokens += len(updated)
        return updated

    def _finish(self, generation: Generation, reason: str) -> None:
        self.scheduler.finish(generation)
        generation.finish_reason = reason
        if generation.text is not None:
            generation.text.flush()
            if generation.text.stopped:
                generation.finish_reason = "stop" if reason == "length" else reason

    def _abort_all(self) -> None:
        self._under_way = None
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            assert isinstance(request, Generation)
            self._finish(request, "abort")


def _token_logprob(step: SampledStep, logits_row: int, token_id: int, num_top: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if num_top and step.top_ids is not None and step.top_logprobs is not None:
        ids, logprobs = (
            step.top_ids[logits_row, :num_top].tolist(),
            step.top_logprobs[logits_row, :num_top].tolist(),
        )
        top = tuple(zip(ids, logprobs, strict=True))
    return TokenLogprob(token_id, float(step.logprobs[logits_row]), top)
