"""From the name of a model to an engine that serves it: compile, load, size the KV cache, capture graphs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastkernels._library import _C
from fastkernels.checkpoint import (
    Checkpoint,
    GenerationConfig,
    Tokenizer,
    model_folder,
    read_generation_config,
)
from fastkernels.checkpoint.quantized import KVKind, QuantizedWeights, StoredKV, StoredLinear
from fastkernels.compiler import EngineMemoryError, Ledger, Plan, compile_model, format_bytes
from fastkernels.compiler.ledger import estimate, kv_bytes_per_page
from fastkernels.compiler.tune import (
    BY_RULE,
    FILE_NAME,
    Choices,
    Product,
    Tactic,
    TacticCache,
    matmul_runs_on,
    products_of,
    tune,
)
from fastkernels.compiler.tune.timer import CudaTimer
from fastkernels.config import ConfigError, EngineConfig, ModelConfig, TuneMode, cache_folder, tune_mode
from fastkernels.errors import ModelNotFoundError
from fastkernels.models.presets import PRESETS
from fastkernels.ops.device import choose_device
from fastkernels.ops.gemm import matmul_workspace_bytes_on
from fastkernels.quantize import on_cuda, stored_on_cuda
from fastkernels.runtime.engine import Engine
from fastkernels.runtime.executor import Executor
from fastkernels.runtime.kv_cache import KVCache
from fastkernels.runtime.weights import KV_KINDS, load_weights, random_weights

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LARGEST_BUCKET = 512
_CPU_CACHE_BYTES = 1 << 30  # what the CPU's cache takes at most unless it is told otherwise
_CPU_CACHE_TOKENS_PER_SEQ = 2048

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class ModelSource:
    """What a model's name stands for. folder, checkpoint, tokenizer: None where there is none."""

    name: str
    config: ModelConfig
    generation_config: GenerationConfig
    checkpoint: Checkpoint | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and what it was made of."""

    engine: Engine
    executor: Executor
    plan: Plan
    ledger: Ledger
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    max_seq_len: int


def find_model(name: str | Path, *, random_weights: bool) -> ModelSource:
    """A checkpoint folder, "demo", or with random_weights the name of a preset.

    Raises ModelNotFoundError when it is none of them, CheckpointError or ConfigError when a folder cannot be
    read.
    """
    folder = model_folder(name)
    if name != "demo" and not folder.exists() and str(name) in PRESETS:
        if not random_weights:
            raise ModelNotFoundError(
                f"{name} names the shapes of a model, not a checkpoint; give the folder of one, "
                "or random weights"
            )
        config = PRESETS[str(name)]
        return ModelSource(str(name), config, GenerationConfig(config.eos_token_ids), None, None)
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"there is no model {str(name)!r}: give a checkpoint folder, 'demo', or, with random "
            f"weights, one of {', '.join(PRESETS)}"
        )
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return ModelSource(str(name), config, read_generation_config(folder, config), checkpoint, tokenizer)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        return config.torch_dtype if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def choose_kv_cache(name: str, kv: StoredKV | None, device: torch.device, dtype: torch.dtype) -> str:
    """The dtype of the KV cache's elements as plans have it: "model", or of bytes.

    name: ``EngineConfig.kv_cache_dtype``; kv: what the checkpoint says about it, None for random weights
    Warns of FP8 without scales, and where "auto" cannot do as the checkpoint says. Raises ConfigError for
    bytes that this engine has no kernels or no scales for, and for a dtype other than its own.
    """
    of_bytes = {kind: dtype_name for dtype_name, kind in KV_KINDS.items()}
    if name == "auto":
        kind = None if kv is None else kv.kind
        why = None if kind is None else _no_kv_cache(kind, kv, device, dtype)
        if kv is not None and kv.unread is not None:
            why = f"fastkernels has none as {kv.unread} asks for"
        if why is not None:
            warnings.warn(f"the KV cache is held in {dtype}: {why}", stacklevel=2)
            kind = None
    elif name in _DTYPES:
        if _DTYPES[name] != dtype:
            own = next(key for key, value in _DTYPES.items() if value == dtype)
            raise ConfigError(
                f"kv_cache_dtype is {name}; the cache of this engine, whose dtype is {own}, is {own}, fp8 or "
                "int8"
            )
        return "model"
    else:
        kind = "fp8" if name == "fp8" else "int8"
        if (why := _no_kv_cache(kind, kv, device, dtype)) is not None:
            raise ConfigError(f"kv_cache_dtype is {name}: {why}")
    if kind is None:
        return "model"
    if kv is not None and not kv.names:
        warnings.warn(
            "the checkpoint has no scales for an FP8 KV cache; keys and values are rounded with a scale of "
            "1, which clips those above 448 (`fastkernels quantize --kv fp8` measures them)",
            stacklevel=2,
        )
    return of_bytes[kind]


def _no_kv_cache(kind: KVKind, kv: StoredKV | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an engine cannot have a cache of this kind; None where it can."""
    if kind == "int8" and kv is not None and len(kv.names) < 2 * kv.checkpoint.config.num_layers:
        return "an INT8 cache needs a scale for every layer, which `fastkernels quantize --kv int8` measures"
    if device.type == "cuda" and dtype == torch.float32:
        return "a KV cache of bytes on CUDA takes an engine of bf16 or fp16; this engine's dtype is fp32"
    return None


