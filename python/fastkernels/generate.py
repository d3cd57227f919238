"""python -m fastkernels.generate: text from a model, on the command line."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkernels.config import SamplingParams
from fastkernels.errors import RequestError
from fastkernels.progress import failing_clearly, loading_progress

if TYPE_CHECKING:
    from fastkernels.llm import LLM, RequestOutput

DEMO_PROMPT = "def fibonacci(n):"

EPILOG = """
Examples:

\b
    the demo model continues a line of Python:
        python -m fastkernels.generate

\b
    sampled; the same seed gives the same text:
        python -m fastkernels.generate --prompt "import os" --temperature 0.8 --seed 1

\b
    the prompt as a user's message, in the model's own chat template:
        python -m fastkernels.generate --model DIR --chat --prompt "Why is the sky blue?"

\b
    the prompt from stdin, one JSON object on stdout:
        cat notes.txt | python -m fastkernels.generate --model DIR --stop "###" --json
"""


class Device(str, Enum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class DType(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class KVCacheDType(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp8 = "fp8"
    int8 = "int8"


def generate(
    model: Annotated[
        str, typer.Option(help="A Hugging Face checkpoint folder, or 'demo', the small model of the package.")
    ] = "demo",
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to continue. Without it and --prompt-file: stdin, when piped."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text to continue.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: what the checkpoint asks for.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest with this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output, cut before it; can be given again.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: CUDA where there is a GPU.")] = Device.auto,
    dtype: Annotated[
        DType, typer.Option(help="auto: the checkpoint's on CUDA, fp32 on the CPU.")
    ] = DType.auto,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Round weights as they are loaded: fp8, fp8-block, int8, int8-weight, int4, nvfp4, mxfp4."
        ),
    ] = None,
    head_quantization: Annotated[
        str | None,
        typer.Option(help="The same for the head, fp8-weight say, which is kept as it is by default."),
    ] = None,
    kv_cache_dtype: Annotated[
        KVCacheDType,
        typer.Option(
            help="fp8, int8: half the bytes or less; auto: as the checkpoint says, else the engine's dtype."
        ),
    ] = KVCacheDType.auto,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    stream: Annotated[bool, typer.Option(help="Show the text as it comes, or all at the end.")] = True,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object with the text and figures, and nothing else."),
    ] = False,
) -> None:
    """Continue a text with a language model.

    The text goes to stdout; progress and, at the end, a line of figures go to stderr.
    """
    with failing_clearly():
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=tuple(stop or ()),
        )
        text = _read_prompt(prompt, prompt_file, demo=model == "demo" and not chat)
        from fastkernels.llm import LLM  # the engine is imported once the arguments are known to be sound

        with loading_progress() as progress:
            llm = LLM(
                model,
                device=device.value,
                dtype=dtype.value,
                max_num_seqs=1,
                quantization=quantization,
                head_quantization=head_quantization,
                kv_cache_dtype=kv_cache_dtype.value,
                progress=progress,
            )
        with llm:
            given = llm.encode_chat([{"role": "user", "content": text}]) if chat else text
            if json_output:
                output = llm.generate(given, params)[0]
                print(json.dumps(_report(llm, output)))
                return
            if text is DEMO_PROMPT:  # nobody typed it, so show what is being continued
                print(text, end="", flush=True)
            output = _show(llm, given, params, stream)
            _print_figures(llm, output)


def _read_prompt(prompt: str | None, prompt_file: Path | None, *, demo: bool) -> str:
    """From --prompt, --prompt-file or stdin; the demo has a prompt of its own when nothing is piped in."""
    if prompt is not None and prompt_file is not None:
        raise RequestError("--prompt and --prompt-file were both given; give one of them")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            return prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            raise RequestError(f"the prompt file {prompt_file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt file {prompt_file} is not UTF-8: {error.reason}") from None
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    if piped or not demo:
        return piped
    return DEMO_PROMPT


def _show(llm: LLM, prompt: Any, params: SamplingParams, stream: bool) -> RequestOutput:
    if not stream:
        output = llm.generate(prompt, params)[0]
        print(output.text)
        return output
    for piece in llm.stream(prompt, params):
        print(piece.text, end="", flush=True)
        if piece.output is not None:
            print(flush=True)
            return piece.output
    raise AssertionError("a stream ends with an output")


def _report(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "ttft_ms": round(output.timings.ttft_ms, 3),
        "tokens_per_s": round(output.timings.tokens_per_s, 3),
        "device": llm.device.type,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "model": llm.name,
    }


def _print_figures(llm: LLM, output: RequestOutput) -> None:
    pages = f"{llm.stats.max_pages_used} of {llm.num_pages} KV pages"
    print(
        f"[{output.timings.ttft_ms:.0f} ms to the first token, {output.timings.tokens_per_s:.1f} tokens/s, "
        f"{len(output.prompt_token_ids)} prompt and {len(output.token_ids)} output tokens, {pages}, "
        f"{llm.device.type} {str(llm.dtype).removeprefix('torch.')}]",
        file=sys.stderr,
    )


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(epilog=EPILOG)(generate)


if __name__ == "__main__":
    app(prog_name="python -m fastkernels.generate")
