"""How a time is taken: cold inputs, calls in a CUDA graph, the median of its replays, beside floor and peers.

On a GPU a case gets as many sets of inputs as pass the L2 cache three times (2 to 64), each with outputs of
its own; one call a set is captured in a CUDA graph, and the L2 is filled with other data before every timed
replay, so that every call finds its inputs in memory. The time is that of a replay divided by its calls. On
the CPU it is the wall time of the same calls one after the other. Every case is checked before it is timed.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.report import Report, Row

__all__ = [
    "Case",
    "Ceilings",
    "Report",
    "ResultError",
    "Row",
    "ceilings",
    "close",
    "floor",
    "run_cases",
    "time_us",
]

Call = Callable[[], Any]

CPU_CACHE_BYTES = 32 << 20  # what the inputs are rotated past three times on the CPU, whatever it has
TOLERANCE = {
    "bf16": 2e-2,
    "fp16": 5e-3,
    "fp32": 1e-4,
    "e4m3": 4e-2,  # values as bytes with scales: rounding to them is 2.6e-2
}  # of |result - expected| / |expected|: loose, it is no test
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class ResultError(RuntimeError):
    """A kernel that was about to be timed gave a wrong result, or none. rows: what else was measured."""

    def __init__(self, message: str, rows: Iterable[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


# --- the machine's ceilings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured in the same run as the rows.

    copy_tb_s:     a large copy, bytes read and written
    matrix_tflop_s: a large square matrix product in bf16 (CUDA) or fp32 (CPU)
    launch_us:     a kernel that depends on the one before it, inside a CUDA graph; on the CPU a torch op on
                   32 elements
    """

    copy_tb_s: float
    matrix_tflop_s: float
    launch_us: float

    def as_figures(self) -> dict[str, float]:
        if self.copy_tb_s < 0.5:  # a CPU
            rates = {"GB/s copy": 1e3 * self.copy_tb_s, "GFLOP/s matrix product": 1e3 * self.matrix_tflop_s}
        else:
            rates = {"TB/s copy": self.copy_tb_s, "TFLOP/s matrix product": self.matrix_tflop_s}
        return {**rates, "us launch": self.launch_us}


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measured at the first call of a process, a fraction of a second."""
    on_gpu = device.type == "cuda"
    return Ceilings(
        copy_tb_s=_copy_tb_s(device, 1 << 30 if on_gpu else 256 << 20),
        matrix_tflop_s=_matrix_tflop_s(
            device, *((8192, torch.bfloat16) if on_gpu else (1024, torch.float32))
        ),
        launch_us=_launch_us(device),
    )


def _copy_tb_s(device: torch.device, num_bytes: int) -> float:
    """By a kernel: a copy_ becomes a memcpy node of the graph, whose engine reaches two thirds of it."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_us([lambda: torch.neg(source, out=target)] * 4, device) / 1e6


def _matrix_tflop_s(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b, product = torch.randn(3, size, size, device=device, dtype=dtype)
    return 2 * size**3 / time_us([lambda: torch.mm(a, b, out=product)], device) / 1e6


def _launch_us(device: torch.device) -> float:
    x = torch.zeros(32, device=device)
    return time_us([lambda: x.add_(1.0)] * 500, device)


def floor(device: torch.device, *, num_bytes: float = 0, flops: float = 0) -> tuple[float, str]:
    """(microseconds, bound): the least time for moving num_bytes and computing flops in one kernel."""
    best = ceilings(device)
    terms = {
        "memory": num_bytes / best.copy_tb_s / 1e6,
        "matrix": flops / best.matrix_tflop_s / 1e6,
        "launch": best.launch_us,
    }
    bound = max(terms, key=terms.__getitem__)
    return terms[bound], bound


# --- one time -----------------------------------------------------------------------------------------------


def time_us(calls: list[Call], device: torch.device, *, quick: bool = False) -> float:
    """The median time of one of the calls, which run one after the other.

    On CUDA the calls must be such as a CUDA graph can capture; what they return is kept until the end, so
    that no two of them write the same memory.
    """
    if device.type == "cuda":
        return _time_cuda(calls, device, budget_us=10_000 if quick else 40_000)
    return _time_cpu(calls, budget_us=20_000 if quick else 200_000)


def _time_cuda(calls: list[Call], device: torch.device, budget_us: float) -> float:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:  # warm-up: modules load, libraries choose their algorithms, workspaces are made
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = [call() for call in calls]
    cache = torch.zeros(3 * _l2_bytes(device) // 4, device=device)
    total = torch.empty((), device=device)

    def replays(count: int) -> list[float]:
        # The cache is filled by reading: written lines would go back to memory during the replay, on its
        # account. It also gives the host time to submit the replay before the GPU gets to it.
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        for start, end in pairs:
            torch.sum(cache, dim=0, out=total)
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]

    one = statistics.median(replays(3))
    median = statistics.median(replays(max(5, min(50, int(budget_us / one)))))
    del results
    graph.reset()
    return median / len(calls)


def _time_cpu(calls: list[Call], budget_us: float) -> float:
    for call in calls:
        call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_us and len(times) < 50):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times) / len(calls)


