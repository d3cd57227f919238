"""`python -m fastkernels.inspect MODEL`: what a model is compiled to. Reads no weight and needs no GPU."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastkernels import _C
from fastkernels.checkpoint import Checkpoint, model_folder
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.checkpoint.quantized import QuantizedWeights, StoredKV, quantization_config
from fastkernels.compiler import PASSES, Ledger, Plan, Step, compile_model, format_bytes
from fastkernels.compiler.ledger import estimate
from fastkernels.config import ConfigError, ModelConfig
from fastkernels.errors import ModelNotFoundError
from fastkernels.models.presets import PRESETS
from fastkernels.ops.gemm import matmul_workspace_bytes
from fastkernels.progress import failing_clearly
from fastkernels.runtime.step import StepBuffers
from fastkernels.runtime.weights import KV_KINDS

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_NAMED_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NUM_SMS = 132  # of an H200: the attention workspace is stated for one
_PIPED_WIDTH = 180  # columns of a file or a pipe: names are not folded there
_LAYER = re.compile(r"(?:\blayers|\bkv_cache)\.(\d+)")


def inspect(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, 'demo', or the name of a preset.")
    ] = "demo",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto: the checkpoint's.")] = "auto",
    max_num_tokens: Annotated[int, typer.Option(help="Tokens of a step at most.", min=1)] = 8192,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 64,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence; the model's when not given.", min=1)
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens of a KV cache page.", min=1)] = 16,
    memory_gib: Annotated[
        float | None, typer.Option("--memory", help="GPU memory in GiB: how many KV pages would fit.", min=0)
    ] = None,
    disable_pass: Annotated[
        list[str] | None, typer.Option(help=f"Leave out a pass: {', '.join(PASSES)}. May be repeated.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Scheme of the linears but the head, int4 say.")
    ] = None,
    head_quantization: Annotated[str | None, typer.Option(help="Scheme of the head.")] = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(help="Of the KV cache: fp8, int8, or auto: as the checkpoint says, else as --dtype."),
    ] = "auto",
    full: Annotated[bool, typer.Option("--full", help="Every layer, not the first and the last.")] = False,
) -> None:
    """Show the plan of a model, its kernels before and after fusion, and where its memory goes."""
    with failing_clearly():
        config = find_config(model)
        quantized = find_quantized(model)
        kv = None if quantized is None else Checkpoint(model_folder(model)).kv
        element_bytes = _element_bytes(dtype, config)
        plan = compile_model(
            config,
            disabled_passes=disable_pass or (),
            quantization=quantization,
            head_quantization=head_quantization,
            stored=None if quantized is None else quantized.linears,
            kv_cache=_kv_cache(kv_cache_dtype, kv),
            key_offsets=kv is not None and kv.offsets is not None,
        )
        seq_len = max_seq_len or config.max_position_embeddings
        ledger = estimate(
            plan,
            max_num_tokens=max_num_tokens,
            max_num_seqs=max_num_seqs,
            max_seq_len=seq_len,
            page_size=page_size,
            element_bytes=element_bytes,
            workspaces_bytes=_workspaces_bytes(config, max_num_tokens, max_num_seqs, seq_len, page_size)
            + (matmul_workspace_bytes(_NUM_SMS) if element_bytes == 2 else 0),
            available_bytes=None if memory_gib is None else int(memory_gib * 2**30),
        )
        if memory_gib is not None:
            ledger = ledger.with_pages(ledger.kv_pages_that_fit())
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _PIPED_WIDTH)
        console.print(_headline(model, config), markup=False, highlight=False)
        for table in (plan_table(plan, full=full), kernels_table(plan), ledger_table(ledger)):
            console.print()
            console.print(table)
        console.print(ledger.sentence(), markup=False, highlight=False)


def find_config(model: str) -> ModelConfig:
    """Of "demo", a preset or a checkpoint folder, of which only config.json is read.

    Raises ModelNotFoundError when it is none of them, CheckpointError or ConfigError for a bad config.json.
    """
    folder = model_folder(model)
    if model in PRESETS and not folder.exists():
        return PRESETS[model]
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"there is no model {model!r}: give a checkpoint folder, 'demo', or one of {', '.join(PRESETS)}"
        )
    return ModelConfig.from_dict(read_json_object(folder / "config.json"))


def find_quantized(model: str) -> QuantizedWeights | None:
    """Those weights of a checkpoint folder that are, by the headers of its files, which are read only where
    there are any."""
    folder = model_folder(model)
    if not folder.is_dir() or quantization_config(folder, read_json_object(folder / "config.json")) is None:
        return None
    return Checkpoint(folder).quantized


def _kv_cache(name: str, kv: StoredKV | None) -> str:
    """Dtype of the KV cache's elements, as plans have it. kv: what a quantised checkpoint says."""
    kinds = {kind: dtype for dtype, kind in KV_KINDS.items()}
    if name == "auto":
        return "model" if kv is None or kv.kind is None else kinds[kv.kind]
    if name not in kinds:
        raise ConfigError(f"kv_cache_dtype is {name!r}; it must be auto, {', '.join(kinds)}")
    return kinds[name]


