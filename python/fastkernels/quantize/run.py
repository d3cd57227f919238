"""A checkpoint quantised layer by layer, in the memory of one layer and of the hidden states of its texts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastkernels.checkpoint import Checkpoint, Tokenizer, model_folder
from fastkernels.checkpoint.quantized import QuantizedWriter
from fastkernels.models.decoder import DecoderLayer
from fastkernels.ops.device import choose_device
from fastkernels.quantize.algorithms.round_to_nearest import round_to_nearest
from fastkernels.quantize.calibration import (
    TextWindows,
    calibration_windows,
    evaluation_windows,
    perplexity_warning,
)
from fastkernels.quantize.decoder_layers import GROUPS, DecoderLayers, attention_of, round_inputs
from fastkernels.quantize.kv_scales import KVObserver, RoundedKV
from fastkernels.quantize.layer import QuantizedLayer, quantize_layer
from fastkernels.quantize.methods import (
    FINE,
    KV_CACHES,
    Method,
    Shape,
    assign_methods,
    method_for,
)
from fastkernels.quantize.ranges import ESTIMATORS, Estimator
from fastkernels.quantize.scheme import QuantizationError
from fastkernels.quantize.sensitivity import average_bits, measure_sensitivity, spend_bits
from fastkernels.quantize.statistics import InputStatistics

_EVALUATION_TOKENS = 1 << 16
_FEW = 8  # windows that are enough to compare two texts, to see keys and values, and to rank linears

Progress = Callable[[str, int, int, float | None], None]
"""Called with what is being done, how much of it is, how much there is, and the error of the layer just
done.
"""


@dataclass(frozen=True)
class QuantizationReport:
    """bits:         of a quantised weight, scales included
    bytes_before, bytes_after: of all tensors, embeddings and head included
    perplexity_before, perplexity_after: of the evaluation text
    layer_errors: of each layer's output for the unquantised model's hidden states, relative to what the layer
                  adds to them
    peak_bytes:   of GPU memory; 0 on the CPU
    """

    out: Path
    scheme: str
    bits: float
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    layer_errors: tuple[float, ...]
    seconds: float
    peak_bytes: int
    warnings: tuple[str, ...]

    @property
    def growth(self) -> float:
        """Of the perplexity, as a share of what it was."""
        return self.perplexity_after / self.perplexity_before - 1


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str,
    kv: str | None = None,
    kv_range: str | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    group_size: int = 128,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    target_bits: float | None = None,
    text: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> QuantizationReport:
    """Writes ``out``, a checkpoint in the compressed-tensors format, from the checkpoint ``model`` ("demo" is
    the package's).

    scheme:      of ``quantize.methods.METHODS``
    kv:          "fp8" or "int8": scales for a KV cache of 8 bits beside it
    kv_range:    how their range is taken from the values seen: of ``quantize.ranges.ESTIMATORS``; None:
                 "min-max"
    calibration: FILE.jsonl or FILE.txt, see ``quantize.calibration``; read where an algorithm needs inputs
    exclude, keep: see ``quantize.methods.assign_methods``
    target_bits: of a weight on average: linears that are worth it get int8-weight instead of the scheme
    text:        what perplexities are measured on; None: the demo model's held-out text
    Interrupted, it leaves ``out``.partial behind, and called again with the same arguments goes on from
    there. Raises QuantizationError, CheckpointError or ConfigError in one sentence, before anything is
    computed where that can be.
    """
    started = time.monotonic()
    report = progress or (lambda stage, done, total, error: None)
    checkpoint = Checkpoint(model_folder(model))
    if checkpoint.quantized is not None:
        raise QuantizationError(
            f"{model} is quantised already ({checkpoint.quantized.method}); give what it was made of"
        )
    if kv not in (None, *KV_CACHES):
        raise QuantizationError(f"kv is {kv!r}; it must be one of {', '.join(KV_CACHES)}")
    if kv_range not in (None, *ESTIMATORS) or (kv_range is not None and kv is None):
        beside = "it goes with kv, and" if kv is None else "it"
        raise QuantizationError(f"kv_range is {kv_range!r}; {beside} must be one of {', '.join(ESTIMATORS)}")
    config = checkpoint.config
    sequence_length = min(sequence_length, config.max_position_embeddings)
    layers = DecoderLayers(checkpoint, sequence_length, choose_device(device))
    shapes = {name: layers.linear_shape(name) for name in layers.linears}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    methods = assign_methods(shapes, scheme, group_size=group_size, exclude=exclude, keep=keep)
    warnings: list[str] = []
    tokenizer = Tokenizer(checkpoint.path)
    evaluation = evaluation_windows(
        tokenizer, text, sequence_length=sequence_length, most=max(_EVALUATION_TOKENS // sequence_length, 1)
    )
    needs_inputs = (
        any(method.needs_inputs for method in methods.values()) or kv is not None or target_bits is not None
    )
    calibrated: TextWindows | None = None
    if needs_inputs or calibration is not None:
        calibrated = calibration_windows(
            tokenizer, calibration, samples=samples, sequence_length=sequence_length
        )
        warnings += calibrated.warnings
    if layers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(layers.device)
    if target_bits is not None:
        assert calibrated is not None
        methods = _spend(layers, methods, shapes, calibrated, target_bits, report)
    writer = QuantizedWriter(
        checkpoint.path,
        out,
        {name: method.scheme.name for name, method in methods.items()},
        kv_cache=kv,
        settings={
            "methods": {name: method.name for name, method in methods.items()},
            "calibration": None if calibrated is None else _digest(calibrated.token_ids),
            "evaluation": _digest(evaluation.token_ids),
            "kv_range": kv_range,
        },
    )
    run = _Run(layers, methods, writer, (kv, kv_range), evaluation, calibrated if needs_inputs else None)
    errors = []
    for index in range(len(layers)):
        report("layer", index, len(layers), None)
        errors.append(run.layer(index))
        report("layer", index + 1, len(layers), errors[-1])
    before, after, of_calibration = run.perplexities()
    if of_calibration is not None and (warning := perplexity_warning(of_calibration, before)):
        warnings.append(warning)
    writer.finish()
    return QuantizationReport(
        out=Path(out),
        scheme=scheme,
        bits=average_bits(methods, shapes),
        bytes_before=checkpoint.size_bytes,
        bytes_after=Checkpoint(out).size_bytes,
        perplexity_before=before,
        perplexity_after=after,
        layer_errors=tuple(errors),
        seconds=time.monotonic() - started,
        peak_bytes=torch.cuda.max_memory_allocated(layers.device) if layers.device.type == "cuda" else 0,
        warnings=tuple(warnings),
    )


class _Run:
    """The hidden states of three streams before the next layer: of the evaluation text in the unquantised
    model and in the quantised one, and of the calibration text in the quantised one."""

    def __init__(
        self,
        layers: DecoderLayers,
        methods: Mapping[str, Method],
        writer: QuantizedWriter,
        kv: tuple[str | None, Estimator | None],
        evaluation: TextWindows,
        calibrated: TextWindows | None,
    ) -> None:
        self.layers = layers
        self.methods = methods
        self.writer = writer
        self.kv, self.kv_range = kv
        self.evaluation = evaluation
        self.calibrated = calibrated
        self.exact = layers.embed(evaluation.inputs)
        self.rounded = self.exact.clone()
        if calibrated is not None:
            self.calibration = layers.embed(calibrated.inputs)
            self.compared = self.calibration[:_FEW].clone()  # in the unquantised model, to compare the texts

    def layer(self, index: int) -> float:
        """Quantises a layer, or takes it from an interrupted run, and moves the streams behind it. Returns
        its error."""
        layers, prefix = self.layers, f"model.layers.{index}."
        own = {name.removeprefix(prefix): m for name, m in self.methods.items() if name.startswith(prefix)}
        parameters = layers.read_layer(index)
        original = layers.layer(index, parameters)
        note = self.writer.notes.get(str(index))
        result = (
            self._restored(prefix, parameters, own)
            if note
            else self._quantized(prefix, original, parameters, own)
        )
        layer = layers.layer(index, result.parameters)
        for linear, method in own.items():
            round_inputs(layer.get_submodule(linear), method.scheme)
        if self.kv is not None:
            self._round_kv(prefix, layer, restored=note is not None)
        error = self._move(original, layer)
        if note is None:
            self.writer.flush({str(index): {"error": error}})
        return error

    def perplexities(self) -> tuple[float, float, float | None]:
        """Before, after, and before of the calibration text. The head is quantised here where it is to be."""
        layers, head, scheme = self.layers, None, None
        if (method := self.methods.get("lm_head")) is not None:
            weight = layers.head().to(layers.device).float()
            grid, head = round_to_nearest(method.scheme, weight)
            scheme = method.scheme
            if "lm_head" not in self.writer.done:
                self.writer.add("lm_head", scheme.name, grid.parts(head))
        targets = self.evaluation.targets
        before = math.exp(layers.nats(self.exact, targets))
        after = math.exp(layers.nats(self.rounded, targets, head, scheme))
        if self.calibrated is None:
            return before, after, None
        return before, after, math.exp(layers.nats(self.compared, self.calibrated.targets[:_FEW]))

    def _quantized(
        self, prefix: str, layer: DecoderLayer, parameters: dict[str, Tensor], own: Mapping[str, Method]
    ) -> QuantizedLayer:
        statistics = {}
        if self.calibrated is not None:
            statistics = self._statistics(layer, own)
        try:
            result = quantize_layer(parameters, statistics, own, self.layers.config)
        except QuantizationError as error:
            raise QuantizationError(f"{prefix.rstrip('.')} cannot be quantised: {error}") from None
        for linear, parts in result.parts.items():
            self.writer.add(prefix + linear, own[linear].scheme.name, parts)
        dtype = self.layers.config.torch_dtype
        for name in sorted(result.changed):
            self.writer.add_plain(prefix + name, result.parameters[name].to(dtype))
        return result

    def _statistics(self, layer: DecoderLayer, own: Mapping[str, Method]) -> dict[str, InputStatistics]:
        found: dict[str, InputStatistics] = {}
        hooks: list[RemovableHandle] = []
        num_tokens = self.calibration.shape[0] * self.calibration.shape[1]
        for group in GROUPS:
            if group.name not in own or not own[group.name].needs_inputs:
                continue
            linear = layer.get_submodule(group.name)
            assert isinstance(linear, torch.nn.Linear)
            with_hessian = own[group.name].algorithm != "smoothquant"
            statistics = InputStatistics(
                linear.in_features, num_tokens, self.layers.device, with_hessian=with_hessian
            )
            found[group.name] = statistics
            hooks.append(linear.register_forward_pre_hook(lambda _, args, to=statistics: to.add(args[0])))
        if found:
            for part in self.layers.batches(self.calibration):
                self.layers.forward(layer, part)
        for hook in hooks:
            hook.remove()
        return found

    def _restored(
        self, prefix: str, parameters: dict[str, Tensor], own: Mapping[str, Method]
    ) -> QuantizedLayer:
        result, device, done = QuantizedLayer(dict(parameters)), self.layers.device, self.writer.done
        for linear, method in own.items():
            parts = {name: part.to(device) for name, part in self.writer.stored(prefix + linear).items()}
            result.parameters[f"{linear}.weight"] = method.scheme.dequantize(parts)
        for name in parameters:
            if prefix + name in done:
                result.parameters[name] = self.writer.plain(prefix + name).to(device).float()
        return result

    def _round_kv(self, prefix: str, layer: DecoderLayer, *, restored: bool) -> None:
        assert self.kv is not None
        attention, device = attention_of(layer), self.layers.device
        names = {which: f"{prefix}self_attn.{which}_scale" for which in ("k", "v")}
        offset_name = f"{prefix}self_attn.k_offset"
        if restored:
            scales = {which: self.writer.plain(name).to(device) for which, name in names.items()}
            offset = self.writer.key_offset(offset_name).to(device)
        else:
            observer = KVObserver()
            attention.kv_rounding = observer
            for part in self.layers.batches(self.calibration[:_FEW]):
                self.layers.forward(layer, part)
            scales = {
                which: scale.view(1) for which, scale in observer.scales(self.kv, self.kv_range).items()
            }
            for which, name in names.items():
                self.writer.add_plain(name, scales[which])
            offset = observer.key_offset()
            self.writer.add_key_offset(offset_name, offset)
        attention.kv_rounding = RoundedKV(scales, self.kv, offset)

    def _move(self, original: DecoderLayer, layer: DecoderLayer) -> float:
        """All streams through the layer; the error of the quantised one for the unquantised model's input."""
        layers = self.layers
        rounded = layers.run(layer, self.exact[:_FEW])
        before = self.exact[:_FEW].clone()
        layers.run(original, self.exact, in_place=True)
        exact = self.exact[:_FEW].float()
        difference = (rounded.float() - exact).square().sum().item()
        added = (exact - before.float()).square().sum().item()
        layers.run(layer, self.rounded, in_place=True)
        if self.calibrated is not None:
            layers.run(layer, self.calibration, in_place=True)
            layers.run(original, self.compared, in_place=True)
        return math.sqrt(difference / max(added, 1e-30))


def _spend(
    layers: DecoderLayers,
    coarse: Mapping[str, Method],
    shapes: Mapping[str, Shape],
    calibrated: TextWindows,
    target_bits: float,
    report: Progress,
) -> dict[str, Method]:
    """The methods with those linears made fine that are worth it; the head keeps what it was given."""
    head = {name: method for name, method in coarse.items() if name == "lm_head"}
    body = {name: method for name, method in coarse.items() if name != "lm_head"}
    fine = {name: method_for(FINE, name, shapes[name]) for name in body}
    spend_bits({}, body, fine, shapes, target_bits)  # refuses what cannot be reached before it is measured
    hidden = layers.embed(calibrated.inputs[:_FEW])
    sensitivity: dict[str, float] = {}
    for index in range(len(layers)):
        report("measuring sensitivity", index, len(layers), None)
        parameters = layers.read_layer(index)
        sensitivity |= measure_sensitivity(layers, index, parameters, hidden, body)
        layers.run(layers.layer(index, parameters), hidden, in_place=True)
    report("measuring sensitivity", len(layers), len(layers), None)
    return {**spend_bits(sensitivity, body, fine, shapes, target_bits), **head}


def _digest(token_ids: Tensor) -> str:
    return hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()


def as_dict(report: QuantizationReport) -> dict[str, Any]:
    """For JSON."""
    return {**vars(report), "out": str(report.out), "growth": report.growth}
