"""fastkernels: the commands of the package as one."""

from __future__ import annotations

from typing import Annotated

import typer

from fastkernels.evaluate import evaluate
from fastkernels.generate import EPILOG, generate
from fastkernels.inspect import inspect
from fastkernels.quantize.command import EPILOG as QUANTIZE_EPILOG
from fastkernels.quantize.command import quantize
from fastkernels.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Run large language models with hand-written CUDA and CPU kernels.

    \b
    fastkernels generate                 the demo model continues a line of Python
    fastkernels generate --help          models, sampling, JSON output
    fastkernels inspect demo             what a model is compiled to
    fastkernels tune llama-3.1-8b        the fastest matrix products on this GPU, for engines to come
    fastkernels quantize MODEL OUT --scheme fp8
                                         a checkpoint in fewer bits
    fastkernels evaluate OUT --against MODEL
                                         what that cost
    fastkernels --install-completion     completion for your shell
    """,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastkernels import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(name="generate", epilog=EPILOG)(generate)
app.command(name="inspect")(inspect)
app.command(name="tune")(tune)
app.command(name="quantize", epilog=QUANTIZE_EPILOG)(quantize)
app.command(name="evaluate")(evaluate)


def main() -> None:
    """The console script."""
    app(prog_name="fastkernels")


if __name__ == "__main__":
    main()
