"""Compile every CUDA kernel for sm_80 and sm_90a with nvcc alone: no GPU and no torch.

Fails on a compile error, on a kernel that spills registers, and on ptxas's C75xx warnings (wgmma serialised,
setmaxnreg dropped). Ends with the slowest files. A file is compiled again only when it, a header that it
includes, the flags or nvcc changed; its last result is kept in build/cuda-check.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "cuda-check"
FLAGS_FILE = ROOT / "csrc" / "nvcc_flags.txt"  # CMakeLists.txt reads the same file
ARCHITECTURES = ("80", "90a")
NUM_SLOWEST = 8

_FUNCTION = re.compile(r"(?:Function properties for|Compiling entry function) '?([\w$]+)'?")
_SPILL = re.compile(r"^\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SLOW_CODE = re.compile(r"\bC75\d\d\b")
_WARNING = re.compile(r"\bwarning\b", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One file for one architecture."""

    source: Path
    architecture: str

    @property
    def name(self) -> str:
        return f"{self.source.relative_to(ROOT)} (sm_{self.architecture})"

    @property
    def result_file(self) -> Path:
        relative = self.source.relative_to(ROOT / "csrc")
        return RESULTS / f"sm_{self.architecture}" / relative.with_suffix(".json")


@dataclass(frozen=True)
class Result:
    """What nvcc said. ``key`` is the hash of everything it read; ``headers`` are below the repository."""

    key: str
    returncode: int
    seconds: float
    log: str
    headers: list[str]


@dataclass(frozen=True)
class Spill:
    kernel: str
    store_bytes: int
    load_bytes: int


def find_nvcc() -> str | None:
    """$CUDACXX, then $PATH, then $CUDA_HOME and the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def arguments_of(job: Job, output: Path, depfile: Path) -> list[str]:
    flags = FLAGS_FILE.read_text(encoding="utf-8").split()
    target = f"-gencode=arch=compute_{job.architecture},code=sm_{job.architecture}"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    report = ["-Xptxas=-v", "-MD", "-MF", str(depfile)]
    return ["-std=c++20", *flags, target, *includes, *report, "-c", str(job.source), "-o", str(output)]


@cache
def nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout


@cache
def content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def key_of(nvcc: str, job: Job, headers: list[str]) -> str:
    """The hash of the compiler, its arguments and the contents of the source and its headers."""
    parts = [nvcc_version(nvcc), shlex.join(arguments_of(job, Path("o"), Path("d")))]
    parts += [content_hash(path) for path in (job.source, *(ROOT / header for header in headers))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def last_result(job: Job) -> Result | None:
    try:
        return Result(**json.loads(job.result_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def compile_one(nvcc: str, job: Job) -> Result:
    """Run nvcc and keep what it said; the object itself is of no use here and goes."""
    job.result_file.parent.mkdir(parents=True, exist_ok=True)
    output, depfile = job.result_file.with_suffix(".o"), job.result_file.with_suffix(".d")
    started = time.monotonic()
    command = [nvcc, *arguments_of(job, output, depfile)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - started
    headers = read_headers(depfile, job) if done.returncode == 0 else []
    result = Result(key_of(nvcc, job, headers), done.returncode, seconds, done.stdout, headers)
    if done.returncode == 0:
        job.result_file.write_text(json.dumps(asdict(result)), encoding="utf-8")
    else:
        job.result_file.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    depfile.unlink(missing_ok=True)
    return result


def read_headers(depfile: Path, job: Job) -> list[str]:
    """The repository's files in a make-style dependency file; the toolkit's are covered by its version."""
    names = depfile.read_text(encoding="utf-8").replace("\\\n", " ").split(":", 1)[1].split()
    paths = {Path(name).resolve() for name in names}
    return sorted(
        str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT) and path != job.source
    )


def spills(log: str) -> list[Spill]:
    """Every function of a ptxas -v log that spills."""
    found, function = [], "?"
    for line in log.splitlines():
        if named := _FUNCTION.search(line):
            function = named[1]
        if (counts := _SPILL.search(line)) and counts.groups() != ("0", "0"):
            found.append(Spill(demangled(function), int(counts[1]), int(counts[2])))
    return found


def demangled(name: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return name
    return subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() or name


def complaints(job: Job, result: Result) -> list[str]:
    """The sentences for which this job fails; empty when it is clean."""
    if result.returncode != 0:
        return [f"{job.name} does not compile:\n{result.log}"]
    said = [
        f"{job.name}: {spill.kernel} spills {spill.store_bytes} bytes of stores, {spill.load_bytes} of loads"
        for spill in spills(result.log)
    ]
    slow_code = [line.strip() for line in result.log.splitlines() if _SLOW_CODE.search(line)]
    return said + [f"{job.name}: {line}" for line in slow_code]


def print_other_warnings(job: Job, result: Result) -> None:
    for line in result.log.splitlines():
        if _WARNING.search(line) and not _SLOW_CODE.search(line) and "spill" not in line.lower():
            print(f"{job.name}: {line.strip()}")


def print_slowest(results: dict[Job, Result]) -> None:
    print("slowest files, seconds as last compiled:")
    slowest = sorted(results.items(), key=lambda item: -item[1].seconds)[:NUM_SLOWEST]
    for job, result in slowest:
        print(f"  {result.seconds:6.1f}  {job.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="only files with one of these in their path; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    arguments = parser.parse_args()

    nvcc = find_nvcc()
    if nvcc is None:
        print(
            "cuda-check: nvcc was not found; install the CUDA toolkit, or name it in CUDACXX", file=sys.stderr
        )
        return 2
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    wanted = [s for s in sources if not arguments.names or any(name in str(s) for name in arguments.names)]
    if not wanted:
        print(f"cuda-check: no .cu file has {arguments.names} in its path", file=sys.stderr)
        return 2

    started = time.monotonic()
    results: dict[Job, Result] = {}
    stale: dict[Job, float] = {}
    for job in (Job(source, architecture) for source in wanted for architecture in ARCHITECTURES):
        last = last_result(job)
        if last is not None and last.key == key_of(nvcc, job, last.headers):
            results[job] = last
        else:  # a file never compiled comes first: it may be the longest
            stale[job] = last.seconds if last is not None else float("inf")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        longest_first = sorted(stale, key=lambda job: -stale[job])
        running = {pool.submit(compile_one, nvcc, job): job for job in longest_first}
        for done, future in enumerate(as_completed(running), start=1):
            job, result = running[future], future.result()
            results[job] = result
            print(f"[{done}/{len(stale)}] {result.seconds:5.1f} s  {job.name}", flush=True)

    failed: list[str] = []
    for job, result in sorted(results.items(), key=lambda item: item[0].name):
        print_other_warnings(job, result)
        failed += complaints(job, result)
    print_slowest(results)
    targets = " and ".join(f"sm_{name}" for name in ARCHITECTURES)
    unchanged = len(results) - len(stale)
    print(
        f"{len(wanted)} files for {targets}: {len(stale)} compiled, {unchanged} unchanged, "
        f"{time.monotonic() - started:.0f} s"
    )
    for said in failed:
        print(said, file=sys.stderr)
    if failed:
        print(f"cuda-check: {len(failed)} complaints", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
