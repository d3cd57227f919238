"""``fastkernels evaluate``: what a model is worth, and what quantising it has cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from fastkernels.checkpoint import Checkpoint, model_folder
from fastkernels.errors import RequestError
from fastkernels.llm import LLM
from fastkernels.ops.device import choose_device
from fastkernels.progress import failing_clearly, loading_progress
from fastkernels.quantize.calibration import TextWindows, evaluation_windows
from fastkernels.quantize.decoder_layers import DecoderLayers
from fastkernels.runtime.build import Progress, find_model

WINDOW_TOKENS = 1024
_WINDOWS_AT_ONCE = 8  # that are scored between two moves of the progress bar
_LOGITS_AT_ONCE = 64
_LAYER_WINDOWS = 4  # that the layers are compared on
_STANDS_OUT = 1.5  # times the median error: a layer to leave out
_TOLERABLE = 0.01  # growth of the perplexity that nobody needs to do anything about
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Comparison:
    """A model against another, over every token of the text.

    perplexity_growth: as a share
    kl_mean, kl_99_9:  KL divergence from the other's next-token distribution, in nats: mean, 99.9th
                       percentile
    top1_agreement:    share of tokens whose likeliest successor is the same
    layer_errors:      of each layer's output for the other's hidden states, relative to what the layer adds
    exclude:           layers that stand out, as patterns for ``fastkernels quantize --exclude``
    """

    against: str
    perplexity: float
    perplexity_growth: float
    kl_mean: float
    kl_99_9: float
    top1_agreement: float
    layer_errors: tuple[float, ...]
    exclude: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Evaluation:
    """bits_per_token: log2 of the perplexity"""

    model: str
    text: str
    num_tokens: int
    perplexity: float
    bits_per_token: float
    comparison: Comparison | None


def evaluate_model(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    most_windows: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of ``model`` on a text, in its engine, and its distance from ``against``.

    text: FILE.txt or FILE.jsonl; None: the demo model's held-out text
    Raises RequestError for models of different vocabularies, and what loading them and the text raises.
    """
    report = progress or (lambda stage, done, total: None)
    with _engine(model, device, dtype) as llm:
        if llm.tokenizer is None:
            raise RequestError(f"{llm.name} has no tokenizer, which a text needs")
        length = min(WINDOW_TOKENS, llm.max_seq_len)
        windows = evaluation_windows(llm.tokenizer, text, sequence_length=length, most=most_windows)
        if against is None:
            nats = _nats(llm, windows, report)
        else:
            with _engine(against, device, dtype) as other:
                if other.config.vocab_size != llm.config.vocab_size:
                    raise RequestError(
                        f"{llm.name} has {llm.config.vocab_size} tokens and {other.name} "
                        f"{other.config.vocab_size}; only models of one vocabulary can be compared"
                    )
                nats, compared = _compare(llm, other, windows, report)
    comparison = None
    if against is not None:
        errors = layer_errors(model_folder(model), model_folder(against), windows, report, device)
        comparison = _comparison(str(against), nats, *compared, errors)
    return Evaluation(
        model=str(model),
        text=windows.source,
        num_tokens=windows.targets.numel(),
        perplexity=math.exp(nats),
        bits_per_token=nats / math.log(2),
        comparison=comparison,
    )


def _engine(model: str | Path, device: str, dtype: str) -> LLM:
    """For windows, and for two engines in one memory; as many logits at once as sequences."""
    context = find_model(model, random_weights=False).config.max_position_embeddings
    return LLM(
        model,
        device=device,
        dtype=dtype,
        max_num_seqs=_LOGITS_AT_ONCE,
        max_seq_len=min(WINDOW_TOKENS, context),
    )


def layer_errors(
    model: Path,
    against: Path,
    windows: TextWindows,
    report: Progress | None = None,
    device: str = "auto",
) -> tuple[float, ...]:
    """Each layer of ``model`` on the hidden states of ``against``: its output's error over what the layer
    adds.

    Empty for models whose layers are not alike. Runs the plain definition in fp32, one layer in memory.
    """
    pair = [Checkpoint(folder) for folder in (model, against)]
    shapes = [(c.config.num_layers, c.config.hidden_size) for c in pair]
    if shapes[0] != shapes[1]:
        return ()
    length, where = windows.inputs.shape[1], choose_device(device)
    own, other = (DecoderLayers(checkpoint, length, where, torch.float32) for checkpoint in pair)
    hidden = other.embed(windows.inputs[:_LAYER_WINDOWS])
    errors = []
    for index in range(len(other)):
        exact = other.run(other.layer(index, other.read_layer(index)), hidden)
        found = own.run(own.layer(index, own.read_layer(index)), hidden)
        added = (exact - hidden).square().sum().item()
        errors.append(math.sqrt((found - exact).square().sum().item() / max(added, 1e-30)))
        hidden = exact
        if report is not None:
            report("comparing layers", index + 1, len(other))
    return tuple(errors)


