"""What a run of the benchmarks says: rows, the machine they were measured on, and their JSON."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastkernels


@dataclass(frozen=True)
class Row:
    """One measurement. All times are medians in microseconds.

    subject:  the table it belongs to, "rms_norm" say
    case:     short and readable, unique within the subject: "64 tokens"
    device:   "cuda" | "cpu"
    dtype:    "bf16" | "fp16" | "fp32"
    floor_us: what the machine's measured ceilings allow at best, see ``harness.Ceilings``
    bound:    which ceiling that is: "memory" | "matrix" | "launch"
    peer:     the fastest peer of the same run; "" when there is none
    extra:    further figures, the unit as key: {"TB/s": 3.9, "tokens/s": 207}
    others:   the slower peers and their times
    note:     a few words for the table
    """

    subject: str
    case: str
    device: str
    dtype: str
    us: float
    floor_us: float | None = None
    bound: str = ""
    peer: str = ""
    peer_us: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def over_floor(self) -> float | None:
        return self.us / self.floor_us if self.floor_us else None

    @property
    def over_peer(self) -> float | None:
        """Below 1: faster than the peer."""
        return self.us / self.peer_us if self.peer_us else None


@dataclass(frozen=True)
class Report:
    """The rows of a run. ceilings: the unit as key, as in ``Row.extra``; commit: "" when git does not say."""

    machine: str
    torch: str
    cuda: str
    fastkernels: str
    commit: str
    date: str
    command: str
    ceilings: dict[str, float]
    rows: tuple[Row, ...]

    @classmethod
    def of_this_machine(
        cls,
        rows: list[Row],
        device: torch.device,
        ceilings: dict[str, float],
        command: str,
        commit: str | None = None,
    ) -> Report:
        return cls(
            machine=machine_name(device),
            torch=torch.__version__,
            cuda=(torch.version.cuda or "") if device.type == "cuda" else "",
            fastkernels=fastkernels.__version__,
            commit=_git_commit() if commit is None else commit,
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            command=command,
            ceilings=ceilings,
            rows=tuple(rows),
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises ValueError for a file that is not a report."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**fields, "rows": tuple(Row(**row) for row in fields["rows"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is not a report of the benchmarks: {error}") from error


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _rounded(value: Any) -> Any:
    """Four significant digits: more than a run repeats."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
