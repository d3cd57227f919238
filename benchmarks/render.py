"""A report as a table: in the terminal, and in docs/performance.md from the reports that are kept.

Reports are kept as results/<machine>/<family>.json: engine.json, attention.json and ops.json, which has the
other ops, of a GPU, cpu.json of the CPU.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import Report, Row

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"

COLUMNS = ("case", "{unit}", "x floor", "peer", "x peer", "note")

HEADER = """\
# Performance

Rendered by `python -m benchmarks render` from `benchmarks/results/`; change those, not this page.

**x floor** is the time over the least the machine allows: bytes over its copy bandwidth, FLOPs over its rate
of matrix products, or one launch inside a CUDA graph, whichever is most, all measured in the same run.
**x peer** is the time over that of the fastest peer of the same run, which is named with its own time;
below 1 is faster than the peer. The reports hold the slower peers too. Times are medians; on a GPU every call
reads inputs that are not in the L2 cache, inside a CUDA graph (`benchmarks/harness.py`).
"""


def tables(rows: Iterable[Row]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, columns, lines) of each subject, in the order of the rows."""
    by_subject: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_subject.setdefault((row.subject, row.dtype), []).append(row)
    result = []
    for (subject, dtype), group in by_subject.items():
        in_ms = statistics.median(row.us for row in group) >= 2000
        columns = tuple(column.format(unit="ms" if in_ms else "us") for column in COLUMNS)
        result.append((f"{subject}, {dtype}", columns, [_line(row, in_ms) for row in group]))
    return result


def _line(row: Row, in_ms: bool) -> tuple[str, ...]:
    unit = 1e3 if in_ms else 1.0
    peer = f"{figure(row.peer_us / unit)} {row.peer}" if row.peer_us else "-"
    over_floor = f"{figure(row.over_floor)} ({row.bound})" if row.over_floor else "-"
    notes = [f"{figure(value)} {name}" for name, value in row.extra.items()]
    notes += [row.note] if row.note else []
    return (
        row.case,
        figure(row.us / unit),
        over_floor,
        peer,
        f"{row.over_peer:.2f}" if row.over_peer else "-",
        ", ".join(notes),
    )


def figure(value: float | None) -> str:
    """Three significant digits; whole numbers above 100."""
    if value is None:
        return "-"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


# --- the terminal -------------------------------------------------------------------------------------------


def print_report(report: Report, console: Console | None = None) -> None:
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    for title, columns, lines in tables(report.rows):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in ("case", "peer", "note") else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print("\n".join(_provenance(report)), highlight=False, markup=False)


def _provenance(report: Report) -> list[str]:
    commit = f" at {report.commit}" if report.commit else ""
    versions = f"fastkernels {report.fastkernels}{commit}, torch {report.torch}"
    ceilings = ", ".join(f"{figure(value)} {name}" for name, value in report.ceilings.items())
    lines = [f"{report.machine}; {report.date}; {versions}"]
    return [*lines, f"Ceilings of the run: {ceilings}"] if ceilings else lines


# --- the page -----------------------------------------------------------------------------------------------


def kept_reports(folder: Path = RESULTS) -> list[Report]:
    """GPUs first, then CPUs, each by name; engine, attention, the other ops, as the files are named."""
    order = {"engine": 0, "attention": 1}
    paths = sorted(
        folder.glob("*/*.json"), key=lambda path: (path.parent.name, order.get(path.stem, 2), path.stem)
    )
    return sorted((Report.read(path) for path in paths), key=lambda report: not report.cuda)


def page(reports: list[Report]) -> str:
    """docs/performance.md."""
    lines = [HEADER]
    for machine, group in itertools.groupby(reports, key=lambda report: report.machine):
        lines.append(f"## {machine}\n")
        for report in group:
            again = report.command + (" --device cuda" if report.cuda else " --device cpu")
            lines += [f"{line}." for line in _provenance(report)]
            lines.append(f"Again: `{again} --json PATH`.\n")
            for title, columns, table in tables(report.rows):
                lines.append(f"### {title}\n")
                lines.append(_markdown_row(columns))
                lines.append(
                    _markdown_row("---:" if column in ("us", "ms", "x peer") else "---" for column in columns)
                )
                lines += [_markdown_row(line) for line in table]
                lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(results: Path = RESULTS, target: Path = PAGE) -> str:
    """Writes the page; returns a line that says so."""
    reports = kept_reports(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(reports), encoding="utf-8")
    return f"{target.name}: rendered from {len(reports)} kept reports"
