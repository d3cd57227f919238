"""The file that keeps what was timed: by GPU, version of this library, product and bucket of tokens.

{"format": 1, "gpus": {"NVIDIA H200": {"0.1.0": {"linear bf16 6144x4096": {"32": {
    "tactic": "matmul 9", "us": {"torch": 17.2, "matmul 9": 15.6, ...}}}}}}}

A product goes by ``Product.__str__``: one that is gated, and so timed with its activation, apart from the
same without.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkernels.compiler.tune.tactics import Tactic

FILE_NAME = "tactics.json"
_FORMAT = 1


@dataclass(frozen=True)
class Timed:
    """The tactic that was the fastest of a bucket, and the microseconds of all."""

    tactic: Tactic
    us: Mapping[Tactic, float]


Entries = dict[str, dict[int, Timed]]
"""Of one GPU and version: str(product) -> bucket -> what was timed."""


class TacticCache:
    """The entries of one GPU and library version in the file at ``path``; those of others are left alone.

    A file that cannot be read or is not what this class writes counts as empty, which one warning says; the
    next ``store`` writes it anew. Files are replaced whole, so that a reader never sees half of one; of two
    processes that store at the same moment, one may lose what it stored, and times it again.
    """

    def __init__(self, path: Path, gpu: str, version: str) -> None:
        self.path = path
        self._gpu, self._version = gpu, version
        self._is_broken = False  # and was reported

    def read(self) -> Entries:
        found = self._read_file()["gpus"].get(self._gpu, {}).get(self._version, {})
        return {
            product: {int(bucket): _timed(entry) for bucket, entry in buckets.items()}
            for product, buckets in found.items()
        }

    def store(self, product: str, timed: Mapping[int, Timed]) -> None:
        """Adds to what there is of ``product``. Where nothing can be written, a warning says so."""
        whole = self._read_file()
        versions = whole["gpus"].setdefault(self._gpu, {})
        buckets = versions.setdefault(self._version, {}).setdefault(product, {})
        for bucket, one in timed.items():
            us = {str(tactic): round(time, 3) for tactic, time in one.us.items()}
            buckets[str(bucket)] = {"tactic": str(one.tactic), "us": us}
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(whole, indent=1), encoding="utf-8")
            beside.replace(self.path)
            self._is_broken = False
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            _warn(f"the tuner's cache {self.path} cannot be written ({error.strerror}); nothing is kept")

    def _read_file(self) -> dict[str, Any]:
        try:
            whole = json.loads(self.path.read_text(encoding="utf-8"))
            _check(whole)
        except FileNotFoundError:
            return {"format": _FORMAT, "gpus": {}}
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            if not self._is_broken:
                _warn(f"the tuner's cache {self.path} is of no use until it is rebuilt: {reason}")
            self._is_broken = True
            return {"format": _FORMAT, "gpus": {}}
        return dict(whole)


def _check(whole: Any) -> None:
    """Raises ValueError for what ``store`` does not write."""
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise ValueError(f"it is no file of format {_FORMAT}")
    for versions in _values(whole.get("gpus")):
        for products in _values(versions):
            for buckets in _values(products):
                for bucket, entry in zip(buckets, _values(buckets), strict=True):
                    if not bucket.isdecimal():
                        raise ValueError(f"{bucket!r} is no number of tokens")
                    _timed(entry)


def _values(mapping: Any) -> list[Any]:
    if not isinstance(mapping, dict):
        raise ValueError(f"{str(mapping)[:40]!r} stands where an object should")
    return list(mapping.values())


def _timed(entry: Any) -> Timed:
    times = entry.get("us") if isinstance(entry, dict) else None
    name = str(entry.get("tactic")) if times else ""
    if (
        not isinstance(times, dict)
        or name not in times
        or not all(isinstance(us, int | float) for us in times.values())
    ):
        raise ValueError(f"{str(entry)[:40]!r} stands where a tactic and times should")
    return Timed(Tactic.parse(name), {Tactic.parse(other): us for other, us in times.items()})


def _warn(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=2)
