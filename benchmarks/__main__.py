"""``python -m benchmarks``: measures, prints a table, writes a report; or renders the kept reports."""

from __future__ import annotations

import gc
import importlib
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import render
from benchmarks.harness import ResultError, ceilings
from benchmarks.report import Report, Row

OPS = ("attention", "gemm", "norm", "rope", "kv_cache", "activation", "embedding", "sampling")


class What(str, Enum):
    ops = "ops"
    engine = "engine"
    cpu = "cpu"
    all = "all"
    render = "render"


def main(
    what: Annotated[
        What,
        typer.Argument(
            help="ops: every kernel; engine: decode steps and prefill at a model's shapes; cpu: the engine "
            "on the CPU against transformers; all: what fits the device; render: docs/performance.md from "
            "the kept results."
        ),
    ] = What.ops,
    only: Annotated[
        str | None, typer.Option(help="Only rows whose subject and case contain this text.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    quick: Annotated[bool, typer.Option(help="Few cases and few repeats, to see that all works.")] = False,
    compile_peers: Annotated[
        bool, typer.Option(help="Also torch.compile as a peer: minutes of compiling.")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="The git commit, where there is no git to ask.")] = None,
) -> None:
    """Measure fastkernels beside the machine's floor and its peers."""
    if what is What.render:
        print(render.write())
        return
    on = _device(device, what)
    rows: list[Row] = []
    failures: list[str] = []
    command = f"python -m benchmarks {what.value}" + (" --quick" if quick else "")
    gc.collect()
    gc.freeze()  # what is imported by now stays: collections between cases are quick
    with torch.inference_mode():
        for name in _modules(what, on):
            module = importlib.import_module(f"benchmarks.{name}")
            options = {"compile_peers": compile_peers} if name in OPS else {}
            try:
                rows += module.run(device=on, quick=quick, only=only, **options)
            except ResultError as error:
                rows += error.rows
                failures.append(str(error))
            report = Report.of_this_machine(rows, on, ceilings(on).as_figures(), command, commit)
            if json:  # after each module: what has been measured is kept, whatever ends the rest
                report.write(json)
    if not rows and not failures:
        print(f"error: no row contains {only!r}", file=sys.stderr)
        raise typer.Exit(2)
    render.print_report(report)
    if failures:
        print("error: wrong or no results, left out above: " + "; ".join(failures), file=sys.stderr)
        raise typer.Exit(1)


def _device(name: str, what: What) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise typer.BadParameter(f"device is {name!r}; it is auto, cuda or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and what is not What.cpu else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here; give --device cpu")
    if name == "cuda" and what is What.cpu:
        raise typer.BadParameter("'cpu' runs on the CPU; leave --device out")
    return torch.device(name)


def _modules(what: What, device: torch.device) -> tuple[str, ...]:
    if what is What.ops:
        return OPS
    if what is What.all:
        return (*OPS, "engine" if device.type == "cuda" else "cpu_engine")
    return ("engine",) if what is What.engine else ("cpu_engine",)


if __name__ == "__main__":
    typer.run(main)
