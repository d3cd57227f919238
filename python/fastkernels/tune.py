"""`python -m fastkernels.tune MODEL`: times a model's products on this GPU, and keeps the best tactics."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastkernels.compiler.tune import FILE_NAME, Choices, rule
from fastkernels.config import EngineConfig, cache_folder
from fastkernels.errors import DeviceError
from fastkernels.inspect import find_config, find_quantized
from fastkernels.ops.device import choose_device
from fastkernels.progress import failing_clearly, loading_progress
from fastkernels.runtime.build import choose_dtype, choose_tactics, compile_for


def tune(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, 'demo', or the name of a preset.")
    ] = "demo",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, or auto: the checkpoint's.")] = "auto",
    max_num_tokens: Annotated[int, typer.Option(help="Tokens of a step at most.", min=1)] = 8192,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 64,
    quantization: Annotated[
        str | None, typer.Option(help="Scheme of the linears but the head, fp8 say.")
    ] = None,
    head_quantization: Annotated[str | None, typer.Option(help="Scheme of the head.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what was timed before.")] = False,
) -> None:
    """Time the tactics of a model's matrix products on this GPU, and keep the fastest for engines to come.

    Only shapes count: no weight is read. Products of the same shapes in other models are done too.
    """
    with failing_clearly():
        options = EngineConfig(
            dtype=dtype,
            max_num_tokens=max_num_tokens,
            max_num_seqs=max_num_seqs,
            quantization=quantization,
            head_quantization=head_quantization,
        )
        device = choose_device("auto")
        if device.type == "cpu":
            raise DeviceError("nothing to tune: there is no GPU here that this build has kernels for")
        config = find_config(model)
        engine_dtype = choose_dtype(options.dtype, config, device)
        plan = compile_for(config, options, device, engine_dtype, find_quantized(model))
        start = time.perf_counter()
        with loading_progress() as progress:
            choices = choose_tactics(
                plan, options, device, engine_dtype, mode="full", again=again, progress=progress
            )
        seconds = time.perf_counter() - start
        console = Console()
        console.print(choices_table(choices))
        console.print(
            f"{len(choices.timed)} choices, {choices.num_timed} times taken in {seconds:.1f} s; kept in "
            f"{cache_folder() / FILE_NAME}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def choices_table(choices: Choices) -> Table:
    """The fastest of each product and bucket, beside the rule's where that is another and was timed too."""
    table = Table(box=None, pad_edge=False)
    for column in ("product", "tokens", "tactic", "us", "by rule"):
        table.add_column(column, justify="right" if column in ("tokens", "us") else "left")
    by_tokens = sorted(choices.timed.items(), key=lambda item: (str(item[0][0]), item[0][1]))
    for (product, bucket), timed in by_tokens:
        plain = rule(product, bucket, choices.capability)
        beside = f"{plain} {timed.us[plain]:.1f}" if plain in timed.us and plain != timed.tactic else ""
        us = f"{timed.us[timed.tactic]:.1f}"
        table.add_row(str(product), str(bucket), str(timed.tactic), us, beside)
    return table


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(name="tune")(tune)

if __name__ == "__main__":
    app(prog_name="python -m fastkernels.tune")