def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _num_sets(device: torch.device, num_bytes: int, quick: bool) -> int:
    """Sets of inputs to rotate through, when a call touches num_bytes."""
    if device.type == "cuda":
        return max(2, min(64, math.ceil(3 * _l2_bytes(device) / num_bytes)))
    return max(1, min(2 if quick else 16, math.ceil(3 * CPU_CACHE_BYTES / num_bytes)))


# --- a case: a kernel, its floor, its peers -----------------------------------------------------------------


def close(result: Any, expected: Any, dtype: str) -> None:
    """Raises ResultError where |result - expected| / |expected| is above the dtype's tolerance, or is NaN."""
    results = result if isinstance(result, tuple) else (result,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for x, y in zip(results, wanted, strict=True):
        if x.shape != y.shape:
            raise ResultError(f"the result has shape {list(x.shape)}, expected {list(y.shape)}")
        y = y.float()
        error = ((x.float() - y).norm() / y.norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[dtype]:
            raise ResultError(f"the result is off by {error:.3g} of its norm; {TOLERANCE[dtype]} is allowed")


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    make:    a new set of inputs
    ours:    from a set of inputs to the call that is timed, which allocates nothing
    peers:   the same of others, by name; one that raises is reported and left out
    expect:  from a set of inputs to what a call on them gives
    compare: (result, expected, dtype); raises ResultError
    num_bytes: read and written by a call, each byte once; also what a set of inputs counts against the cache
    flops:   of its matrix products
    """

    subject: str
    name: str
    dtype: torch.dtype
    make: Callable[[], Any]
    ours: Callable[[Any], Call]
    expect: Callable[[Any], Any]
    num_bytes: int
    flops: int = 0
    peers: Mapping[str, Callable[[Any], Call]] = field(default_factory=dict)
    compare: Callable[[Any, Any, str], None] = close
    note: str = ""


def run_cases(cases: Iterable[Case], *, device: torch.device, quick: bool, only: str | None) -> list[Row]:
    """Measures the cases whose "subject case" contains only; a line each to stderr.

    Raises ResultError after the last case when one or more failed, with the rows of the others.
    """
    rows: list[Row] = []
    failures: list[str] = []
    for case in cases:
        if only and only.lower() not in f"{case.subject} {case.name}".lower():
            continue
        try:
            rows.append(_measure(case, device, quick))
        except (RuntimeError, ValueError) as error:  # the cases after it are still worth their time
            failures.append(f"{case.subject}, {case.name}: {type(error).__name__}: {error}")
            _say(f"FAILED: {failures[-1]}")
        _give_back(device)
    if failures:
        raise ResultError("; ".join(failures), rows)
    return rows


def _give_back(device: torch.device) -> None:
    """Frees what no tensor holds, and waits until the driver has cleared it.

    It does so in the background, writing about 0.6 TB/s on an H200, and as long as that takes every kernel
    reads at 3.97 TB/s instead of 4.58: 12% of the time of a decode row, after a reference that took 10 GB.
    """
    if device.type != "cuda":
        return
    gc.collect()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    time.sleep((before - torch.cuda.memory_reserved(device)) / 0.4e12)


def _measure(case: Case, device: torch.device, quick: bool) -> Row:
    dtype = NAMES[case.dtype]
    where = f"{case.subject}, {case.name}"

    def contender(prepare: Callable[[Any], Call]) -> float:
        torch.manual_seed(0)
        inputs = case.make()
        expected = case.expect(inputs)  # before the call, which may write its inputs
        case.compare(prepare(inputs)(), expected, dtype)
        del inputs, expected
        _give_back(device)
        num_sets = _num_sets(device, case.num_bytes, quick)
        return time_us([prepare(case.make()) for _ in range(num_sets)], device, quick=quick)

    us = contender(case.ours)
    peers: dict[str, float] = {}
    for name, prepare in case.peers.items():
        try:
            peers[name] = contender(prepare)
        except Exception as error:  # noqa: PERF203  whatever somebody else's code raises, our figures stand
            _say(f"{where}: {name} left out: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    peer = min(peers, key=peers.__getitem__, default="")
    floor_us, bound = floor(device, num_bytes=case.num_bytes, flops=case.flops)
    row = Row(
        subject=case.subject,
        case=case.name,
        device=device.type,
        dtype=dtype,
        us=us,
        floor_us=floor_us,
        bound=bound,
        peer=peer,
        peer_us=peers.pop(peer, None),
        extra=_rate(case, us, bound, device),
        others=peers,
        note=case.note,
    )
    beside = f", {peer} {row.peer_us:.4g} us" if row.peer_us else ""
    _say(f"{where}: {us:.4g} us, {row.over_floor:.2f} x floor{beside}")
    return row


def _rate(case: Case, us: float, bound: str, device: torch.device) -> dict[str, float]:
    """What comes nearest to a ceiling, in the unit that suits the device."""
    amount, unit = (case.flops, "FLOP/s") if bound == "matrix" else (case.num_bytes, "B/s")
    if device.type == "cuda":
        return {f"T{unit}": amount / us / 1e6}
    return {f"G{unit}": amount / us / 1e3}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
