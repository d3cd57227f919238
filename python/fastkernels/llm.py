"""LLM: a model, ready to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fastkernels.config import EngineConfig, ModelConfig, SamplingParams
from fastkernels.errors import EngineClosedError, RequestError
from fastkernels.runtime.build import BuiltEngine, Progress, build_engine, find_model
from fastkernels.runtime.engine import Engine, EngineStats, Generation, TokenLogprob
from fastkernels.runtime.prompt_logits import PromptLogprobs

Prompt = str | Sequence[int]

__all__ = ["LLM", "Prompt", "PromptLogprobs", "RequestOutput", "TextPiece", "Timings", "TokenLogprob"]


@dataclass(frozen=True)
class Timings:
    """ttft_ms: from the request's arrival to its first token; tokens_per_s: of the tokens after the first, or
    of the only one from the arrival on."""

    ttft_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class RequestOutput:
    """What one prompt gave.

    text:          of the output alone, without special tokens, cut before a stop text; "" without a tokenizer
    token_ids:     all that was sampled, the stop token included
    logprobs:      an entry a token, or None when none were asked for
    finish_reason: "stop" (stop token or stop text) | "length" (max_tokens or the context) | "abort"
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    prompt_token_ids: list[int]
    timings: Timings


@dataclass(frozen=True)
class TextPiece:
    """A step of ``LLM.stream``: what came for the prompt at ``index`` since its last piece.

    output: the whole, with the last piece of the prompt; before that None
    """

    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None = None


