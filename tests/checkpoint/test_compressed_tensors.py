"""Against the package compressed-tensors: it reads what the writer wrote, and what it wrote is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint, CheckpointError
from fastkernels.compiler import compile_model
from fastkernels.models import build
from fastkernels.quantize import SCHEMES, find_scheme
from tests.checkpoint import quantized_made as made
from tests.checkpoint.test_quantized_readers import definition_logits, logits_of
from tests.checkpoint.test_quantized_writer import linears_of, quantise

pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [*SCHEMES, "int4-g32-zeros", "int4-g64", "int4-channel", "int4-channel-zeros-fp16", "int4-fp32"]


def scheme_of(config: QuantizationConfig, name: str, linear: nn.Module) -> QuantizationScheme | None:
    """The group of a module, by the package's own matching."""
    if is_match(name, linear, config.ignore or []):
        return None
    (scheme,) = (one for one in config.config_groups.values() if is_match(name, linear, one.targets))
    return scheme


def decompressed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of the quantised linears of a checkpoint, as the package has them."""
    checkpoint = Checkpoint(folder)
    config = QuantizationConfig.model_validate(checkpoint.config_dict["quantization_config"])
    with torch.device("meta"):
        model = build(checkpoint.config)
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        scheme = scheme_of(config, name, linear)
        if scheme is None:
            continue
        leaves = [key for key in checkpoint.names() if key.startswith(f"{name}.") and key != f"{name}.bias"]
        state = {key.removeprefix(f"{name}."): checkpoint.tensor(key).clone() for key in leaves}
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format or config.format))
        yield name, compressor.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("name", NAMES)
def test_the_package_reads_what_is_written(tmp_path: Path, name: str) -> None:
    demo = Checkpoint(DEMO_FOLDER)
    modules = [module for module in linears_of(demo) if "layers.9." in module]
    out = quantise(DEMO_FOLDER, tmp_path / "out", dict.fromkeys(modules, name))
    found = dict(decompressed(out))
    assert set(found) == set(modules)
    scheme, quantized = find_scheme(name), Checkpoint(out).quantized
    assert quantized is not None
    for module, weight in found.items():
        ours = scheme.dequantize(scheme.quantize(demo.tensor(f"{module}.weight")))
        assert weight.shape == ours.shape
        # rounded once to the package's dtype; NVFP4's scale / global scale once more before the product
        limit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0}[weight.dtype]
        if name == "nvfp4":
            limit = 3 * 2.0**-8 if weight.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(weight.float(), ours, rtol=limit, atol=0)
        torch.testing.assert_close(quantized.linears[module].dense(), ours, rtol=2.0**-22, atol=0)


def test_the_package_reads_mixed_schemes(tmp_path: Path) -> None:
    demo = Checkpoint(DEMO_FOLDER)
    modules = [module for module in linears_of(demo) if "layers.9." in module]
    schemes = {m: "fp8" if "down" in m else "int4-g32" if "self_attn" in m else "mxfp4" for m in modules}
    out = quantise(DEMO_FOLDER, tmp_path / "out", schemes)
    found = dict(decompressed(out))
    assert set(found) == set(modules)
    for module, weight in found.items():
        scheme = find_scheme(schemes[module])
        ours = scheme.dequantize(scheme.quantize(demo.tensor(f"{module}.weight")))
        torch.testing.assert_close(weight.float(), ours, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", ["int4", "int4-zeros", "int8-weight", "fp8-block"])
def test_transformers_reads_what_is_written(tmp_path: Path, name: str) -> None:
    """Zero points only as it loads the weights: compressed, it expects them unpacked, whoever wrote them
    (https://github.com/vllm-project/llm-compressor/issues/1618)."""
    import transformers

    demo = Checkpoint(DEMO_FOLDER)
    out = quantise(DEMO_FOLDER, tmp_path / "out", dict.fromkeys(linears_of(demo), name))
    options: dict[str, Any] = {"dtype": torch.float32}
    if name == "int4-zeros":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out, **options).eval()
    with LLM(out, device="cpu", max_num_seqs=1) as llm:
        ours = llm.generate(
            "def fibonacci(n):", SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        )[0]
        ids = list(ours.prompt_token_ids)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        assert (llm.logits(ids) - logits).norm() < 2e-2 * logits.norm()
        with torch.inference_mode():
            for token in ours.token_ids:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                assert name == "fp8-block" or ids[-1] == token


# --- what the package wrote ---------------------------------------------------------------------------------

ARGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str, set[str | None], int]] = {
    # case -> weights, input_activations, format, the engine's schemes, steps that are linears of a layer
    "fp8-tensor": (
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "float-quantized",
        {"fp8"},
        4,
    ),
    "fp8-channel": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        "float-quantized",
        {"fp8"},
        4,
    ),
    "fp8-weights-only": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        None,
        "naive-quantized",
        {"fp8-weight"},
        4,
    ),
    "fp8-block": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
        "float-quantized",
        {"fp8-block"},
        6,
    ),
    "fp8-block-64": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64, "dynamic": True},
        "float-quantized",
        {None},
        4,
    ),
    "int8-channel": (
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        "int-quantized",
        {"int8"},
        4,
    ),
    "int8-zeros": (
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False},
        "int-quantized",
        {"int8-zeros"},
        4,
    ),
    "int8-tensor": (
        {"num_bits": 8, "type": "int", "strategy": "tensor"},
        {"num_bits": 8, "type": "int", "strategy": "tensor"},
        "int-quantized",
        {"int8"},
        4,
    ),
    "int8-asym": (
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        "int-quantized",
        {None},
        4,
    ),
    "w8a16-channel": (
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        None,
        "pack-quantized",
        {"int8-weight"},
        4,
    ),
    "w8a16-group": (
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
        None,
        "pack-quantized",
        {None},
        4,
    ),
    "w8a16-group-asym": (
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        None,
        "pack-quantized",
        {None},
        4,
    ),
    "w4a16-128": (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        None,
        "pack-quantized",
        {"int4"},
        4,
    ),
    "w4a16-64-static-order": (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "actorder": "static"},
        None,
        "pack-quantized",
        {"int4-g64"},
        4,
    ),
    "w4a16-32-asym": (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        None,
        "pack-quantized",
        {"int4-g32-zeros"},
        4,
    ),
    "w4a16-channel-asym": (
        {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
        None,
        "pack-quantized",
        {"int4-channel-zeros"},
        4,
    ),
    "w4afp8": (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        "pack-quantized",
        {"int4-fp8"},
        4,
    ),
    "nvfp4": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        None,
        "nvfp4-pack-quantized",
        {"nvfp4"},
        7,
    ),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        None,
        "mxfp4-pack-quantized",
        {"mxfp4"},
        4,
    ),
}


