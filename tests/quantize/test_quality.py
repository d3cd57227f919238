"""What quantising the demo model costs on its held-out text: the figures of docs/quantization.md as bounds.

The algorithms see the inputs of the unquantised model here, collected once for all of them; whole runs, which
see those of the layers quantised so far, are in test_quantize_checkpoint.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import pytest
import torch

from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint, Tokenizer
from fastkernels.quantize.calibration import calibration_windows, evaluation_windows
from fastkernels.quantize.decoder_layers import GROUPS, DecoderLayers, attention_of, round_inputs
from fastkernels.quantize.kv_scales import KVObserver, RoundedKV
from fastkernels.quantize.layer import quantize_layer
from fastkernels.quantize.methods import FINE, Method, assign_methods, method_for
from fastkernels.quantize.sensitivity import average_bits, measure_sensitivity, spend_bits
from fastkernels.quantize.statistics import InputStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT_TOKENS, SAMPLES = 1024, 32
GROWTH = {
    "fp8": 0.003,
    "fp8-block": 0.003,
    "int8": 0.005,
    "int8-zeros": 0.005,
    "int8-weight": 0.001,
    "int4-awq": 0.04,
    "int4-gptq": 0.04,
    "nvfp4": 0.04,
    "mxfp4": 0.08,
}


class Bench:
    """The demo model, its held-out text, and what every linear reads over a calibration text."""

    def __init__(self) -> None:
        checkpoint, tokenizer = Checkpoint(DEMO_FOLDER), Tokenizer(DEMO_FOLDER)
        self.layers = DecoderLayers(checkpoint, TEXT_TOKENS, torch.device("cpu"))
        self.shapes = {name: self.layers.linear_shape(name) for name in self.layers.linears}
        self.text = evaluation_windows(tokenizer, sequence_length=TEXT_TOKENS)
        calibration = calibration_windows(tokenizer, samples=SAMPLES, sequence_length=TEXT_TOKENS)
        hidden, self.statistics, self.sensitivity, self.kv_seen = (
            self.layers.embed(calibration.inputs),
            [],
            {},
            [],
        )
        self.quantized: dict[tuple, dict[str, torch.Tensor]] = {}
        coarse = assign_methods(self.shapes, "int4-gptq")
        for index in range(len(self.layers)):
            parameters = self.layers.read_layer(index)
            self.sensitivity |= measure_sensitivity(self.layers, index, parameters, hidden[:2], coarse)
            layer, found, observer = self.layers.layer(index, parameters), {}, KVObserver()
            for group in GROUPS:
                linear = layer.get_submodule(group.name)
                found[group.name] = InputStatistics(linear.in_features, hidden[..., 0].numel(), hidden.device)
                linear.register_forward_pre_hook(lambda _, args, to=found[group.name]: to.add(args[0]))
            attention_of(layer).kv_rounding = observer
            hidden = self.layers.run(layer, hidden)
            self.statistics.append(found)
            self.kv_seen.append(observer)
        self.perplexity = self.perplexity_of({})

    def perplexity_of(self, methods: Mapping[str, Method], kv: str | None = None) -> float:
        hidden = self.layers.embed(self.text.inputs)
        for index in range(len(self.layers)):
            prefix, parameters = f"model.layers.{index}.", self.layers.read_layer(index)
            own = {name.removeprefix(prefix): one for name, one in methods.items() if name.startswith(prefix)}
            layer = self.layers.layer(index, self._quantized(index, parameters, own))
            for linear, method in own.items():
                round_inputs(layer.get_submodule(linear), method.scheme)
            if kv is not None:
                attention_of(layer).kv_rounding = RoundedKV(
                    self.kv_seen[index].scales(kv), kv, self.kv_seen[index].key_offset()
                )
            hidden = self.layers.run(layer, hidden)
        return math.exp(self.layers.nats(hidden, self.text.targets))

    def _quantized(
        self, index: int, parameters: dict[str, torch.Tensor], own: Mapping[str, Method]
    ) -> dict[str, torch.Tensor]:
        """A layer's parameters, once for all tests that ask for the same methods."""
        key = (index, *((linear, method.name) for linear, method in own.items()))
        if key not in self.quantized:
            result = quantize_layer(parameters, self.statistics[index], own, self.layers.config)
            self.quantized[key] = result.parameters
        return self.quantized[key]

    @cache  # noqa: B019 (there is one for all tests)
    def growth(self, scheme: str) -> float:
        return self.perplexity_of(assign_methods(self.shapes, scheme)) / self.perplexity - 1


@pytest.fixture(scope="module")
def bench(one_thread: None) -> Bench:
    return Bench()


@pytest.mark.parametrize("scheme", GROWTH)
def test_growth_of_the_perplexity(bench, scheme):
    growth = bench.growth(scheme)
    print(f"{scheme}: {growth:+.3%}")
    assert growth <= GROWTH[scheme]


@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq"])
def test_algorithms_against_round_to_nearest(bench, scheme):
    growth, plain = bench.growth(scheme), bench.growth("int4-nearest")
    print(f"{scheme}: {growth:+.3%}, to nearest {plain:+.3%}")
    assert growth <= 0.7 * plain


@pytest.mark.parametrize("kv", ["fp8", "int8"])
def test_kv_cache(bench, kv):
    growth = bench.perplexity_of({}, kv) / bench.perplexity - 1
    print(f"{kv} KV: {growth:+.3%}")
    assert growth <= 0.003


def test_int4_weights_with_an_fp8_cache(bench):
    """Together within what int4 alone may cost."""
    methods = assign_methods(bench.shapes, "int4-gptq")
    assert bench.perplexity_of(methods, "fp8") / bench.perplexity - 1 <= GROWTH["int4-gptq"]


def test_bits_are_spent_where_they_are_worth_most(bench):
    """On or below the line from uniform int4 to uniform int8."""
    coarse = assign_methods(bench.shapes, "int4-gptq")
    fine = {name: method_for(FINE, name, bench.shapes[name]) for name in coarse}
    mixed = spend_bits(bench.sensitivity, coarse, fine, bench.shapes, 5.0)
    bits = average_bits(mixed, bench.shapes)
    assert 4.7 < bits <= 5.0
    low, high = (average_bits(methods, bench.shapes) for methods in (coarse, fine))
    share = (bits - low) / (high - low)
    line = (1 - share) * bench.growth("int4-gptq") + share * bench.growth("int8-weight")
    growth = bench.perplexity_of(mixed) / bench.perplexity - 1
    print(f"{bits:.3f} bits: {growth:+.3%}, the line {line:+.3%}")
    assert growth <= line
