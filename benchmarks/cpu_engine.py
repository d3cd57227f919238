"""The engine on the CPU, batch 1, greedy, two threads.

The demo model beside transformers in fp32; the demo model and Llama-3.2-1B's shapes with quantised weights
beside themselves in bf16, and beside the machine's read bandwidth.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch

import fastkernels
from benchmarks.harness import ResultError, Row, ceilings
from fastkernels import LLM, SamplingParams

PROMPT = "def fibonacci(n):\n"
NUM_THREADS = 2
DEMO = Path(fastkernels.__file__).parent / "demo"

# Schemes of the linears and of the head, which is kept in bf16 without one.
SCHEMES = ((None, None), ("int8", None), ("int8", "int8"), ("int8-weight", "int8-weight"))
SCHEMES += (("int4", None), ("int4", "int8"), ("int4", "int4"))


def run(*, device: torch.device, quick: bool, only: str | None) -> list[Row]:
    """Times a token. Rows of other subjects and cases than only are left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    load = os.getloadavg()[0]  # of what else runs: above some tenths, a run is not one to keep
    try:
        rows = _beside_transformers(quick, only)
        rows += _quantized("demo", 20 if quick else 100, 2 if quick else 8, only, load)
        if not quick:
            rows += _quantized("llama-3.2-1b", 16, 5, only, load)
    finally:
        torch.set_num_threads(threads)
    return rows


def _quantized(model: str, num_tokens: int, rounds: int, only: str | None, load: float) -> list[Row]:
    """Every scheme of SCHEMES; the floor is the bytes of the linears' weights at the read bandwidth.

    The least time of some rounds in which the engines take turns: a shared machine disturbs most of them.
    """
    subject = f"quantised engine on the CPU, {model}"
    if only and only.lower() not in subject.lower():
        return []
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    options = {"device": "cpu", "dtype": "bf16", "max_num_seqs": 1, "max_seq_len": 256}
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                LLM(
                    model,
                    random_weights=model != "demo",
                    quantization=scheme,
                    head_quantization=head,
                    **options,
                )
            )
            for scheme, head in SCHEMES
        ]
        token_us, gb_s = [math.inf] * len(engines), _read_gb_s()
        for _ in range(rounds):
            for index, llm in enumerate(engines):
                timings = llm.generate(list(range(5, 16)), params)[0].timings
                token_us[index] = min(token_us[index], 1e6 / timings.tokens_per_s)
            gb_s = max(gb_s, _read_gb_s())
        rows = []
        for (scheme, head), llm, us in zip(SCHEMES, engines, token_us, strict=True):
            num_bytes = _linear_bytes(llm)
            case = "bf16" if scheme is None else f"{scheme}, head {head or 'bf16'}"
            rate = num_bytes / us / 1e3
            print(f"{subject}, {case}: {1e6 / us:.1f} tokens/s, {rate:.1f} GB/s", file=sys.stderr)
            rows.append(
                Row(
                    subject=subject,
                    case=case,
                    device="cpu",
                    dtype="bf16",
                    us=us,
                    floor_us=num_bytes / gb_s / 1e3,
                    bound="memory",
                    peer="" if scheme is None else "itself in bf16",
                    peer_us=None if scheme is None else token_us[0],
                    extra={"tokens/s": 1e6 / us, "GB/s of weights": rate, "of read bandwidth": rate / gb_s},
                    note=f"the least of {rounds} rounds; {gb_s:.1f} GB/s read in the same run; "
                    f"load {load:.1f} before",
                )
            )
    return rows


def _linear_bytes(llm: LLM) -> int:
    """Bytes of the weights that a step reads whole: those of its linears."""
    names = {name for step in llm.plan.steps if step.op.endswith("linear") for name in step.inputs}
    specs = [spec for name, spec in llm.plan.weights.items() if name in names]
    dtypes = [llm.dtype if spec.dtype == "model" else getattr(torch, spec.dtype) for spec in specs]
    return sum(prod(spec.shape) * dtype.itemsize for spec, dtype in zip(specs, dtypes, strict=True))


def _read_gb_s() -> float:
    """At best, of memory that no cache holds, by the sum of 512 MiB."""
    numbers = torch.ones(64 << 20, dtype=torch.int64)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best / 1e9


def _beside_transformers(quick: bool, only: str | None) -> list[Row]:
    """One row; none when only is of something else or transformers is not installed."""
    subject = "engine on the CPU, demo model"
    num_tokens = 20 if quick else 200
    case = f"batch 1, {num_tokens} tokens"
    if only and only.lower() not in f"{subject} {case}".lower():
        return []
    try:
        from transformers import AutoModelForCausalLM, __version__
    except ImportError:
        print("the peer of 'cpu' is transformers: pip install 'transformers>=4.57'", file=sys.stderr)
        return []
    plain = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with LLM("demo", device="cpu", dtype="fp32", max_num_seqs=1) as llm:
        ids = llm.tokenizer.encode(PROMPT)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}

        def ours() -> list[int]:
            return llm.generate(ids, params)[0].token_ids

        def theirs() -> list[int]:
            output = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            return output[0, len(ids) :].tolist()

        _check(ours(), theirs())  # also the warm-up of both
        us, peer_us = _medians_us([ours, theirs], rounds=2 if quick else 5)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in plain.parameters())
    floor_us = num_bytes / ceilings(torch.device("cpu")).copy_tb_s / 1e6
    per_second = 1e6 * num_tokens / us
    print(f"{subject}: {per_second:.0f} tokens/s, {peer_us / us:.2f} times transformers'", file=sys.stderr)
    return [
        Row(
            subject=subject,
            case=case,
            device="cpu",
            dtype="fp32",
            us=us / num_tokens,
            floor_us=floor_us,
            bound="memory",
            peer=f"transformers {__version__}",
            peer_us=peer_us / num_tokens,
            extra={"tokens/s": per_second},
            note=f"time of a token, the prompt of {len(ids)} included",
        )
    ]


def _check(ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        raise ResultError(
            f"the engine's {len(ours)} tokens and transformers' {len(theirs)} differ from number {first} on"
        )


def _medians_us(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Of each call, taken in turns so that whatever else the machine does falls on all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]
