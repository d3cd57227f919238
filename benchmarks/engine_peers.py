"""The peers of the engine: transformers in this process, vLLM in one of its own, at the same shapes."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastkernels.models.presets import PRESETS

Case = tuple[int, int]
FEW, MANY = 9, 25  # tokens generated: transformers takes four times as long a step
MAX_BATCH = 32  # of transformers: its cache grows by a copy a step


@dataclass
class Times:
    """Microseconds by case."""

    decode: dict[Case, float] = field(default_factory=dict)
    prefill: dict[int, float] = field(default_factory=dict)


def measure(model: str, cases: list[Case], prefills: list[int]) -> dict[str, Times]:
    """The peers that are there, by name."""
    peers = {}
    if importlib.util.find_spec("transformers"):
        peers["transformers"] = _transformers(model, cases, prefills)
        gc.collect()
        torch.cuda.empty_cache()
    if os.environ.get("FASTKERNELS_BENCH_VLLM") == "1":
        peers["vLLM"] = _vllm(model, cases, prefills)
    return peers


def _config(model: str) -> dict[str, Any]:
    """config.json of a preset."""
    c = PRESETS[model]
    scaling = c.rope_scaling
    config: dict[str, Any] = {
        "architectures": [c.architecture],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_q_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_word_embeddings,
        "hidden_act": c.hidden_act,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_ids[0],
        "torch_dtype": "bfloat16",
    }
    if scaling.kind == "llama3":
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    return config


def _transformers(model: str, cases: list[Case], prefills: list[int]) -> Times:
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_config(model)), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def generate(batch: int, context: int, num_tokens: int) -> float:
        ids = torch.randint(1000, 100000, (batch, context), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    times = Times()
    generate(1, 128, 4)
    for num_tokens in prefills:
        times.prefill[num_tokens] = min(generate(1, num_tokens, 1) for _ in range(3)) * 1e6
        print(
            f"transformers, prefill {num_tokens}: {times.prefill[num_tokens] / 1e3:.1f} ms", file=sys.stderr
        )
    for batch, context in cases:
        if batch > MAX_BATCH:
            continue
        short = min(generate(batch, context, FEW) for _ in range(2))
        long = min(generate(batch, context, MANY) for _ in range(2))
        times.decode[batch, context] = (long - short) / (MANY - FEW) * 1e6
        ms = times.decode[batch, context] / 1e3
        print(f"transformers, decode {batch} x {context}: {ms:.2f} ms a step", file=sys.stderr)
    return times


# --- vLLM ---------------------------------------------------------------------------------------------------


def _vllm(model: str, cases: list[Case], prefills: list[int]) -> Times:
    """In a process of its own, since it wants all of the GPU's memory and leaves none behind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_config(model)), encoding="utf-8")
        out = Path(folder, "times.json")
        request = json.dumps({"folder": folder, "cases": cases, "prefills": prefills, "out": str(out)})
        subprocess.run(
            [sys.executable, "-m", "benchmarks.engine_peers"], input=request, text=True, check=True
        )
        found = json.loads(out.read_text(encoding="utf-8"))
    decode = {(batch, context): us for batch, context, us in found["decode"]}
    return Times(decode, {int(num_tokens): us for num_tokens, us in found["prefill"]})


def _measure_vllm(folder: str, cases: list[Case], prefills: list[int], out: str) -> None:
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    few, many = 33, 161
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=9000,
        max_num_seqs=256,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
    )
    rng = random.Random(0)

    def generate(batch: int, context: int, num_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(context)]} for _ in range(batch)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    generate(1, 128, 16)
    found: dict[str, list[tuple[float, ...]]] = {"decode": [], "prefill": []}
    for num_tokens in prefills:
        times = sorted(generate(1, num_tokens, 1) for _ in range(5))
        found["prefill"].append((num_tokens, times[2] * 1e6))
    for batch, context in cases:
        short = min(generate(batch, context, few) for _ in range(2))
        long = min(generate(batch, context, many) for _ in range(2))
        us = (long - short) / (many - few) * 1e6
        found["decode"].append((batch, context, us))
        print(f"vLLM, decode {batch} x {context}: {us / 1e3:.3f} ms a step", file=sys.stderr)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _measure_vllm(**json.load(sys.stdin))