def compile_for(
    config: ModelConfig,
    options: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantized: QuantizedWeights | None = None,
    kv: StoredKV | None = None,
) -> Plan:
    """The plan of an engine on this device. quantized, kv: of the checkpoint.

    Raises ConfigError for schemes that it has no kernels for, and for ``options.quantization`` of what is
    quantised already.
    """
    schemes = [options.quantization, options.head_quantization]
    stored = {} if quantized is None else dict(quantized.linears)
    if quantized is not None and stored and options.quantization is not None:
        raise ConfigError(
            f"the checkpoint is quantised already ({quantized.method}); leave out "
            f"quantization={options.quantization!r}"
        )
    if device.type == "cuda" and (any(schemes) or stored):
        if dtype == torch.float32:
            raise ConfigError("quantised weights on CUDA take dtype bf16 or fp16; this engine's is fp32")
        capability = torch.cuda.get_device_capability(device)
        schemes = [name and on_cuda(name, capability) for name in schemes]
        stored = {name: _on_cuda(linear, capability) for name, linear in stored.items()}
    return compile_model(
        config,
        disabled_passes=options.disabled_passes,
        quantization=schemes[0],
        head_quantization=schemes[1],
        stored=stored,
        kv_cache=choose_kv_cache(options.kv_cache_dtype, kv, device, dtype),
        key_offsets=kv is not None and kv.offsets is not None,
    )


def _on_cuda(linear: StoredLinear, capability: tuple[int, int]) -> StoredLinear:
    if linear.scheme is None:
        return linear
    sizes = linear.module.out_size, linear.module.in_size
    return replace(linear, scheme=stored_on_cuda(linear.scheme, *sizes, capability))


def _warn_of_dense(name: str, stored: Mapping[str, StoredLinear], dtype: torch.dtype) -> None:
    dense = [linear for linear in stored.values() if linear.scheme is None]
    if dense:
        kind, (rows, size) = dense[0].weight_type, dense[0].block
        warnings.warn(
            f"{name}: {len(dense)} of {len(stored)} quantised linears are held in {dtype}, since no kernel "
            f"takes their format ({kind}, a scale for {rows} x {size})",
            stacklevel=2,
        )


def choose_tactics(
    plan: Plan,
    options: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    mode: TuneMode,
    again: bool = False,
    progress: Progress | None = None,
) -> Choices:
    """Of the plan's matrix products on a GPU, by ``compiler/tune``; on the CPU there is no choice."""
    if device.type == "cpu":
        return BY_RULE
    timer: CudaTimer | None = None

    def time_us(product: Product, num_tokens: int, tactic: Tactic) -> float:
        nonlocal timer
        timer = timer or CudaTimer(device)
        return timer(product, num_tokens, tactic)

    def timed(done: int, total: int) -> None:
        if progress is not None:
            progress("timing matrix products", done, total)

    choices = tune(
        products_of(plan, dtype, max_num_tokens=options.max_num_tokens, max_num_seqs=options.max_num_seqs),
        TacticCache(cache_folder() / FILE_NAME, torch.cuda.get_device_name(device), _C.version),
        time_us,
        mode=mode,
        capability=torch.cuda.get_device_capability(device),
        again=again,
        progress=timed,
    )
    if timer is not None:
        timer = None
        torch.cuda.empty_cache()
    return choices


