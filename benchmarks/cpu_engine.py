"""The engine on the CPU: the demo model beside transformers, batch 1, greedy, fp32, two threads."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastkernels
from benchmarks.harness import ResultError, Row, ceilings
from fastkernels import LLM, SamplingParams

PROMPT = "def fibonacci(n):\n"
NUM_THREADS = 2
DEMO = Path(fastkernels.__file__).parent / "demo"


def run(*, device: torch.device, quick: bool, only: str | None) -> list[Row]:
    """One row, times a token; none when only is of something else or transformers is not installed."""
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
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
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
    finally:
        torch.set_num_threads(threads)
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
