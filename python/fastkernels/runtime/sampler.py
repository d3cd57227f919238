"""Draws the next tokens from the logits, on the device, and brings them to the host one step later."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from fastkernels import ops
from fastkernels.checkpoint.generation_config import GenerationConfig
from fastkernels.config import SamplingParams
from fastkernels.ops.sampling import IN_PROMPT
from fastkernels.runtime.scheduler import Request
from fastkernels.runtime.step import StepBuffers


@dataclass(frozen=True, slots=True)
class SamplingValues:
    """SamplingParams with every None decided."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def resolve(params: SamplingParams, defaults: GenerationConfig) -> SamplingValues:
    """What the request says, else the checkpoint, else the neutral value. Without either: greedy."""

    def first(*values: float | int | None) -> float | int:
        return next(value for value in values if value is not None)

    if not defaults.do_sample:
        default_temperature: float = 0.0
    else:
        default_temperature = float(first(defaults.temperature, 1.0))
    return SamplingValues(
        temperature=float(first(params.temperature, default_temperature)),
        top_k=int(first(params.top_k, defaults.top_k, 0)),
        top_p=float(first(params.top_p, defaults.top_p, 1.0)),
        min_p=float(first(params.min_p, defaults.min_p, 0.0)),
        repetition_penalty=float(first(params.repetition_penalty, defaults.repetition_penalty, 1.0)),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        seed=params.seed if params.seed is not None else random.getrandbits(62),
    )


