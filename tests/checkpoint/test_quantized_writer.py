"""Quantised checkpoints as they are written: read again the in-memory model; interrupted, they go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint, CheckpointError
from fastkernels.checkpoint.quantized import QuantizedWriter
from fastkernels.checkpoint.quantized import writer as writer_module
from fastkernels.compiler import compile_model
from fastkernels.quantize import SCHEMES, find_scheme
from tests.checkpoint import quantized_made as made
from tests.checkpoint.test_quantized_readers import definition_logits, logits_of
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [*SCHEMES, "int4-g32-zeros", "int4-g64", "int4-channel", "int4-channel-zeros-fp16", "int4-fp32"]
PROMPTS = ["def fibonacci(n):", "import os\n", "class Queue:\n    def __init__(self"]
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
UP = "model.layers.1.mlp.up_proj"


def linears_of(checkpoint: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith("_proj.weight")]


def quantise(
    source: Path, out: Path, schemes: Mapping[str, str], weights: Mapping[str, Tensor] | None = None
) -> Path:
    """Each module to nearest, a flush a layer."""
    checkpoint = Checkpoint(source)
    writer = QuantizedWriter(source, out, schemes)
    for module, scheme in schemes.items():
        of = (weights or {}).get(module)
        weight = checkpoint.tensor(f"{module}.weight") if of is None else of
        writer.add(module, scheme, find_scheme(scheme).quantize(weight))
        if module.endswith("down_proj"):
            writer.flush()
    return writer.finish()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> made.Packed:
        return made.Packed({}, torch.randn(out_size, in_size, generator=generator) * in_size**-0.5)

    return made.make(tmp_path, None, pack)[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_demo_model_written_and_read_says_the_same(tmp_path: Path, name: str) -> None:
    demo = Checkpoint(DEMO_FOLDER)
    out = quantise(DEMO_FOLDER, tmp_path / "out", dict.fromkeys(linears_of(demo), name))
    assert not out.with_name("out.partial").exists() and not (out / "progress.json").exists()
    assert {path.name for path in out.glob("*token*")} == {"tokenizer.json", "tokenizer_config.json"}
    assert (out / "generation_config.json").read_bytes() == (
        DEMO_FOLDER / "generation_config.json"
    ).read_bytes()
    # merged linears have one global scale, single ones each their own
    options = {"disabled_passes": ("merge_qkv", "merge_gate_up")} if name == "nvfp4" else {}
    with LLM("demo", device="cpu", max_num_seqs=4, quantization=name, **options) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        logits = llm.logits(list(range(40, 100)))
    with LLM(out, device="cpu", max_num_seqs=4) as llm:
        assert [output.token_ids for output in llm.generate(PROMPTS, PARAMS)] == expected
        written = llm.logits(list(range(40, 100)))
    if name == "nvfp4":  # whose global scale is stored as what divides by it
        torch.testing.assert_close(written, logits, rtol=0, atol=1e-4)
    else:
        assert torch.equal(written, logits)


def test_mixed_schemes_and_the_head(tmp_path: Path) -> None:
    """Several schemes in one model, linears left alone, and a tied head that gets a weight of its own."""
    demo = Checkpoint(DEMO_FOLDER)
    schemes = {
        name: "fp8" if "down" in name else "int8-weight" if ".9." in name else "int4-g32-zeros"
        for name in linears_of(demo)
        if "layers.0." not in name
    }
    schemes["lm_head"] = "int8"
    out = quantise(
        DEMO_FOLDER, tmp_path / "out", schemes, {"lm_head": demo.tensor("model.embed_tokens.weight")}
    )
    checkpoint = Checkpoint(out)
    assert checkpoint.quantized is not None and not checkpoint.config.tie_word_embeddings
    assert {name: linear.scheme for name, linear in checkpoint.quantized.linears.items()} == schemes
    for name, linear in checkpoint.quantized.linears.items():
        source = "model.embed_tokens" if name == "lm_head" else name
        scheme = find_scheme(schemes[name])
        expected = scheme.dequantize(scheme.quantize(demo.tensor(f"{source}.weight")))
        assert torch.equal(linear.dense(), expected)
    config = checkpoint.config_dict["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 4
    assert config["ignore"] == [f"model.layers.0.{name}" for name in LAYER_0]
    with LLM(out, device="cpu", max_num_seqs=1) as llm, LLM("demo", device="cpu", max_num_seqs=1) as exact:
        ids = list(range(40, 100))
        assert (llm.logits(ids) - exact.logits(ids)).norm() < 0.2 * exact.logits(ids).norm()


LAYER_0 = list(made.LAYER)


def test_biases_and_odd_sizes(tmp_path: Path) -> None:
    """232 outputs, which no word of zero points ends with, and biases, which are taken over."""
    source = make_checkpoint(tmp_path, "llama-biased")
    names = linears_of(Checkpoint(source))
    for name in ("int8-weight", "fp8", "int4-channel-zeros", "int4-g32-zeros"):
        taken = [n for n in names if name != "int4-g32-zeros" or "down" not in n]
        out = quantise(source, tmp_path / name, dict.fromkeys(taken, name))
        quantized = Checkpoint(out).quantized
        assert quantized is not None and set(quantized.linears) == set(taken)
        for module in taken:
            scheme = find_scheme(name)
            parts = scheme.quantize(Checkpoint(source).tensor(f"{module}.weight"))
            assert torch.equal(quantized.linears[module].dense(), scheme.dequantize(parts))
        with LLM(out, device="cpu", max_num_seqs=1) as llm:
            assert torch.isfinite(llm.logits([5, 6, 7])).all()


def test_unlike_parts_stay_apart(plain: Path, tmp_path: Path) -> None:
    """q, k and v, and gate and up, in a scheme each: none is merged, and v stays as it is."""
    schemes = {}
    for layer in range(2):
        of = f"model.layers.{layer}"
        schemes |= {f"{of}.self_attn.q_proj": "int4-g32", f"{of}.self_attn.k_proj": "int8-weight"}
        schemes |= {f"{of}.mlp.gate_proj": "nvfp4", f"{of}.mlp.up_proj": "mxfp4"}
    out = quantise(plain, tmp_path / "out", schemes)
    checkpoint = Checkpoint(out)
    assert checkpoint.quantized is not None
    plan = compile_model(checkpoint.config, stored=checkpoint.quantized.linears)
    assert [step.op for step in plan.steps].count("quantized_linear") == len(schemes)
    exact = definition_logits(out, dict(schemes))
    assert (logits_of(out) - exact).norm() < 1e-4 * exact.norm()


def test_plain_tensors_replace_the_sources(plain: Path, tmp_path: Path) -> None:
    writer = QuantizedWriter(plain, tmp_path / "out", {UP: "int4"}, kv_cache="fp8")
    norm = "model.layers.1.post_attention_layernorm.weight"
    writer.add_plain(norm, torch.full((128,), 0.5))
    writer.add_plain("model.layers.0.self_attn.k_scale", torch.tensor([0.25]))
    writer.add(UP, "int4", find_scheme("int4").quantize(torch.randn(256, 128)))
    with pytest.raises(CheckpointError, match=r"does not hold the offset .* yet"):
        writer.key_offset("model.layers.0.self_attn.k_offset")
    checkpoint = Checkpoint(writer.finish())
    assert torch.equal(checkpoint.tensor(norm), torch.full((128,), 0.5))
    scheme = checkpoint.config_dict["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    shards = [*checkpoint.path.glob("*.safetensors")]
    modes = {path.stat().st_mode for path in (checkpoint.path / "config.json", *shards)}
    assert shards and len(modes) == 1  # whoever may read the one may read the others
    with LLM(checkpoint.path, device="cpu", max_num_seqs=1) as llm:
        assert torch.isfinite(llm.logits([5, 6, 7])).all()


# --- interrupted ------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(plain: Path, tmp_path: Path) -> None:
    out, scheme = tmp_path / "out", find_scheme("int4-g32-zeros")
    schemes = dict.fromkeys(made.LINEARS, scheme.name)
    weights = Checkpoint(plain)

    def writer() -> QuantizedWriter:
        return QuantizedWriter(plain, out, schemes, settings={"samples": 8})

    first = writer()
    norm = "model.layers.0.input_layernorm.weight"
    for module in list(schemes)[:7]:
        first.add(module, scheme.name, scheme.quantize(weights.tensor(f"{module}.weight")))
    first.add_plain(norm, torch.full((128,), 0.25))
    first.flush({"layer 0": 0.125})
    first.add(UP, scheme.name, scheme.quantize(weights.tensor(f"{UP}.weight")))  # lost: not flushed
    assert not out.exists()

    second = writer()
    assert second.done == {*list(schemes)[:7], norm} and second.notes == {"layer 0": 0.125}
    gate = "model.layers.0.mlp.gate_proj"
    expected = scheme.quantize(weights.tensor(f"{gate}.weight"))
    assert {k: v.tolist() for k, v in second.stored(gate).items()} == {
        k: v.tolist() for k, v in expected.items()
    }
    assert torch.equal(second.plain(norm), torch.full((128,), 0.25))
    with pytest.raises(CheckpointError, match=f"{gate} was added before"):
        second.add(gate, scheme.name, expected)
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.self_attn.q_proj and 6 more modules were not added"
    ):
        second.finish()
    for module in list(schemes)[7:]:
        second.add(module, scheme.name, scheme.quantize(weights.tensor(f"{module}.weight")))
    second.flush({"layer 1": 0.25})
    assert second.notes == {"layer 0": 0.125, "layer 1": 0.25}
    second.finish()

    whole = quantise(plain, tmp_path / "whole", schemes, {norm: torch.full((128,), 0.25)})
    for name in Checkpoint(whole).names():
        if name != norm:
            assert torch.equal(Checkpoint(out).tensor(name), Checkpoint(whole).tensor(name))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}


def test_interrupted_while_it_finishes(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the shards got their names, before there is an index."""
    schemes = {UP: "fp8", made.GATE: "fp8"}
    writer = QuantizedWriter(plain, tmp_path / "out", schemes)
    for module in schemes:
        writer.add(module, "fp8", find_scheme("fp8").quantize(Checkpoint(plain).tensor(f"{module}.weight")))
        writer.flush()

    def full_disk(path: Path, value: Any) -> None:
        if path.name == "model.safetensors.index.json":
            raise OSError(28, "No space left on device")
        original(path, value)

    original = writer_module.write_json
    monkeypatch.setattr(writer_module, "write_json", full_disk)
    with pytest.raises(
        CheckpointError, match=r"out\.partial cannot be written: No space left on device; what was"
    ):
        writer.finish()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    again = QuantizedWriter(plain, tmp_path / "out", schemes)
    assert schemes.keys() <= again.done
    checkpoint = Checkpoint(again.finish())
    assert checkpoint.quantized is not None and set(checkpoint.quantized.linears) == set(schemes)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_leaves_nothing_half_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = QuantizedWriter(plain, tmp_path / "out", {UP: "fp8"})
    parts = find_scheme("fp8").quantize(torch.randn(256, 128))
    writer.add(UP, "fp8", parts)

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
        writer.flush()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["progress.json"]
    monkeypatch.undo()
    writer.finish()  # there is room again, and what was added is still there
    assert Checkpoint(tmp_path / "out").quantized is not None