def _nats(llm: LLM, windows: TextWindows, report: Progress) -> float:
    total, done = 0.0, 0
    for rows in windows.token_ids.split(_WINDOWS_AT_ONCE):
        total -= sum(row.logprobs.double().sum().item() for row in llm.prompt_logprobs(rows.numpy()))
        done += len(rows)
        report("evaluating", done, len(windows.token_ids))
    return total / windows.targets.numel()


def _compare(
    llm: LLM, other: LLM, windows: TextWindows, report: Progress
) -> tuple[float, tuple[float, Tensor, float]]:
    """Mean nats of the first, then of the other, the divergence at every token, and the top-1 agreement."""
    totals, divergences, agreeing = [0.0, 0.0], [], 0
    for done, row in enumerate(windows.token_ids, start=1):
        ids, targets = row[:-1].tolist(), row[1:]
        own, exact = (F.log_softmax(one.logits(ids), -1) for one in (llm, other))
        for index, logprobs in enumerate((own, exact)):
            totals[index] += F.nll_loss(logprobs, targets, reduction="sum").item()
        divergences.append((exact.exp() * (exact - own)).sum(-1))
        agreeing += int((own.argmax(-1) == exact.argmax(-1)).sum())
        report("evaluating", done, len(windows.token_ids))
    count = windows.targets.numel()
    return totals[0] / count, (totals[1] / count, torch.cat(divergences), agreeing / count)


def _comparison(
    against: str,
    nats: float,
    other_nats: float,
    divergence: Tensor,
    agreement: float,
    errors: tuple[float, ...],
) -> Comparison:
    growth = math.exp(nats - other_nats) - 1
    exclude = layers_to_exclude(errors)
    if growth <= _TOLERABLE:
        advice = "Nothing needs to be left out: the perplexity grew by at most 1%."
    elif exclude:
        advice = "If that is too much, quantise again with " + " ".join(
            f"--exclude '{one}'" for one in exclude
        )
    else:
        advice = "If that is too much, no layer stands out: take more bits (--target-bits) or another scheme."
    return Comparison(
        against=against,
        perplexity=math.exp(other_nats),
        perplexity_growth=growth,
        kl_mean=divergence.mean().item(),
        kl_99_9=divergence.double().quantile(0.999).item(),
        top1_agreement=agreement,
        layer_errors=errors,
        exclude=exclude,
        advice=advice,
    )


def layers_to_exclude(errors: Sequence[float]) -> tuple[str, ...]:
    """Patterns of the layers whose error stands out, the worst first, a quarter of all layers at most."""
    if not errors:
        return ()
    median = sorted(errors)[len(errors) // 2]
    worst = sorted(range(len(errors)), key=lambda index: -errors[index])[: max(len(errors) // 4, 1)]
    return tuple(f"model.layers.{index}.*" for index in worst if errors[index] > _STANDS_OUT * median)


def histogram(errors: Sequence[float]) -> str:
    """A bar a layer, for the terminal."""
    most = max([*errors, 1e-30])
    return "\n".join(
        f"layer {index:3d} {error:8.4f} {'█' * round(_BAR_WIDTH * error / most)}"
        for index, error in enumerate(errors)
    )


def save_histogram(errors: Sequence[float], path: Path) -> None:
    """The same as a PNG. Raises RequestError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise RequestError("a PNG needs matplotlib, which is not installed: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(errors)), errors)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of its output")
    figure.savefig(path, dpi=150)


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, quantised or not, or 'demo'.")],
    against: Annotated[
        str | None, typer.Option(help="The model that it was made from, or another of its vocabulary.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="FILE.txt or FILE.jsonl; the demo's held-out text.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Where the histogram of layers goes; needs matplotlib.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16, fp32.")] = "auto",
    windows: Annotated[
        int | None, typer.Option(help="Stop after this many windows of 1024 tokens.", min=1)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on a text, and how far it is from the one it was made from."""
    with failing_clearly():
        if png is not None and against is None:
            raise RequestError("--png shows layers beside another model's; name it with --against")
        with loading_progress() as progress:
            found = evaluate_model(
                model,
                against=against,
                text=text,
                device=device,
                dtype=dtype,
                most_windows=windows,
                progress=progress,
            )
        if json_output:
            print(json.dumps(asdict(found)))
        else:
            print(describe(found))
        if png is not None and found.comparison is not None:
            save_histogram(found.comparison.layer_errors, png)


def describe(found: Evaluation) -> str:
    """What the command prints."""
    lines = [
        f"{found.model} on {found.text}, {found.num_tokens} tokens",
        f"perplexity       {found.perplexity:.4f} ({found.bits_per_token:.4f} bits a token)",
    ]
    if (other := found.comparison) is not None:
        lines += [
            f"of {other.against:13.13s} {other.perplexity:.4f}, growth {other.perplexity_growth:+.3%}",
            f"KL divergence    {other.kl_mean:.5f} on average, {other.kl_99_9:.4f} at the 99.9th percentile",
            f"top-1 agreement  {other.top1_agreement:.2%}",
        ]
        if other.layer_errors:
            lines += ["", "error of each layer's output", histogram(other.layer_errors)]
        lines += ["", other.advice]
    return "\n".join(lines)