@dataclass(slots=True)
class SampledStep:
    """What one step sampled, on its way to the host. Fields are valid after ``wait``.

    ids, logprobs: by logits row; top_ids, top_logprobs: [num_logits, k], or None when no request asked
    """

    ids: np.ndarray
    logprobs: np.ndarray
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    event: torch.cuda.Event | None

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class Sampler:
    """Sampling parameters by row, packed by logits row for each step.

    The table of token counts, i32 [max_num_seqs, vocab_size], is made when the first request with penalties
    comes.
    """

    def __init__(self, inputs: StepBuffers, vocab_size: int) -> None:
        rows = inputs.max_num_seqs
        self._inputs = inputs
        self._vocab_size = vocab_size
        self._temperature = np.zeros(rows, dtype=np.float32)
        self._top_k = np.zeros(rows, dtype=np.int32)
        self._top_p = np.ones(rows, dtype=np.float32)
        self._min_p = np.zeros(rows, dtype=np.float32)
        self._seeds = np.zeros(rows, dtype=np.int64)
        self._repetition = np.ones(rows, dtype=np.float32)
        self._presence = np.zeros(rows, dtype=np.float32)
        self._frequency = np.zeros(rows, dtype=np.float32)
        self._penalized = np.zeros(rows, dtype=bool)
        self._token_counts: torch.Tensor | None = None
        self._penalties_now = False
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        on_gpu = inputs.device.type == "cuda"
        self._events = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._ids = [torch.zeros(rows, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._logprobs = [torch.zeros(rows, dtype=torch.float32, pin_memory=on_gpu) for _ in range(2)]
        self._turn = 0
        # The copies to the host have a stream of their own, so that the next step need not wait for them.
        self._copies = torch.cuda.Stream(inputs.device) if on_gpu else None
        self._drawn = torch.cuda.Event() if on_gpu else None

    def admit(self, request: Request, values: SamplingValues) -> None:
        """Notes the parameters of a request that was given a row; its tokens are all known."""
        row = request.row
        self._temperature[row] = values.temperature
        self._top_k[row] = values.top_k
        self._top_p[row] = values.top_p
        self._min_p[row] = values.min_p
        self._seeds[row] = values.seed
        self._repetition[row] = values.repetition_penalty
        self._presence[row] = values.presence_penalty
        self._frequency[row] = values.frequency_penalty
        self._penalized[row] = values.has_penalties
        if values.has_penalties:
            self._count_known_tokens(request)

    def pack(self, rows: np.ndarray, sample_steps: np.ndarray) -> None:
        """Writes the parameters of this step. rows, sample_steps: [num_logits], by logits row."""
        host, n = self._inputs.host, len(rows)
        temperature = self._temperature[rows]
        host.temperature[:n] = temperature
        self._penalties_now = bool(self._penalized[rows].any())
        if temperature.any():  # a greedy row reads nothing but its temperature
            host.top_k[:n] = self._top_k[rows]
            host.top_p[:n] = self._top_p[rows]
            host.min_p[:n] = self._min_p[rows]
            host.seeds[:n] = self._seeds[rows]
            host.sample_steps[:n] = sample_steps
        if self._penalties_now:
            host.slots[:n] = np.where(self._penalized[rows], rows, -1)
            host.repetition_penalty[:n] = self._repetition[rows]
            host.presence_penalty[:n] = self._presence[rows]
            host.frequency_penalty[:n] = self._frequency[rows]

    def launch(self, logits: torch.Tensor, num_logits: int, num_top: int = 0) -> SampledStep:
        """Enqueues the sampling from logits [num_logits or more, vocab_size] of the step packed last.

        Changes the logits where there are penalties. num_top: the likeliest tokens to report beside each
        chosen one.
        """
        inputs, kernels = self._inputs, torch.ops.fastkernels
        views = self._views.get(num_logits)
        if views is None:
            views = self._views[num_logits] = self._make_views(num_logits)
        parameters, slots, penalties, ids, logprobs = views[:6], views[6], views[7:10], views[10], views[11]
        logits = logits[:num_logits]
        if self._copies is not None:
            self._events[self._turn].wait()  # the copies of the last step, long done, read what is now drawn
        if self._penalties_now:
            kernels.penalize.default(logits, self._token_counts, slots, *penalties)
        kernels.sample.default(logits, *parameters, ids, logprobs)
        if self._penalties_now:
            kernels.count_tokens.default(ids, slots, self._token_counts)
        top_ids = top_logprobs = None
        if num_top:
            top_ids, top_logprobs = ops.top_logprobs(logits, min(num_top, self._vocab_size))
        return self._read_back(inputs, num_logits, top_ids, top_logprobs)

    def _read_back(
        self, inputs: StepBuffers, n: int, top_ids: torch.Tensor | None, top_logprobs: torch.Tensor | None
    ) -> SampledStep:
        self._turn ^= 1
        ids, logprobs = self._ids[self._turn], self._logprobs[self._turn]
        if self._copies is None or self._drawn is None:
            ids[:n].copy_(inputs.sampled[:n])
            logprobs[:n].copy_(inputs.sampled_logprobs[:n])
            return SampledStep(ids.numpy(), logprobs.numpy(), top_ids, top_logprobs, None)
        event = self._events[self._turn]
        self._drawn.record()
        with torch.cuda.stream(self._copies):
            self._drawn.wait()
            ids[:n].copy_(inputs.sampled[:n], non_blocking=True)
            logprobs[:n].copy_(inputs.sampled_logprobs[:n], non_blocking=True)
            if top_ids is not None and top_logprobs is not None:
                top_ids.record_stream(self._copies)
                top_logprobs.record_stream(self._copies)
                top_ids = _to_pinned(top_ids)
                top_logprobs = _to_pinned(top_logprobs)
            event.record()
        return SampledStep(ids.numpy(), logprobs.numpy(), top_ids, top_logprobs, event)

    def _make_views(self, n: int) -> tuple[torch.Tensor, ...]:
        x = self._inputs
        fields = (
            *(x.temperature, x.top_k, x.top_p, x.min_p, x.seeds, x.sample_steps),
            *(x.slots, x.repetition_penalty, x.presence_penalty, x.frequency_penalty),
            *(x.sampled, x.sampled_logprobs),
        )
        return tuple(field[:n] for field in fields)

    def _count_known_tokens(self, request: Request) -> None:
        if self._token_counts is None:
            self._token_counts = torch.zeros(
                self._inputs.max_num_seqs, self._vocab_size, dtype=torch.int32, device=self._inputs.device
            )
        num_prompt = request.num_prompt_tokens
        counts = np.bincount(request.tokens[num_prompt : request.num_known], minlength=self._vocab_size)
        counts = counts.astype(np.int32)
        counts[request.tokens[:num_prompt]] |= IN_PROMPT
        self._token_counts[request.row].copy_(torch.from_numpy(counts))


def _to_pinned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