def build_engine(source: ModelSource, options: EngineConfig, progress: Progress | None = None) -> BuiltEngine:
    """Raises DeviceError, CompileError, CheckpointError, or EngineMemoryError with the arithmetic."""
    report = progress or (lambda stage, done, total: None)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, source.config, device)
    quantized = None if source.checkpoint is None else source.checkpoint.quantized
    report("compiling", 0, 1)
    kv = None if source.checkpoint is None or options.random_weights else source.checkpoint.kv
    plan = compile_for(source.config, options, device, dtype, quantized, kv)
    if quantized is not None:
        _warn_of_dense(source.name, quantized.linears, dtype)
    report("compiling", 1, 1)

    available_bytes = _available_bytes(device, options.kv_cache_fraction)
    bytes_per_page = kv_bytes_per_page(plan, options.page_size, dtype.itemsize)
    context = source.config.max_position_embeddings
    if options.max_seq_len is not None and options.max_seq_len > context:
        raise ConfigError(f"max_seq_len is {options.max_seq_len}; the model's context has {context} tokens")
    max_seq_len = options.max_seq_len or context
    if options.max_seq_len is None:
        roof = options.kv_cache_bytes or available_bytes
        max_seq_len = max(min(max_seq_len, roof // bytes_per_page * options.page_size), 2)

    if device.type == "cuda":  # refuse what cannot fit before anything is loaded
        planned = estimate(
            plan,
            max_num_tokens=options.max_num_tokens,
            max_num_seqs=options.max_num_seqs,
            max_seq_len=max_seq_len,
            page_size=options.page_size,
            element_bytes=dtype.itemsize,
            workspaces_bytes=matmul_workspace_bytes_on(device) if matmul_runs_on(device, dtype) else 0,
        )
        planned.kv_pages_that_fit(available_bytes)
    choices = choose_tactics(plan, options, device, dtype, mode=tune_mode(), progress=progress)

    def loaded(done: int, total: int) -> None:
        report("loading weights", done, total)

    if options.random_weights or source.checkpoint is None:
        weights = random_weights(plan, device=device, dtype=dtype, progress=loaded)
    else:
        weights = load_weights(plan, source.checkpoint, device=device, dtype=dtype, progress=loaded)
    executor = Executor(
        plan,
        weights,
        device=device,
        dtype=dtype,
        max_num_tokens=options.max_num_tokens,
        max_num_seqs=options.max_num_seqs,
        max_seq_len=max_seq_len,
        page_size=options.page_size,
        choices=choices,
    )
    if device.type == "cuda":
        _warm_up(executor, options)
        available_bytes = _available_bytes(device, options.kv_cache_fraction)
    num_pages = _num_pages(options, bytes_per_page, available_bytes, max_seq_len, device)
    max_pages = -(-max_seq_len // options.page_size)
    if num_pages < max_pages:
        if options.max_seq_len is not None or num_pages == 0:
            needed, room = max_pages * bytes_per_page, num_pages * bytes_per_page
            raise EngineMemoryError(
                f"no memory for the KV cache: one sequence of {max_seq_len} tokens takes {max_pages} pages x "
                f"{format_bytes(bytes_per_page)} = {format_bytes(needed)}, and there is room for {num_pages} "
                f"pages = {format_bytes(room)}; lower max_seq_len or raise kv_cache_bytes"
            )
        max_seq_len = num_pages * options.page_size
    executor.set_kv_cache(num_pages)
    buckets: list[int] = []
    if device.type == "cuda" and options.cuda_graphs:
        buckets = graph_buckets(options.max_num_tokens, options.max_num_seqs)
        for done, bucket in enumerate(reversed(buckets)):  # the largest first: smaller ones share its memory
            report("capturing CUDA graphs", done, len(buckets))
            num_logits = min(bucket, options.max_num_seqs)
            executor.capture(bucket, num_logits)
            if bucket == num_logits:  # also of decodes alone, which want fewer launches
                executor.capture(bucket, num_logits, 1)
        report("capturing CUDA graphs", len(buckets), len(buckets))
    engine = Engine(
        executor,
        KVCache(num_pages, options.page_size, options.max_num_seqs),
        vocab_size=source.config.vocab_size,
        max_seq_len=max_seq_len,
        max_num_tokens=options.max_num_tokens,
        generation_config=source.generation_config,
        buckets=buckets,
    )
    return BuiltEngine(
        engine, executor, plan, executor.ledger, device, dtype, executor.kv_caches[0].dtype, max_seq_len
    )


def graph_buckets(max_num_tokens: int, max_num_seqs: int) -> list[int]:
    """Token counts that get a CUDA graph: dense where decode steps lie, so that little is padded."""
    largest = min(max_num_tokens, max(_LARGEST_BUCKET, max_num_seqs))
    sizes = {1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, largest + 1, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= largest)


def _available_bytes(device: torch.device, fraction: float) -> int:
    """Of the GPU: fraction of its memory, less what is taken. Of the CPU: a quarter of its memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(free - (1 - fraction) * total), 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _num_pages(
    options: EngineConfig, bytes_per_page: int, available_bytes: int, max_seq_len: int, device: torch.device
) -> int:
    """Pages the cache gets: what it was told, else what there is, but no more than all rows could fill."""
    pages_per_seq = -(-max_seq_len // options.page_size)
    most = options.max_num_seqs * pages_per_seq
    if options.kv_cache_bytes is not None:
        if options.kv_cache_bytes > available_bytes:
            asked, available = format_bytes(options.kv_cache_bytes), format_bytes(available_bytes)
            raise EngineMemoryError(
                f"no memory for the KV cache: kv_cache_bytes asks for {asked}, and {available} are available "
                f"on {device}"
            )
        return min(options.kv_cache_bytes // bytes_per_page, most)
    if device.type == "cuda":
        return min(available_bytes // bytes_per_page, most)
    usual_tokens = options.max_num_seqs * min(max_seq_len, _CPU_CACHE_TOKENS_PER_SEQ)
    usual = min(-(-usual_tokens // options.page_size), _CPU_CACHE_BYTES // bytes_per_page)
    return min(max(usual, pages_per_seq), available_bytes // bytes_per_page, most)


def _warm_up(executor: Executor, options: EngineConfig) -> None:
    """One step of padding at full size, so that what libraries allocate on first use is counted."""
    executor.set_kv_cache(1)
    executor.inputs.upload(executor.inputs.max_pages_per_seq)
    executor.run(options.max_num_tokens, options.max_num_seqs)
    torch.cuda.synchronize(executor.inputs.device)
