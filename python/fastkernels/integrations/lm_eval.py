"""The model class "fastkernels" of lm-eval (EleutherAI's harness) over an ``LLM``; importing registers it.

    python -m fastkernels.integrations.lm_eval --model fastkernels --model_args pretrained=DIR --tasks NAME

is lm-eval's own command line with the class registered, since lm-eval looks for classes in itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from lm_eval import utils  # type: ignore[import,unused-ignore]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lm-eval is not installed; try: pip install 'fastkernels[lm-eval]'") from error
from lm_eval.api.model import TemplateLM  # type: ignore[import,unused-ignore]
from lm_eval.api.registry import register_model  # type: ignore[import,unused-ignore]

from fastkernels.config import SamplingParams
from fastkernels.errors import RequestError
from fastkernels.llm import LLM

NAME = "fastkernels"
MAX_GEN_TOKS = 256  # of an answer where the task says nothing
_MAX_NUM_SEQS = 128
_AT_ONCE = 1024  # requests between two moves of the progress bar


@register_model(NAME)
class FastkernelsLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """pretrained: as of ``LLM``, with a tokenizer; options: more of its options: quantization=int4,
    kv_cache_dtype=fp8, ...

    batch_size:    requests that run at once; "auto" or None: 128
    max_length:    tokens of the context; None: the engine's
    add_bos_token: whether texts begin with the token the tokenizer puts first; None: as it does
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size is not None and str(batch_size).isdigit():
            options.setdefault("max_num_seqs", int(batch_size))
        options = {"max_num_seqs": max_batch_size or _MAX_NUM_SEQS, "max_seq_len": max_length, **options}
        self.llm = LLM(pretrained, device=device or "auto", **options)
        if self.llm.tokenizer is None:
            raise RequestError(f"{pretrained} has no tokenizer, which lm-eval needs")
        self._tokenizer = self.llm.tokenizer
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token

    # --- text and tokens --------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.llm.max_seq_len

    @property
    def eot_token_id(self) -> int:
        token_id = self._tokenizer.eos_token_id
        return self.llm.config.eos_token_ids[0] if token_id is None else token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is given."""
        token_id = self._tokenizer.bos_token_id
        return self.eot_token_id if token_id is None else token_id

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self._tokenizer.special_tokens.get("bos_token")
        if add_special_tokens is None:
            given = bos is not None and string.startswith(bos)
            add_special_tokens = not given and self.add_bos_token is not False
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Without a generation prompt the last message is the beginning of the answer."""
        if add_generation_prompt:
            return self._tokenizer.render_chat(chat_history)
        return self._tokenizer.render_chat(chat_history[:-1]) + str(chat_history[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, which results carry."""
        return self._tokenizer.chat_template if chat_template else None

    # --- requests ---------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The longest first, so that what does not fit is known at once. Contexts lose tokens at their
        beginning where they are too long."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        order = [index for index in order if requests[index][2]]
        bar = _progress_bar(len(order), disable_tqdm)
        for begin in range(0, len(order), _AT_ONCE):
            indices, prompts, firsts = order[begin : begin + _AT_ONCE], [], []
            for index in indices:
                _, context, continuation = requests[index]
                if len(continuation) > self.max_length:
                    raise RequestError(
                        f"a continuation has {len(continuation)} tokens; the context takes {self.max_length}"
                    )
                prompts.append((context + continuation)[-self.max_length - 1 :])
                firsts.append(len(prompts[-1]) - len(continuation))
            for index, one in zip(indices, self.llm.prompt_logprobs(prompts, firsts), strict=True):
                found[index] = one.logprobs.double().sum().item(), bool(one.greedy.all())
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
            bar.update(len(indices))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            sums[owner] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        bar = _progress_bar(len(requests), disable_tqdm)
        for begin in range(0, len(requests), _AT_ONCE):
            part = requests[begin : begin + _AT_ONCE]
            prompts, params = [], []
            for context, options in (request.args for request in part):
                one = self._params(options)
                # a context that is too long loses tokens at its beginning, the answer none
                room = max(self.max_length - one.max_tokens, 1)
                prompts.append(self.tok_encode(context)[-room:])
                params.append(one)
            for request, output in zip(part, self.llm.generate(prompts, params), strict=True):
                found.append(output.text)
                self.cache_hook.add_partial("generate_until", request.args, output.text)
            bar.update(len(part))
        return found

    def _params(self, options: Mapping[str, Any]) -> SamplingParams:
        """Of a task's generation_kwargs, in the words of transformers; greedy unless it says do_sample."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        # A special token has no text of its own in the output: it ends it by its id.
        ids = {text: self._tokenizer.token_id(text) for text in until}
        special = {text for text, token_id in ids.items() if token_id in self._tokenizer.special_token_ids}
        length = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        most = next((one for one in length if one is not None), self.max_gen_toks)
        sampled = {
            name: options[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
            if options.get(name) is not None
        }
        if options.get("do_sample") is False or not sampled.get("temperature"):
            sampled["temperature"] = 1.0 if options.get("do_sample") and "temperature" not in sampled else 0.0
        return SamplingParams(
            max_tokens=min(int(most), self.max_length - 1),
            stop=tuple(text for text in until if text not in special),
            stop_token_ids=tuple(ids[text] for text in until if text in special),  # type: ignore[misc]
            **{**sampled, "temperature": float(sampled["temperature"])},
        )


def _progress_bar(total: int, disable: bool) -> Any:
    """A bar on stderr, as the harness's own classes show."""
    from tqdm import tqdm  # type: ignore[import,unused-ignore]

    return tqdm(total=total, disable=disable, desc="Running requests")


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import,unused-ignore]

    cli_evaluate()


if __name__ == "__main__":
    main()
