"""``fastkernels quantize`` and ``python -m fastkernels.quantize``: a checkpoint in fewer bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastkernels.progress import failing_clearly

if TYPE_CHECKING:
    from fastkernels.quantize.run import Progress, QuantizationReport

EPILOG = """
Examples:

\b
    8 bits, which cost next to nothing and need no text:
        fastkernels quantize MODEL OUT --scheme fp8

\b
    4 bits, calibrated on prompts of your own, {"messages": [...]} or {"text": ...} a line:
        fastkernels quantize MODEL OUT --scheme int4-awq --calibration prompts.jsonl

\b
    one kind of linear in 8 bits, the others in 4:
        fastkernels quantize MODEL OUT --scheme int4-gptq --keep 'int8-weight:*.down_proj'

\b
    5 bits a weight, spent where they are worth most:
        fastkernels quantize MODEL OUT --scheme int4-gptq --target-bits 5.0

Interrupted, the same command goes on where it was.
"""


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face checkpoint folder, or 'demo'.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there, or be empty.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="fp8, fp8-block, int8, int8-zeros, int8-weight, int4-awq, int4-gptq, int4-fp8, nvfp4, mxfp4."
        ),
    ],
    kv: Annotated[str | None, typer.Option(help="Scales for a KV cache of 8 bits: fp8 or int8.")] = None,
    kv_range: Annotated[
        str | None,
        typer.Option(help="How their range is chosen: min-max (the default), percentile, mse or entropy."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="FILE.jsonl or FILE.txt with texts like those the model will see.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.", min=2)] = 2048,
    group_size: Annotated[
        int, typer.Option(help="Neighbours that share a scale in int4: 128, 64, 32.")
    ] = 128,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Linears to leave as they are, a pattern: '*.down_proj'. The head always is."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="SCHEME:PATTERN, linears that get a scheme of their own.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits a weight: linears that are worth it get int8-weight.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What perplexity is measured on: FILE.txt or .jsonl.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a checkpoint with quantised weights, in the compressed-tensors format."""
    with failing_clearly():
        from fastkernels.quantize.run import as_dict, quantize_checkpoint

        with _going_on(out), _layer_progress() as progress:
            report = quantize_checkpoint(
                model,
                out,
                scheme=scheme,
                kv=kv,
                kv_range=kv_range,
                calibration=calibration,
                samples=samples,
                sequence_length=sequence_length,
                group_size=group_size,
                exclude=exclude or (),
                keep=keep or (),
                target_bits=target_bits,
                text=text,
                device=device,
                progress=progress,
            )
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if json_output:
            print(json.dumps(as_dict(report)))
        else:
            print_report(report)


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Says where an interrupted run is."""
    try:
        yield
    except KeyboardInterrupt:
        if (partial := out.with_name(out.name + ".partial")).is_dir():
            print(f"interrupted; the same command goes on from {partial}", file=sys.stderr)
        raise


def print_report(report: QuantizationReport) -> None:
    """The table at the end."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.out}: {report.scheme}, {report.bits:.3f} bits a quantised weight")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    table.add_row("size, MB", f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.1%}")
    table.add_row(
        "perplexity",
        f"{report.perplexity_before:.4f}",
        f"{report.perplexity_after:.4f}",
        f"{report.growth:+.2%}",
    )
    worst = max(range(len(report.layer_errors)), key=lambda index: report.layer_errors[index])
    table.add_row("worst layer's error", "", f"{report.layer_errors[worst]:.4f}", f"layer {worst}")
    table.add_row("time, s", "", f"{report.seconds:.1f}", "")
    if report.peak_bytes:
        table.add_row("peak GPU memory, GiB", "", f"{report.peak_bytes / 2**30:.2f}", "")
    Console().print(table)


@contextmanager
def _layer_progress() -> Iterator[Progress]:
    """A bar on stderr and, above it, a line a layer with its error; without a terminal, the lines alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int, error: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)
            if error is not None:
                console.print(f"layer {done - 1}: error {error:.4f}", highlight=False)

        yield report


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(epilog=EPILOG)(quantize)
