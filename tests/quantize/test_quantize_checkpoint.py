"""Checkpoints quantised end to end: of every family, interrupted, mixed, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import fastkernels
from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint, CheckpointError
from fastkernels.config import ConfigError
from fastkernels.errors import DeviceError
from fastkernels.quantize import QuantizationError, find_scheme
from fastkernels.quantize.calibration import evaluation_windows
from fastkernels.quantize.decoder_layers import GROUPS, DecoderLayers
from fastkernels.quantize.layer import quantize_layer
from fastkernels.quantize.methods import METHODS, Method, assign_methods, method_for
from fastkernels.quantize.run import quantize_checkpoint
from fastkernels.quantize.sensitivity import average_bits
from fastkernels.quantize.statistics import InputStatistics
from tests.checkpoints import CASES, Case, make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the demo's vocabulary, in rows that groups of 32 divide.
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
FAMILIES = {
    "llama": Case("LlamaForCausalLM", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("MistralForCausalLM", {**SIZES, "sliding_window": 7, "num_key_value_heads": 2}),
    "qwen2": Case("Qwen2ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": Case("Qwen3ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
}
FEW = {"samples": 4, "sequence_length": 64, "device": "cpu"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return [y * 2 for y in x if y is not None]\n\nclass A:\n    pass\n" * 30)
    return path


def family(folder: Path, name: str) -> Path:
    path = make_checkpoint(folder, FAMILIES[name], dtype=torch.bfloat16)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((DEMO_FOLDER / file).read_bytes())
    return path


# --- the layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama-biased", "llama-yarn", "mistral", "qwen2-window", "qwen3-window"])
def test_layers_are_the_definition(tmp_path, case, device):
    """Three texts at once give the likelihoods that the engine's logits of each give."""
    folder = make_checkpoint(tmp_path, CASES[case])
    ids = torch.randint(0, 1003, (3, 41))
    layers = DecoderLayers(Checkpoint(folder), 40, device, torch.float32)
    hidden = layers.embed(ids[:, :-1])
    for index in range(len(layers)):
        hidden = layers.run(layers.layer(index, layers.read_layer(index)), hidden)
    with LLM(folder, device="cpu", dtype="fp32", max_num_seqs=1) as llm:
        nats = [F.cross_entropy(llm.logits(row[:-1].tolist()), row[1:]).item() for row in ids]
    assert layers.nats(hidden, ids[:, 1:]) == pytest.approx(sum(nats) / 3, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", FAMILIES)
def test_moving_scales_changes_nothing(tmp_path, name, algorithm, device):
    """In weights of 8 bits the layer says what it said, whatever its norms, biases and heads are."""
    checkpoint = Checkpoint(family(tmp_path, name))
    layers = DecoderLayers(checkpoint, 32, device, torch.float32)
    hidden = torch.randn(4, 32, 128, device=device) * torch.rand(128, device=device).mul(3).exp()
    parameters = layers.read_layer(1)
    layer, statistics, methods = layers.layer(1, parameters), {}, {}
    scheme = find_scheme("int8" if algorithm == "smoothquant" else "int8-weight")
    for group in GROUPS:
        linear = layer.get_submodule(group.name)
        statistics[group.name] = InputStatistics(linear.in_features, 128, device)
        linear.register_forward_pre_hook(lambda _, args, to=statistics[group.name]: to.add(args[0]))
        methods |= {linear: Method("test", scheme, algorithm) for linear in group.linears}
    exact = layers.run(layer, hidden)
    result = quantize_layer(parameters, statistics, methods, checkpoint.config)
    found = layers.run(layers.layer(1, result.parameters), hidden)
    assert (found - exact).norm() < 0.015 * (exact - hidden).norm()
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= result.changed
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        value = result.parameters[norm]
        assert torch.equal(value, value.bfloat16().float())  # as the checkpoint holds it
        assert not torch.equal(value, parameters[norm])


# --- whole checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "int4-awq", "int4-gptq", "nvfp4"])
def test_what_is_written_is_what_was_measured(tmp_path, text, name, scheme):
    """The engine loads it without being told and has the perplexity that the report has."""
    model, out = family(tmp_path, name), tmp_path / "out"
    errors: list[float | None] = []
    report = quantize_checkpoint(
        model, out, scheme=scheme, calibration=text, text=text, group_size=32, **FEW,
        progress=lambda stage, done, total, error: errors.append(error),
    )  # fmt: skip
    assert [error for error in errors if error is not None] == list(report.layer_errors)
    assert 0 < max(report.layer_errors) < 0.3
    assert report.bytes_after < report.bytes_before
    assert not (tmp_path / "out.partial").exists()
    with LLM(out, device="cpu", max_num_seqs=1) as llm:
        windows = evaluation_windows(llm.tokenizer, text, sequence_length=64)
        nats = [F.cross_entropy(llm.logits(row[:-1].tolist()), row[1:]).item() for row in windows.token_ids]
        assert len(llm.generate("def", SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    assert math.exp(sum(nats) / len(nats)) == pytest.approx(report.perplexity_after, rel=2e-3)


def test_an_interrupted_run_goes_on(tmp_path, text, monkeypatch):
    """The same bytes as without the interruption, and no layer is quantised twice."""
    model = family(tmp_path, "qwen2")
    options = {"scheme": "int4-awq", "kv": "fp8", "calibration": text, "text": text, "group_size": 32, **FEW}
    whole = quantize_checkpoint(model, tmp_path / "whole", **options)

    def interrupt(stage: str, done: int, total: int, error: float | None) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(model, tmp_path / "out", **options, progress=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="interrupted run with other"):
        quantize_checkpoint(model, tmp_path / "out", **{**options, "samples": 2})
    calls = []
    import fastkernels.quantize.run as run

    monkeypatch.setattr(run, "quantize_layer", lambda *args: calls.append(1) or quantize_layer(*args))
    report = quantize_checkpoint(model, tmp_path / "out", **options)
    assert len(calls) == 1
    assert report.perplexity_after == pytest.approx(whole.perplexity_after, rel=1e-6)
    first, second = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "out")
    assert first.names() == second.names()
    for name in first.names():
        assert torch.equal(first.tensor(name), second.tensor(name)), name
    assert first.tensor("model.layers.1.self_attn.k_scale").item() > 0
    assert first.kv.offsets is not None and second.kv.offsets is not None
    offsets, again = load_file(first.kv.offsets), load_file(second.kv.offsets)
    assert len(offsets) == 2 and offsets.keys() == again.keys()
    assert all(torch.equal(offset, again[name]) for name, offset in offsets.items())
    index = json.loads((second.path / "model.safetensors.index.json").read_text())
    assert not any("k_offset" in name for name in index["weight_map"])  # for nobody else to read


def test_the_memory_is_that_of_one_layer(tmp_path, text):
    """However many layers there are: the anonymous memory of the process behind each of them."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10}
    model, held = make_checkpoint(tmp_path, Case("LlamaForCausalLM", sizes), dtype=torch.bfloat16), []
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).write_bytes((DEMO_FOLDER / file).read_bytes())

    def note(stage: str, done: int, total: int, error: float | None) -> None:
        if error is not None:
            words = Path("/proc/self/status").read_text().split()
            held.append(int(words[words.index("RssAnon:") + 1]) * 1024)

    quantize_checkpoint(model, tmp_path / "out", scheme="int4-nearest", text=text, **FEW, progress=note)
    layer_bytes = 4 * sum(
        Checkpoint(model).tensor(name).numel() for name in Checkpoint(model).names() if "layers.0." in name
    )
    assert len(held) == 10 and layer_bytes > 6e6
    assert held[-1] - held[2] < 2 * layer_bytes


def test_mixed_schemes_and_a_head(tmp_path, text):
    model, out = family(tmp_path, "qwen3"), tmp_path / "out"
    quantize_checkpoint(
        model, out, scheme="int4-gptq", keep=["fp8:*.down_proj", "int8-weight:lm_head"],
        exclude=["model.layers.0.*"], calibration=text, text=text, group_size=64, **FEW,
    )  # fmt: skip
    quantized = Checkpoint(out).quantized
    assert quantized is not None
    schemes = {name: linear.scheme for name, linear in quantized.linears.items()}
    assert schemes["model.layers.1.mlp.down_proj"] == "fp8" and schemes["lm_head"] == "int8-weight"
    assert schemes["model.layers.1.self_attn.q_proj"] == "int4-g64-zeros"
    assert not any(name.startswith("model.layers.0.") for name in schemes) and len(schemes) == 8


def test_python_m_and_the_exported_function(tmp_path, text):
    from typer.testing import CliRunner

    from fastkernels.cli import app

    assert fastkernels.quantize_checkpoint is quantize_checkpoint
    with pytest.raises(QuantizationError, match="no scheme is called 'int3'"):
        fastkernels.quantize("demo", tmp_path / "out", scheme="int3")
    model = family(tmp_path, "llama")
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--scheme", "fp8", "--device", "cpu"]
    arguments += ["--text", str(text), "--sequence-length", "64"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bits"] == pytest.approx(8.2, abs=0.1) and len(report["layer_errors"]) == 2
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "is there already" in result.output
    arguments[2] = str(tmp_path / "other")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "perplexity" in result.stdout


# --- names --------------------------------------------------------------------------------------------------

SHAPES = {f"model.layers.0.{linear}": (128, 256) for group in GROUPS for linear in group.linears}


def test_the_largest_group_that_fits():
    assert method_for("int4-awq", "x", (8, 640)).scheme.name == "int4-zeros"
    assert method_for("int4-awq", "x", (8, 640), 64).scheme.name == "int4-g64-zeros"
    assert method_for("int4-awq", "x", (8, 96)).scheme.name == "int4-g32-zeros"
    assert method_for("int4-gptq", "x", (8, 100)).scheme.name == "int4-channel-zeros"
    assert set(METHODS) >= {
        "fp8",
        "fp8-block",
        "int8",
        "int8-weight",
        "int4-awq",
        "int4-gptq",
        "nvfp4",
        "mxfp4",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "no scheme is called 'int3'; there are fp8, "),
        (
            {"scheme": "fp8", "keep": ["int8:*.up_proj"]},
            "must have one scheme, since engines merge them; .* gate_",
        ),
        ({"scheme": "fp8", "exclude": ["*.k_proj"]}, "q_proj fp8, k_proj as it is, v_proj fp8"),
        ({"scheme": "fp8", "exclude": ["*.w1"]}, r"--exclude \*.w1 matches no linear; their names are model"),
        ({"scheme": "fp8", "keep": ["int8"]}, "--keep int8 says no scheme; it must be SCHEME:PATTERN"),
        ({"scheme": "fp8", "keep": ["int8:lm_head"]}, "--keep lm_head matches no linear"),
        ({"scheme": "fp8", "exclude": ["*"]}, "nothing is left to quantise"),
        ({"scheme": "int4-awq", "group_size": 48}, "group_size is 48; it must be one of 128, 64, 32"),
    ],
)
def test_assignments_that_are_refused(options, message):
    with pytest.raises(QuantizationError, match=message):
        assign_methods(SHAPES, **options)


def test_rows_that_no_block_divides_are_named():
    with pytest.raises(
        QuantizationError,
        match=r"^m.down cannot be quantised: mxfp4 takes rows .* with --exclude, or .* --keep SCHEME:m.down$",
    ):
        method_for("mxfp4", "m.down", (8, 40))


def test_bits_of_a_weight():
    assert average_bits(assign_methods(SHAPES, "int4-awq"), SHAPES) == pytest.approx(4 + 24 / 128)
    assert average_bits(assign_methods(SHAPES, "int8-weight"), SHAPES) == pytest.approx(8 + 32 / 256)


def test_what_is_refused_before_anything_runs(tmp_path, text):
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize_checkpoint(tmp_path / "none", tmp_path / "out", scheme="fp8")
    with pytest.raises(QuantizationError, match="kv is 'int4'; it must be one of fp8, int8"):
        quantize_checkpoint("demo", tmp_path / "out", scheme="fp8", kv="int4")
    with pytest.raises(QuantizationError, match="kv_range is 'max'; it must be one of min-max, percentile"):
        quantize_checkpoint("demo", tmp_path / "out", scheme="fp8", kv="fp8", kv_range="max")
    with pytest.raises(QuantizationError, match="kv_range is 'mse'; it goes with kv, and must be one of"):
        quantize_checkpoint("demo", tmp_path / "out", scheme="fp8", kv_range="mse")
    with pytest.raises(QuantizationError, match=r"target_bits is 4; the coarsest there is takes 4.188 bits"):
        quantize_checkpoint(
            "demo", tmp_path / "out", scheme="int4-awq", target_bits=4, calibration=text, **FEW
        )
    with pytest.raises(DeviceError, match="device is 'tpu'; it must be auto"):
        quantize_checkpoint("demo", tmp_path / "out", scheme="fp8", device="tpu")
    with pytest.raises(ConfigError, match="is empty"):
        (tmp_path / "empty.txt").write_text("")
        quantize_checkpoint("demo", tmp_path / "out", scheme="fp8", calibration=tmp_path / "empty.txt")
    model = family(tmp_path, "llama")
    quantize_checkpoint(model, tmp_path / "once", scheme="fp8", text=text, **FEW)
    with pytest.raises(QuantizationError, match=r"is quantised already \(compressed-tensors\)"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "out", scheme="fp8")
    assert not list(tmp_path.glob("out*"))