class LLM:
    """A model that generates.

    model:  a Hugging Face checkpoint folder, "demo", or with random_weights=True the name of a preset
            (``fastkernels.models.presets``)
    device, dtype, max_seq_len, max_num_seqs, max_num_tokens, page_size, kv_cache_bytes, kv_cache_fraction,
    kv_cache_dtype, disabled_passes, cuda_graphs, random_weights, quantization, head_quantization: see
    ``config.EngineConfig``
    progress: called with (stage, done, total) while the model is loaded

    Raises ModelNotFoundError, DeviceError, CheckpointError, ConfigError, or EngineMemoryError with the
    arithmetic. Closing frees the memory; as a context manager it closes itself. Not thread-safe.
    """

    def __init__(self, model: str | Path, *, progress: Progress | None = None, **options: Any) -> None:
        self.options = EngineConfig(**options)
        source = find_model(model, random_weights=self.options.random_weights)
        self.name = source.name
        self.config: ModelConfig = source.config
        self.tokenizer = source.tokenizer
        self._built: BuiltEngine | None = build_engine(source, self.options, progress)
        self.device = self._built.device
        self.dtype = self._built.dtype
        self.kv_cache_dtype = self._built.kv_cache_dtype
        self.max_seq_len = self._built.max_seq_len
        self.plan = self._built.plan
        self.ledger = self._built.ledger

    # --- generating ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The continuation of each prompt, in their order; they run together.

        prompts: a text, a list of token ids, or a list of those
        params:  for all of them, or one each; None: greedy, or what the checkpoint asks for
        Raises RequestError, before anything runs, for a prompt that cannot be served.
        """
        generations = self._add(self._prepare(prompts, params), streaming=False)
        self._run(generations)
        return [self._output(generation) for generation in generations]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[TextPiece]:
        """Like ``generate``, piece by piece as the tokens come. Closing the iterator aborts what is left."""
        return self._stream(self._prepare(prompts, params))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """The answer to a chat, [{"role": "user", "content": ...}, ...], in the checkpoint's own template.

        options: for the template, see ``checkpoint.Tokenizer.render_chat``. Raises ChatTemplateError without
                 one.
        """
        return self.generate([self.encode_chat(messages, **options)], params)[0]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt of a chat, as token ids."""
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer; give token ids")
        return self.tokenizer.encode_chat(messages, **options)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """fp32 [num_tokens, vocab_size], on the CPU: what the model says after each token of one sequence."""
        return self._engine.logits(token_ids)

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None
    ) -> list[PromptLogprobs]:
        """How likely the tokens of each prompt were, given those before: of the prompt from its token number
        ``first`` on, or from 1, many prompts a step.

        Raises RequestError, before anything runs, for a prompt that cannot be served.
        """
        return self._engine.prompt_logprobs(prompts, [1] * len(prompts) if firsts is None else firsts)

    # --- state ------------------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""
        return self._engine.kv_cache.num_pages

    def close(self) -> None:
        """Aborts what runs and frees the memory of weights and cache. Closing twice is harmless."""
        if self._built is None:
            return
        self._built.engine.close()
        self._built.executor.close()
        self._built = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        if self._built is None:
            raise EngineClosedError("the LLM is closed; make a new one")
        return self._built.engine

    def _prepare(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[np.ndarray, SamplingParams]]:
        """Token ids and parameters of every prompt, all checked before any is queued."""
        engine = self._engine
        listed = _list_of_prompts(prompts)
        if isinstance(params, SamplingParams) or params is None:
            each = [params or SamplingParams()] * len(listed)
        else:
            each = list(params)
            if len(each) != len(listed):
                raise RequestError(
                    f"there are {len(listed)} prompts and {len(each)} SamplingParams; give one each"
                )
        prepared = []
        for index, (prompt, one) in enumerate(zip(listed, each, strict=True)):
            where = f"prompt {index}: " if len(listed) > 1 else ""
            try:
                prepared.append((engine.check_prompt(self._encode(prompt)), one))
            except ValueError as error:
                raise RequestError(f"{where}{error}") from None
            if one.stop and self.tokenizer is None:
                raise RequestError(
                    f"{where}stop texts need a tokenizer, and {self.name} has none; give stop_token_ids"
                )
        return prepared

    def _add(self, prepared: list[tuple[np.ndarray, SamplingParams]], *, streaming: bool) -> list[Generation]:
        generations = []
        for token_ids, params in prepared:
            decoder = self.tokenizer.stream() if self.tokenizer and (streaming or params.stop) else None
            generations.append(self._engine.add(token_ids, params, decoder))
        return generations

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer; give token ids")
        if not prompt:  # also where a tokenizer would put a token of its own before nothing
            raise RequestError("the prompt is empty; it must have at least one character")
        return self.tokenizer.encode(prompt)

    def _run(self, generations: list[Generation]) -> None:
        engine = self._engine
        try:
            while not all(generation.finished for generation in generations):
                engine.step()
        finally:
            for generation in generations:
                engine.abort(generation)

    def _stream(self, prepared: list[tuple[np.ndarray, SamplingParams]]) -> Iterator[TextPiece]:
        engine = self._engine
        generations = self._add(prepared, streaming=True)
        shown = [[0, 0] for _ in generations]  # characters and tokens
        left = list(range(len(generations)))
        try:
            while left:
                for index in list(left):
                    generation, (num_characters, num_tokens) = generations[index], shown[index]
                    text = "" if generation.text is None else generation.text.text
                    token_ids = generation.output_token_ids[num_tokens:]
                    if generation.finished:
                        left.remove(index)
                    elif not token_ids:
                        continue
                    shown[index] = [len(text), num_tokens + len(token_ids)]
                    output = self._output(generation) if generation.finished else None
                    yield TextPiece(index, text[num_characters:], token_ids, output)
                if left:
                    engine.step()
        finally:
            for generation in generations:
                engine.abort(generation)

    def _output(self, generation: Generation) -> RequestOutput:
        token_ids = generation.output_token_ids
        if generation.text is not None:
            text = generation.text.text
        elif self.tokenizer is not None:
            ended_by_token = generation.finish_reason == "stop" and token_ids[-1] in generation.stop_ids
            text = self.tokenizer.decode(token_ids[:-1] if ended_by_token else token_ids)
        else:
            text = ""
        first = generation.first_token_at - generation.added_at
        if len(token_ids) > 1:
            rate = (len(token_ids) - 1) / max(generation.last_token_at - generation.first_token_at, 1e-9)
        else:
            rate = len(token_ids) / max(first, 1e-9)
        return RequestOutput(
            text=text,
            token_ids=token_ids,
            logprobs=None if generation.params.logprobs is None else generation.logprobs,
            finish_reason=generation.finish_reason or "abort",
            prompt_token_ids=generation.tokens[: generation.num_prompt_tokens].tolist(),
            timings=Timings(ttft_ms=first * 1e3, tokens_per_s=rate),
        )


def _list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) == 0:
        raise RequestError("there is no prompt; give at least one")
    if not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__"):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
