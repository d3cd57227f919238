"""What every command shows on stderr: progress while it loads, a line a warning, a sentence when it fails."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastkernels.config import debug


@contextmanager
def loading_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, for ``LLM(progress=...)``: a line a stage, gone when all is done. Nothing without a
    terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Turns what a user can mend into one sentence on stderr and exit code 2; Ctrl-C into 130. A warning is a
    sentence too."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        yield
    except (ValueError, MemoryError, NotImplementedError) as error:
        if debug() or not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None
    finally:
        warnings.formatwarning = before


def _is_ours(error: BaseException) -> bool:
    """A named exception of this package; any other is a bug, and its traceback is wanted."""
    return type(error).__module__.startswith("fastkernels.")