def test_discard_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    writer = QuantizedWriter(plain, tmp_path / "out", {UP: "fp8"})
    writer.discard()
    assert not (tmp_path / "out.partial").exists()


# --- what is refused --------------------------------------------------------------------------------------


def test_arguments_that_are_refused(plain: Path, tmp_path: Path) -> None:
    def refused(message: str, out: Path, schemes: dict[str, str], **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            QuantizedWriter(plain, out, schemes, **options)

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused("taken is there already; give a folder that is not, or an empty one", tmp_path / "taken", {})
    refused("the scheme 'int5' is not written; there are fp8,", tmp_path / "out", {UP: "int5"})
    refused(
        "has no linear 'model.norm'; the last it has is 'lm_head'", tmp_path / "out", {"model.norm": "fp8"}
    )
    refused("kv_cache is 'int4'; there are fp8, int8", tmp_path / "out", {}, kv_cache="int4")

    QuantizedWriter(plain, tmp_path / "out", {UP: "fp8"}, settings={"samples": 8})
    refused("is of an interrupted run with other schemes; remove it", tmp_path / "out", {UP: "int8"})
    refused(
        r"interrupted run with other settings \(samples\); remove",
        tmp_path / "out",
        {UP: "fp8"},
        settings={"samples": 9},
    )

    (tmp_path / "empty").mkdir()
    writer = QuantizedWriter(plain, tmp_path / "empty", {UP: "fp8"})
    writer.add(UP, "fp8", find_scheme("fp8").quantize(torch.randn(256, 128)))
    quantised = writer.finish()
    with pytest.raises(CheckpointError, match=r"is quantised already \(compressed-tensors\)"):
        QuantizedWriter(quantised, tmp_path / "again", {UP: "fp8"})


def test_parts_that_are_refused(plain: Path, tmp_path: Path) -> None:
    writer = QuantizedWriter(plain, tmp_path / "out", {UP: "int4-zeros", made.GATE: "nvfp4"})
    parts = find_scheme("int4-zeros").quantize(torch.randn(256, 128))
    fp4 = find_scheme("nvfp4").quantize(torch.randn(256, 128))

    def refused(message: str, module: str, scheme: str, given: dict[str, Tensor]) -> None:
        with pytest.raises(CheckpointError, match=message):
            writer.add(module, scheme, given)

    without = {name: part for name, part in parts.items() if name != "zeros"}
    refused(f"{UP} was added without 'zeros', a part of int4-zeros", UP, "int4-zeros", without)
    refused(f"{UP} was added as int4, but scheme_by_module has int4-zeros for it", UP, "int4", parts)
    zero = {**parts, "scales": torch.zeros_like(parts["scales"])}
    refused(f"{UP} has a scale of 0 in weight_scale", UP, "int4-zeros", zero)
    nan = {**parts, "scales": parts["scales"] * float("nan")}
    refused(f"{UP} has NaN or infinity in weight_scale", UP, "int4-zeros", nan)
    half = {**parts, "scales": parts["scales"].half()}
    refused("was added as int4-zeros, but its parts are those of int4-zeros-fp16", UP, "int4-zeros", half)
    short = {**parts, "packed": parts["packed"][:, :32].contiguous()}
    refused(r"has weight_packed of shape \[256, 8\]; compressed-tensors of a weight", UP, "int4-zeros", short)
    global_zero = {**fp4, "global_scale": torch.zeros(1)}
    refused("has NaN or infinity in weight_global_scale", made.GATE, "nvfp4", global_zero)
    with pytest.raises(CheckpointError, match=r"has no unquantised tensor 'model\.norms\.weight' to replace"):
        writer.add_plain("model.norms.weight", torch.ones(1))
    with pytest.raises(CheckpointError, match="does not hold the module"):
        writer.stored(UP)