def plan_table(plan: Plan, *, full: bool = False) -> Table:
    """The steps in order; without ``full``, the layers between the first and the last in one line."""
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column in ("step", "op", "reads", "writes", "attributes"):
        table.add_column(column, overflow="fold", justify="right" if column == "step" else "left")
    last = plan.config.num_layers - 1
    number = 0
    for layer, group in groupby(plan.steps, key=_layer_of):
        steps = list(group)
        if layer is not None and 0 < layer < last and not full:
            if layer == 1:
                between = "layer 1" if last == 2 else f"layers 1 to {last - 1}"
                table.add_row("...", Text(between), Text(f"{len(steps)} steps each"), "", "")
        else:
            for offset, step in enumerate(steps):
                table.add_row(str(number + offset), *(Text(cell) for cell in plan.describe(step)))
        number += len(steps)
    return table


def kernels_table(plan: Plan) -> Table:
    """Kernels a step launches, as traced and after each pass."""
    report = plan.report
    table = Table(title="Kernels a step", title_justify="left", box=None, pad_edge=False)
    table.add_column("after")
    table.add_column("kernels", justify="right")
    table.add_row("trace (before fusion)", str(report.kernels_before))
    for name, count in report.after_pass.items():
        table.add_row(name, str(count))
    for name in report.disabled_passes:
        table.add_row(f"{name} (disabled)", "-")
    table.add_row("plan (after fusion)", str(report.kernels_after))
    return table


def ledger_table(ledger: Ledger) -> Table:
    """Bytes by part; graphs are measured when an engine starts and are no part of this estimate."""
    table = Table(title="Memory", title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("")
    notes = {
        "arena": f"{format_bytes(ledger.arena_unshared_bytes)} if nothing were shared",
        "workspaces": f"step buffers, rotary table, attention and products on {_NUM_SMS} multiprocessors",
        "graphs": "measured when an engine starts",
    }
    for name, size_bytes in ledger.parts.items():
        table.add_row(name, f"{size_bytes:,}", f"{format_bytes(size_bytes)}  {notes.get(name, '')}".rstrip())
    page = f"{format_bytes(ledger.kv_bytes_per_page)} for {ledger.page_size} tokens"
    table.add_row("a KV page", f"{ledger.kv_bytes_per_page:,}", page)
    if ledger.num_pages:
        tokens = f"{ledger.num_pages:,} pages, {ledger.num_pages * ledger.page_size:,} tokens"
        table.add_row("KV cache", f"{ledger.kv_bytes:,}", f"{format_bytes(ledger.kv_bytes)}  {tokens}")
    return table


def _headline(model: str, config: ModelConfig) -> str:
    return (
        f"{model}: {config.architecture}, {config.num_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_q_heads} query and {config.num_kv_heads} key-value heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}"
    )


def _layer_of(step: Step) -> int | None:
    """The latest layer that the step names a weight, cache or value of."""
    found = [int(number) for name in (*step.inputs, *step.outputs) for number in _LAYER.findall(name)]
    return max(found, default=None)


def _element_bytes(dtype: str, config: ModelConfig) -> int:
    name = _NAMED_DTYPES[config.dtype] if dtype == "auto" else dtype
    if name not in _ELEMENT_BYTES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(_ELEMENT_BYTES)}")
    return _ELEMENT_BYTES[name]


def _workspaces_bytes(
    config: ModelConfig, max_num_tokens: int, max_num_seqs: int, max_seq_len: int, page_size: int
) -> int:
    map_ints, workspace_floats = _C.attention_sizes(
        max_num_tokens, max_num_seqs, config.num_q_heads, config.num_kv_heads, config.head_dim, _NUM_SMS
    )
    buffers = StepBuffers(max_num_tokens, max_num_seqs, -(-max_seq_len // page_size), "cpu")
    return 4 * (map_ints + workspace_floats) + buffers.size_bytes


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(name="inspect")(inspect)

if __name__ == "__main__":
    app(prog_name="python -m fastkernels.inspect")