def compressor_pack(args: dict[str, Any], activations: dict[str, Any] | None, form: str) -> made.Pack:
    """By the package, with scales from the largest magnitudes."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**args),
        input_activations=None if activations is None else QuantizationArgs(**activations),
    )
    compressor = BaseCompressor.get_value_from_registry(form)
    strategy = args["strategy"]

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> made.Packed:
        weight = torch.randn(out_size, in_size, generator=generator) * in_size**-0.5
        size = args.get("group_size") or in_size
        if strategy == "block":
            rows, size = args["block_structure"]
            padded = torch.nn.functional.pad(weight, (0, -in_size % size, 0, -out_size % rows))
            groups = padded.unflatten(1, (-1, size)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        else:
            groups = weight.unflatten(1, (-1, size))
        if strategy == "tensor":
            groups = weight.reshape(1, 1, -1)
        largest = {("int", 4): 7.5, ("int", 8): 127, ("float", 8): 448.0, ("float", 4): 6.0}
        scale = groups.abs().amax(-1) / largest[args["type"], args["num_bits"]]
        state = {}
        if not args.get("symmetric", True):
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            half = 1 << (args["num_bits"] - 1)
            scale = ((high - low) / (2 * half - 1)).bfloat16().float()
            point = (-half - low / scale).round().clamp(-half, half - 1)
            state["weight_zero_point"] = point.to(torch.int8)
        if form.startswith("mxfp4"):
            scale = torch.exp2(scale.log2().ceil())
        elif form.startswith("nvfp4"):
            factor = 448.0 / scale.max()
            state["weight_global_scale"] = factor.view(1)
            scale = (scale * factor).to(torch.float8_e4m3fn).float()
        else:
            scale = scale.bfloat16()
            weight = weight.bfloat16()
        if strategy == "tensor":
            scale = scale.view(1)
        leaves = compressor.compress({"weight": weight, "weight_scale": scale, **state}, scheme)
        whole = {**leaves, "weight_scale": leaves["weight_scale"].clone()}
        if whole["weight_scale"].dtype == torch.bfloat16:  # so that what it decompresses to is not rounded
            whole["weight_scale"] = whole["weight_scale"].float()
        exact = compressor.decompress(whole, scheme)["weight"]
        return made.Packed({key: value.contiguous() for key, value in leaves.items()}, exact.double())

    return pack


@pytest.mark.filterwarnings("ignore:.*no kernel takes their format")
@pytest.mark.parametrize("case", ARGS)
def test_what_the_package_wrote_is_read(tmp_path: Path, case: str) -> None:
    args, activations, form, schemes, num_linears = ARGS[case]
    pack = compressor_pack(args, activations, form)
    folder, _, weights = made.make(tmp_path, config_of(args, activations, form), pack)
    checkpoint = Checkpoint(folder)
    quantized = checkpoint.quantized
    assert quantized is not None and set(quantized.linears) == set(weights)
    assert {linear.scheme for linear in quantized.linears.values()} == schemes
    plan = compile_model(checkpoint.config, stored=quantized.linears)
    assert sum("linear" in step.op for step in plan.steps) == 2 * num_linears + 1
    for name, weight in weights.items():
        # NVFP4: the package rounds scale / global scale, and what comes of it, to the dtype of its table
        limit = 3 * 2.0**-8 if form.startswith("nvfp4") else 1e-6
        ours = quantized.linears[name].dense(dtype=torch.float64)
        torch.testing.assert_close(ours, weight, rtol=limit, atol=0)
    exact = definition_logits(folder, {name: linear.scheme for name, linear in quantized.linears.items()})
    error = (logits_of(folder) - exact).norm() / exact.norm()
    assert error < (2e-2 if schemes & {"fp8", "fp8-block", "int8", "int8-zeros"} else 1e-4)


def config_of(
    args: dict[str, Any], activations: dict[str, Any] | None, form: str, **rest: Any
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args, "input_activations": activations}
        },
        "ignore": ["lm_head"],
        **rest,
    }


W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def test_activation_order_of_older_versions(tmp_path: Path) -> None:
    """weight_g_idx, which the package wrote until 2026: the group of each column."""
    packed = made.gptq(32, order="act")

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> made.Packed:
        one = packed(name, out_size, in_size, generator)
        leaves = {
            "weight_packed": one.leaves["qweight"].t().contiguous(),
            "weight_scale": one.leaves["scales"].t().contiguous(),
            "weight_g_idx": one.leaves["g_idx"],
            "weight_shape": torch.tensor([out_size, in_size]),
        }
        return made.Packed(leaves, one.weight)

    config = config_of({**W4, "actorder": "group"}, None, "pack-quantized")
    folder, plain, weights = made.make(tmp_path, config, pack)
    quantized = Checkpoint(folder).quantized
    assert quantized is not None
    for name, weight in weights.items():
        torch.testing.assert_close(
            quantized.linears[name].dense(dtype=torch.float64), weight, rtol=1e-6, atol=0
        )
    exact = logits_of(plain)
    assert (logits_of(folder) - exact).norm() < 1e-4 * exact.norm()


def test_targets_and_ignore_are_matched_as_the_package_does(tmp_path: Path) -> None:
    """Names before patterns before classes; ignored before all."""
    four, eight = compressor_pack(W4, None, "pack-quantized"), compressor_pack(W8, None, "pack-quantized")
    wide = (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.self_attn.o_proj",
    )

    def pack(name: str, *rest: Any) -> made.Packed:
        return (eight if name in wide else four)(name, *rest)

    config = config_of(W4, None, "pack-quantized", ignore=["lm_head", r"re:.*\.1\.mlp\..*"])
    config["config_groups"]["group_1"] = {
        "targets": [r"re:.*o_proj$", "model.layers.0.mlp.up_proj"],
        "weights": W8,
    }
    folder, _, weights = made.make(tmp_path, config, pack, only=lambda name: ".1.mlp" not in name)
    quantized = Checkpoint(folder).quantized
    assert quantized is not None
    assert set(quantized.linears) == {name for name in weights if ".1.mlp" not in name}
    assert {name for name, linear in quantized.linears.items() if linear.scheme == "int8-weight"} == set(wide)
    assert torch.isfinite(logits_of(folder)).all()


def test_what_is_refused(tmp_path: Path) -> None:
    pack = compressor_pack(W4, None, "pack-quantized")

    def refused(message: str, config: dict[str, Any], leaf: str = "", value: Any = None) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            if leaf and value is None:
                del tensors[f"{made.GATE}.{leaf}"]
            elif leaf:
                tensors[f"{made.GATE}.{leaf}"] = value

        folder, _, _ = made.make(tmp_path, config, pack, change=change)
        with pytest.raises(CheckpointError, match=message):
            LLM(folder, device="cpu", max_num_seqs=1)

    form, gate = "pack-quantized", r"model\.layers\.1\.mlp\.gate_proj"
    refused("has no config_groups with their targets", config_of(W4, None, form, config_groups=None))
    refused(
        r"q_proj is quantised to int of 3 bits, strategy group; of compressed-tensors fastkernels reads",
        config_of({**W4, "num_bits": 3}, None, form),
    )
    refused(
        "q_proj has rows of 128, which its groups of 48 do not divide",
        config_of({**W4, "group_size": 48}, None, form),
    )
    refused(
        "has a sparsity_config, which", config_of(W4, None, form, sparsity_config={"format": "sparse-24"})
    )
    refused(f"{gate} has no weight_scale, without which", config_of(W4, None, form), "weight_scale")
    refused(
        "q_proj has no weight_zero_point, without which",
        config_of({**W4, "symmetric": False}, None, form),
    )
    refused(
        rf"{gate} has weight_packed of shape \[128, 32\]; compressed-tensors of a weight \[256, 128\] has it "
        r"as \[256, 16\], 8 inputs a word",
        config_of(W4, None, form),
        "weight_packed",
        torch.zeros(128, 32, dtype=torch.int32),
    )
    refused(
        f"{gate} has a scale of 0 in weight_scale",
        config_of(W4, None, form),
        "weight_scale",
        torch.zeros(256, 4, dtype=torch.bfloat16),
    )
