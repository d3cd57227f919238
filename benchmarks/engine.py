"""The engine at the shapes of released models, random weights: decode steps and prefill through LLM.generate.

A decode step is the difference between generating many and few tokens, divided by the steps between, so that
prefill and start cancel out. Peers, in the same run: transformers where it is installed, and vLLM where it is
and `FASTKERNELS_BENCH_VLLM=1` asks for it (a minute to start).
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import engine_peers
from benchmarks.harness import ResultError, Row, ceilings
from fastkernels import LLM, SamplingParams
from fastkernels.compiler import compile_model
from fastkernels.compiler.ledger import weights_bytes
from fastkernels.models.presets import PRESETS


@dataclass(frozen=True)
class Setup:
    """A model as it is run, by the arguments that LLM takes."""

    model: str
    quantization: str | None = None
    head_quantization: str | None = None
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        head = f", head {self.head_quantization}" if self.head_quantization else ""
        cache = f", {self.kv_cache_dtype} KV cache" if self.kv_cache_dtype != "auto" else ""
        return self.model + (f", {self.quantization}" if self.quantization else "") + head + cache


# The first is measured in full and beside its peers. Setup -> (batch, tokens of context)
CASES: dict[Setup, list[tuple[int, int]]] = {
    Setup("llama-3.1-8b"): [(1, 128), (1, 8192), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 512)],
    Setup("llama-3.1-8b", "fp8"): [(1, 128), (8, 1024), (64, 1024), (256, 512)],
    Setup("llama-3.1-8b", "int4"): [(1, 128), (8, 1024), (64, 1024)],
    Setup("llama-3.1-8b", "int4", "fp8-weight"): [(1, 128)],
    Setup("llama-3.1-8b", "int4", "int8-weight"): [(1, 128)],
    Setup("llama-3.1-8b", "fp8-block"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", "int8"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", "nvfp4"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", "mxfp4"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", "int8-weight"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", "int4-fp8"): [(1, 128), (64, 1024)],
    Setup("llama-3.1-8b", kv_cache_dtype="fp8"): [(1, 8192), (64, 1024), (128, 1024)],
    Setup("llama-3.1-8b", "fp8", kv_cache_dtype="fp8"): [(64, 1024), (256, 512)],
    Setup("qwen3-8b"): [(1, 128), (32, 1024), (128, 1024)],
    Setup("llama-3.2-1b"): [(1, 128), (32, 1024), (128, 1024)],
}
PREFILLS = [128, 2048, 8192]
FEW, MANY = 33, 161  # tokens generated
QUICK_FEW, QUICK_MANY = 5, 13


@dataclass
class Measured:
    """Microseconds by case; host_us of the decode cases."""

    decode: dict[tuple[int, int], float] = field(default_factory=dict)
    host: dict[tuple[int, int], float] = field(default_factory=dict)
    prefill: dict[int, float] = field(default_factory=dict)
    start_s: float = 0.0


def run(*, device: torch.device, quick: bool, only: str | None) -> list[Row]:
    """Rows of decode and prefill by model; quick: the smallest model, two cases.

    Raises ResultError after the last setup when one or more failed, with the rows of the others.
    """
    if device.type != "cuda":
        raise SystemExit("error: 'engine' measures a GPU; 'cpu' measures the engine on the CPU")
    ceilings(device)  # now: the driver clears an engine's memory behind it, which slows a copy
    wanted = {Setup("llama-3.2-1b"): [(1, 128), (8, 256)]} if quick else CASES
    rows: list[Row] = []
    failures: list[str] = []
    for setup, cases in wanted.items():
        cases = [case for case in cases if _selected(only, _decode_subject(setup), _decode_case(*case))]
        prefills = [n for n in PREFILLS if _selected(only, _prefill_subject(setup), _prefill_case(n))]
        if not cases and not prefills:
            continue
        ours = None
        try:
            ours = _measure_ours(setup, cases, prefills, device, quick)
        except (RuntimeError, ValueError, MemoryError) as error:  # the others are still worth their time
            failures.append(f"{setup}: {type(error).__name__}: {error}")
            _say(f"FAILED: {failures[-1]}")
        gc.collect()
        torch.cuda.empty_cache()
        if ours is None:
            continue
        peers: dict[str, engine_peers.Times] = {}
        if setup == next(iter(CASES)):
            peers = engine_peers.measure(setup.model, cases, prefills)
        rows += _rows(setup, ours, peers, device)
    if failures:
        raise ResultError("; ".join(failures), rows)
    return rows


def _measure_ours(
    setup: Setup, cases: list[tuple[int, int]], prefills: list[int], device: torch.device, quick: bool
) -> Measured:
    few, many = (QUICK_FEW, QUICK_MANY) if quick else (FEW, MANY)
    measured = Measured()
    began = time.perf_counter()
    rng = random.Random(0)
    with LLM(
        setup.model,
        device=str(device),
        random_weights=True,
        quantization=setup.quantization,
        head_quantization=setup.head_quantization,
        kv_cache_dtype=setup.kv_cache_dtype,
        max_num_seqs=max((batch for batch, _ in cases), default=1),
        max_seq_len=max([context + many for _, context in cases] + [n + 1 for n in prefills]),
        kv_cache_fraction=0.85,
    ) as llm:
        measured.start_s = time.perf_counter() - began

        def generate(batch: int, context: int, num_tokens: int) -> float:
            prompts = [[rng.randrange(1000, 100000) for _ in range(context)] for _ in range(batch)]
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            start = time.perf_counter()
            llm.generate(prompts, params)
            return time.perf_counter() - start

        generate(1, 128, 16)
        for num_tokens in prefills:
            times = [generate(1, num_tokens, 1) for _ in range(5)]
            measured.prefill[num_tokens] = statistics.median(times) * 1e6
            _say(f"{setup}, prefill {num_tokens}: {measured.prefill[num_tokens] / 1e3:.2f} ms")
        for batch, context in cases:
            short, short_host_us = _best(generate, llm, batch, context, few)
            long, long_host_us = _best(generate, llm, batch, context, many)
            us = (long - short) / (many - few) * 1e6
            host_us = (long_host_us - short_host_us) / (many - few)
            measured.decode[batch, context], measured.host[batch, context] = us, host_us
            _say(f"{setup}, decode {batch} x {context}: {us / 1e3:.3f} ms a step, host {host_us:.0f} us")
    return measured


def _best(
    generate: Callable[[int, int, int], float], llm: LLM, batch: int, context: int, num_tokens: int
) -> tuple[float, float]:
    """The faster of two runs: seconds, and microseconds of host work in it."""
    runs = []
    for _ in range(2):
        before = llm.stats.total_host_us
        seconds = generate(batch, context, num_tokens)
        runs.append((seconds, llm.stats.total_host_us - before))
    return min(runs)


def _rows(
    setup: Setup, ours: Measured, peers: dict[str, engine_peers.Times], device: torch.device
) -> list[Row]:
    best = ceilings(device)
    model, weight_bytes = setup.model, _weight_bytes(setup)
    rows = []
    for (batch, context), us in ours.decode.items():
        num_bytes = weight_bytes + batch * context * _kv_bytes_per_token(setup)
        beside = {name: t.decode[batch, context] for name, t in peers.items() if (batch, context) in t.decode}
        peer = min(beside, key=beside.__getitem__, default="")
        rows.append(
            Row(
                subject=_decode_subject(setup),
                case=_decode_case(batch, context),
                device="cuda",
                dtype="bf16",
                us=us,
                floor_us=num_bytes / best.copy_tb_s / 1e6,
                bound="memory",
                peer=peer,
                peer_us=beside.pop(peer, None),
                extra={"tokens/s": batch / us * 1e6, "host us": ours.host[batch, context]},
                others=beside,
            )
        )
    for num_tokens, us in ours.prefill.items():
        beside = {name: t.prefill[num_tokens] for name, t in peers.items() if num_tokens in t.prefill}
        peer = min(beside, key=beside.__getitem__, default="")
        flops = _prefill_flops(model, num_tokens)
        weights_us = weight_bytes / best.copy_tb_s / 1e6
        matrix_us = flops / best.matrix_tflop_s / 1e6
        rows.append(
            Row(
                subject=_prefill_subject(setup),
                case=_prefill_case(num_tokens),
                device="cuda",
                dtype="bf16",
                us=us,
                floor_us=max(weights_us, matrix_us),
                bound="matrix" if matrix_us > weights_us else "memory",
                peer=peer,
                peer_us=beside.pop(peer, None),
                extra={"TFLOP/s": flops / us / 1e6, "s from start to ready": ours.start_s},
                others=beside,
            )
        )
    return rows


# --- floors -------------------------------------------------------------------------------------------------


def _matrix_elements(model: str) -> int:
    """Of the layers, without the head."""
    c = PRESETS[model]
    attention = c.hidden_size * c.head_dim * (2 * c.num_q_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def _weight_bytes(setup: Setup) -> int:
    """What every step reads: all weights of the plan but the table of embeddings, of which it reads rows."""
    config = PRESETS[setup.model]
    plan = compile_model(config, quantization=setup.quantization, head_quantization=setup.head_quantization)
    table = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    return weights_bytes(plan, element_bytes=2) - table


def _kv_bytes_per_token(setup: Setup) -> int:
    c = PRESETS[setup.model]
    element_bytes = 2 if setup.kv_cache_dtype == "auto" else 1
    return 2 * element_bytes * c.num_layers * c.num_kv_heads * c.head_dim


def _prefill_flops(model: str, num_tokens: int) -> int:
    """The layers for every token, causal attention, the head for the last."""
    c = PRESETS[model]
    attention = c.num_layers * 2 * num_tokens * num_tokens * c.num_q_heads * c.head_dim
    return 2 * num_tokens * _matrix_elements(model) + attention + 2 * c.vocab_size * c.hidden_size


# --- names --------------------------------------------------------------------------------------------------


def _decode_subject(setup: Setup) -> str:
    return f"decode step, {setup}"


def _decode_case(batch: int, context: int) -> str:
    return f"{batch} x {context}"


def _prefill_subject(setup: Setup) -> str:
    return f"prefill, {setup}"


def _prefill_case(num_tokens: int) -> str:
    return f"{num_tokens} tokens"


def _selected(only: str | None, *texts: str) -> bool:
    return not only or only.lower() in " ".join(texts).lower()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
