"""Quantised checkpoints of AutoAWQ, GPTQ, ModelOpt and DeepSeek, packed by plain loops: read and served."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastkernels import LLM
from fastkernels.checkpoint import Checkpoint, CheckpointError, load_weights, write_checkpoint
from fastkernels.checkpoint.quantized.awq import read_awq
from fastkernels.checkpoint.quantized.gptq import read_gptq
from fastkernels.checkpoint.quantized.stored import Module
from fastkernels.compiler import compile_model
from fastkernels.config import ConfigError, EngineConfig
from fastkernels.models import build
from fastkernels.ops import reference
from fastkernels.quantize import find_scheme
from fastkernels.runtime.build import compile_for
from fastkernels.runtime.weights import load_weights as load_plan
from fastkernels.runtime.weights import random_weights
from tests.checkpoint import quantized_made as made

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = list(range(3, 60))
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}

# name -> quantization_config, how it is packed, the engine's schemes, the steps that are linears of a layer
MERGED, ALONE = 4, 7
CASES: dict[str, tuple[dict[str, Any], made.Pack, set[str | None], int]] = {
    "awq-g32": (AWQ, made.awq(32), {"int4-g32-zeros-fp16"}, MERGED),
    "awq-g64": ({**AWQ, "group_size": 64}, made.awq(64), {"int4-g64-zeros-fp16"}, MERGED),
    "awq-g128": ({**AWQ, "group_size": 128}, made.awq(128), {"int4-zeros-fp16"}, MERGED),
    "awq-row": (
        {**AWQ, "group_size": -1, "version": "GEMM"},
        made.awq(-1),
        {"int4-channel-zeros-fp16"},
        MERGED,
    ),
    "awq-g16": ({**AWQ, "group_size": 16}, made.awq(16), {None}, MERGED),
    "gptq": (GPTQ, made.gptq(32, order="trivial"), {"int4-g32-fp16"}, MERGED),
    "gptq-no-g_idx": (GPTQ, made.gptq(32), {"int4-g32-fp16"}, MERGED),
    "gptq-act-order": (
        {**GPTQ, "desc_act": True},
        made.gptq(32, order="act"),
        {"int4-g32-fp16"},
        MERGED,
    ),
    "gptq-own-orders": (
        {**GPTQ, "desc_act": True, "group_size": 64},
        made.gptq(64, order="own"),
        {"int4-g64-fp16"},
        ALONE,
    ),
    "gptq-asym": ({**GPTQ, "sym": False}, made.gptq(32, sym=False), {"int4-g32-zeros-fp16"}, MERGED),
    "gptq-asym-act-order": (
        {**GPTQ, "sym": False, "desc_act": True},
        made.gptq(32, sym=False, order="act"),
        {"int4-g32-zeros-fp16"},
        MERGED,
    ),
    "gptq-v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False},
        made.gptq(32, sym=False, v2=True, order="trivial"),
        {"int4-g32-zeros-fp16"},
        MERGED,
    ),
    "gptq-row": ({**GPTQ, "group_size": -1}, made.gptq(-1, order="trivial"), {"int4-channel-fp16"}, MERGED),
    "gptq-8-row": ({**GPTQ, "bits": 8, "group_size": -1}, made.gptq(-1, bits=8), {"int8-weight"}, MERGED),
    "gptq-8": ({**GPTQ, "bits": 8}, made.gptq(32, bits=8, sym=True), {None}, MERGED),
    "gptq-8-asym-act-order": (
        {**GPTQ, "bits": 8, "sym": False, "desc_act": True},
        made.gptq(32, bits=8, sym=False, order="act"),
        {None},
        MERGED,
    ),
    "modelopt-fp8": (MODELOPT, made.fp8("tensor"), {"fp8"}, MERGED),
    "modelopt-fp8-row": (
        {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        made.fp8("vector"),
        {"fp8"},
        MERGED,
    ),
    "modelopt-nvfp4": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        made.nvfp4(shared=True, divides=False),
        {"nvfp4"},
        MERGED,
    ),
    "modelopt-nvfp4-own-scales": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        made.nvfp4(shared=False, divides=False),
        {"nvfp4"},
        ALONE,
    ),
    # k has 64 rows, so v's blocks would begin within one of the merged weight's
    "fp8-block": (BLOCK, made.fp8("block", "weight_scale_inv"), {"fp8-block"}, 6),
    "fp8-block-ue8m0": (
        BLOCK,
        made.fp8("block", "weight_scale_inv", torch.float8_e8m0fnu),
        {"fp8-block"},
        6,
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        made.fp8("tensor"),
        {"fp8"},
        MERGED,
    ),
}


def definition_logits(folder: Path, schemes: dict[str, str | None]) -> torch.Tensor:
    """Of the plain definition, with activations rounded as the schemes of its linears do it."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    model.build_table(len(IDS))
    for name, scheme in schemes.items():
        activation = None if scheme is None else find_scheme(scheme).activation
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, a=activation: (reference.round_activation(args[0], a, torch.float32),)
        )
    with torch.inference_mode():
        return model(torch.tensor(IDS), torch.arange(len(IDS)))


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    with LLM(folder, device="cpu", dtype="fp32", max_num_seqs=1, **options) as llm:
        return llm.logits(IDS)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_read_and_served(tmp_path: Path, case: str) -> None:
    config, pack, schemes, num_linears = CASES[case]
    folder, plain, weights = made.make(tmp_path, config, pack)
    checkpoint = Checkpoint(folder)
    assert checkpoint.quantized is not None
    linears = checkpoint.quantized.linears
    assert set(linears) == set(weights)
    assert {linear.scheme for linear in linears.values()} == schemes
    for name, weight in weights.items():
        torch.testing.assert_close(linears[name].dense(dtype=torch.float64), weight, rtol=1e-6, atol=0)

    plan = compile_model(checkpoint.config, stored=linears)
    steps = [step for step in plan.steps if step.op in ("linear", "linear_silu_mul", "quantized_linear")]
    assert len(steps) == 2 * num_linears + 1
    gathers = [step for step in plan.steps if step.op == "gather_columns"]
    permuted = any(linear.permutation is not None for linear in linears.values()) and None not in schemes
    assert len(gathers) == (2 * num_linears if permuted else 0)

    exact = definition_logits(plain, {name: linear.scheme for name, linear in linears.items()})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        error = (logits_of(folder) - exact).norm() / exact.norm()
    said = [str(one.message) for one in warned if "no kernel takes their format" in str(one.message)]
    assert len(said) == (None in schemes) and all("14 of 14 quantised linears" in words for words in said)
    # The same sums in another order, x in steps of 2^-16; where x is rounded, some move by a step of that.
    assert error < (2e-2 if schemes & {"fp8", "fp8-block"} else 1e-4)


def test_without_merges(tmp_path: Path) -> None:
    """The same tokens whether linears with activation order become one or not."""
    config, pack, _, _ = CASES["gptq-asym-act-order"]
    folder, _, _ = made.make(tmp_path, config, pack)
    alone = logits_of(folder, disabled_passes=("merge_qkv", "merge_gate_up"))
    torch.testing.assert_close(alone, logits_of(folder), rtol=0, atol=1e-5)


def test_the_definition_takes_dequantised_weights(tmp_path: Path) -> None:
    config, pack, _, _ = CASES["awq-g32"]
    folder, _, weights = made.make(tmp_path, config, pack)
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    linear = model.get_submodule(made.GATE)
    assert isinstance(linear, nn.Linear)
    torch.testing.assert_close(linear.weight.detach().double(), weights[made.GATE], rtol=1e-6, atol=0)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    "case", ["gptq-act-order", "awq-g128", "modelopt-nvfp4", "gptq-8-row", "fp8-tensor", "fp8-block"]
)
def test_the_layouts_of_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, capability: tuple[int, int]
) -> None:
    """Repacked from what is stored, or as it is: the shapes and dtypes that the plan says."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    config, pack, schemes, _ = CASES[case]
    folder, _, _ = made.make(tmp_path, config, pack)
    checkpoint = Checkpoint(folder)
    plan = compile_for(
        checkpoint.config, EngineConfig(), torch.device("cuda", 0), torch.bfloat16, checkpoint.quantized
    )
    found = {step.attributes["scheme"] for step in plan.steps if "scheme" in step.attributes}
    assert found == {f"{scheme}@cuda" for scheme in schemes}
    for weights in (
        load_plan(plan, checkpoint, device="cpu", dtype=torch.bfloat16),
        random_weights(plan, device="cpu", dtype=torch.bfloat16),
    ):
        for name, spec in plan.weights.items():
            wanted = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
            assert (tuple(weights[name].shape), weights[name].dtype) == (spec.shape, wanted)


def test_without_the_pass_the_weights_are_dequantised(tmp_path: Path) -> None:
    config, pack, _, _ = CASES["gptq-asym-act-order"]
    folder, plain, _ = made.make(tmp_path, config, pack)
    torch.testing.assert_close(
        logits_of(folder, disabled_passes=("quantize",)), logits_of(plain), rtol=0, atol=1e-5
    )


@dataclass
class Leaves:
    """Of one module, "m", as a checkpoint gives them."""

    leaves: dict[str, torch.Tensor]
    path: Path = Path("made")

    def __contains__(self, name: object) -> bool:
        return name in {f"m.{leaf}" for leaf in self.leaves}

    def tensor(self, name: str) -> torch.Tensor:
        return self.leaves[name.removeprefix("m.")]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensor(name).dtype


@pytest.mark.parametrize(
    ("group_size", "in_size", "scheme"),
    [(256, 512, "int4-zeros-fp16"), (192, 384, "int4-g64-zeros-fp16"), (96, 192, "int4-g32-zeros-fp16")],
)
def test_large_groups_are_several_of_the_engines(group_size: int, in_size: int, scheme: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for method, read, config, pack in (
        ("AWQ", read_awq, AWQ, made.awq(group_size)),
        ("GPTQ", read_gptq, {**GPTQ, "sym": False}, made.gptq(group_size, sym=False, order="own")),
    ):
        one = pack("m", 24, in_size, generator)
        module = Module(Leaves(one.leaves), "m", 24, in_size, method)
        (linear,) = read({**config, "group_size": group_size}, [module])
        assert linear.scheme == scheme
        torch.testing.assert_close(linear.dense(dtype=torch.float64), one.weight, rtol=1e-6, atol=0)
        specs = find_scheme(scheme).parts(24, in_size)
        assert {name: (tuple(part.shape), part.dtype) for name, part in linear.read().items()} == {
            name: (spec.shape, spec.torch_dtype) for name, spec in specs.items()
        }


def test_biases_of_zeros_are_no_matter(tmp_path: Path) -> None:
    """AutoGPTQ wrote them for models without."""
    config, pack, _, _ = CASES["gptq"]

    def change(tensors: dict[str, torch.Tensor], value: float = 0.0) -> None:
        tensors[f"{made.GATE}.bias"] = torch.full((256,), value).half()

    folder, plain, _ = made.make(tmp_path, config, pack, change=change)
    exact = logits_of(plain)
    assert (logits_of(folder) - exact).norm() < 1e-4 * exact.norm()
    folder, _, _ = made.make(tmp_path, config, pack, change=lambda tensors: change(tensors, 0.5))
    with pytest.raises(CheckpointError, match=r"gate_proj\.bias', for which LlamaForCausalLM has no place"):
        LLM(folder, device="cpu", max_num_seqs=1)


# --- which linears are quantised --------------------------------------------------------------------------


def test_some_linears_are_not(tmp_path: Path) -> None:
    """By presence (AWQ), and by patterns (ModelOpt)."""
    folder, plain, weights = made.make(
        tmp_path, AWQ, made.awq(32), only=lambda name: not name.endswith(("down_proj", "k_proj"))
    )
    quantized = Checkpoint(folder).quantized
    assert quantized is not None
    assert set(quantized.linears) == {name for name in weights if not name.endswith(("down_proj", "k_proj"))}
    exact = logits_of(plain)
    assert (logits_of(folder) - exact).norm() < 1e-4 * exact.norm()

    config = {**MODELOPT, "exclude_modules": ["lm_head", "model.layers.0.*", "*.o_proj"]}
    kept = [name for name in weights if "layers.0" not in name and "o_proj" not in name]
    folder, _, _ = made.make(tmp_path, config, made.fp8("tensor"), only=lambda name: name in kept)
    quantized = Checkpoint(folder).quantized
    assert quantized is not None and list(quantized.linears) == kept
    assert torch.isfinite(logits_of(folder)).all()


def test_modelopt_by_its_own_file_and_mixed(tmp_path: Path) -> None:
    eight, four = made.fp8("tensor"), made.nvfp4(shared=True, divides=False)

    def pack(name: str, *rest: Any) -> made.Packed:
        return (eight if "mlp" in name else four)(name, *rest)

    folder, plain, weights = made.make(tmp_path, None, pack)
    layers = {name: {"quant_algo": "FP8" if "mlp" in name else "NVFP4"} for name in weights}
    (folder / "hf_quant_config.json").write_text(
        json.dumps(
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers},
            }
        )
    )
    quantized = Checkpoint(folder).quantized
    assert quantized is not None
    assert {linear.scheme for linear in quantized.linears.values()} == {"fp8", "nvfp4"}
    exact = definition_logits(plain, {name: linear.scheme for name, linear in quantized.linears.items()})
    assert (logits_of(folder) - exact).norm() < 2e-2 * exact.norm()


def test_rules_of_gptqmodel(tmp_path: Path) -> None:
    """``dynamic``: other bits for some modules, none for others; and AutoGPTQ's own file."""
    wide, usual = made.gptq(-1, bits=8), made.gptq(32)

    def pack(name: str, *rest: Any) -> made.Packed:
        return (wide if "down_proj" in name else usual)(name, *rest)

    config = {**GPTQ, "dynamic": {"-:.*o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}}}
    folder, plain, weights = made.make(tmp_path, config, pack, only=lambda name: "o_proj" not in name)
    quantized = Checkpoint(folder).quantized
    assert quantized is not None
    assert {linear.scheme for linear in quantized.linears.values()} == {"int8-weight", "int4-g32-fp16"}
    exact = logits_of(plain)
    assert (logits_of(folder) - exact).norm() < 1e-4 * exact.norm()

    folder, _, _ = made.make(tmp_path / "old", None, made.gptq(32))
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01})
    )
    quantized = Checkpoint(folder).quantized
    assert quantized is not None and set(quantized.linears) == set(weights)


def test_scales_of_the_cache_are_left_alone_where_it_has_none_of_8_bits(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for name in ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale"):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([0.03])

    folder, _, _ = made.make(
        tmp_path, {**MODELOPT, "kv_cache_quant_algo": "FP8"}, made.fp8("tensor"), change=change
    )
    with_scales = logits_of(folder, kv_cache_dtype="fp32")
    assert not torch.equal(with_scales, logits_of(folder))
    folder, _, _ = made.make(tmp_path / "without", MODELOPT, made.fp8("tensor"))
    assert torch.equal(with_scales, logits_of(folder))


# --- what is refused --------------------------------------------------------------------------------------


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    def refused(config: Any, message: str) -> None:
        folder, _, _ = made.make(tmp_path, config, made.awq(32))
        with pytest.raises(CheckpointError, match=message):
            _ = Checkpoint(folder).quantized

    known = "fastkernels reads compressed-tensors, awq, gptq, modelopt, modelopt_fp4, fp8"
    refused({"quant_method": "bitsandbytes"}, f"quant_method is 'bitsandbytes'; {known}")
    refused({"bits": 4}, f"quant_method is 'unnamed'; {known}")
    refused("awq", "the quantization_config is 'awq'; it must be an object")
    refused(
        {**AWQ, "version": "gemv"}, "AWQ quantization_config has version 'gemv'; fastkernels reads 'gemm'"
    )
    refused({**AWQ, "bits": 8}, "has 8 bits; fastkernels reads AWQ of 4")
    refused({**AWQ, "group_size": "all"}, "has group_size = 'all'; it must be an integer")
    refused({**AWQ, "group_size": 0}, "has group_size = 0; it must be positive, or -1 for whole rows")
    refused(
        {**GPTQ, "checkpoint_format": "marlin"},
        "has checkpoint_format 'marlin'; fastkernels reads gptq, gptq_v2",
    )
    refused(
        {**GPTQ, "bits": 3},
        r"layers\.0\.self_attn\.q_proj is quantised to 3 bits; fastkernels reads GPTQ",
    )
    refused(
        {**MODELOPT, "quant_algo": "W4A8_AWQ"},
        r"q_proj is quantised by ModelOpt's W4A8_AWQ; fastkernels reads FP8, FP8_PER_CHANNEL_PER",
    )
    folder, _, _ = made.make(tmp_path, {"quant_method": "modelopt"}, made.fp8("tensor"))
    with pytest.raises(CheckpointError, match="q_proj is quantised, but no quant_algo says how"):
        _ = Checkpoint(folder).quantized
    refused({**BLOCK, "weight_block_size": [128]}, r"has weight_block_size = \[128\]; it must be two sizes")


def test_a_second_quantisation(tmp_path: Path) -> None:
    folder, _, _ = made.make(tmp_path, AWQ, made.awq(32))
    with pytest.raises(ConfigError, match=r"is quantised already \(AWQ\); leave out quantization='int8'"):
        LLM(folder, device="cpu", quantization="int8")
    # the head is not
    assert torch.isfinite(logits_of(folder, head_quantization="int8")).all()


BROKEN: dict[str, tuple[dict[str, Any], made.Pack, str, Any, str]] = {
    # case -> config, pack, leaf of GATE, what becomes of it (None: nothing left), what follows the module
    "no scales": (
        AWQ,
        made.awq(32),
        "scales",
        None,
        "has no scales, without which its AWQ weight means nothing",
    ),
    "no zero points": (AWQ, made.awq(32), "qzeros", None, "has no qzeros, without which its AWQ weight"),
    "no weight": (AWQ, made.awq(32), "qweight", None, "has neither a qweight nor a weight"),
    "a scale of 0": (
        AWQ,
        made.awq(32),
        "scales",
        lambda x: x * (torch.arange(x.shape[1]) != 7),
        "has a scale of 0 in scales",
    ),
    "NaN": (
        GPTQ,
        made.gptq(32),
        "scales",
        lambda x: torch.where(torch.arange(x.shape[1]) == 7, float("nan"), x).half(),
        "has NaN or infinity in scales",
    ),
    "packed along the input": (
        AWQ,
        made.awq(32),
        "qweight",
        lambda x: x.reshape(256, 16).contiguous(),
        r"has qweight of shape \[256, 16\]; AWQ of a weight \[256, 128\] has it as \[128, 32\], eight "
        r"outputs a word; is it another version than gemm\?",
    ),
    "packed along the output": (
        GPTQ,
        made.gptq(32),
        "qweight",
        lambda x: x.reshape(128, 32).contiguous(),
        r"has qweight of shape \[128, 32\]; GPTQ of a weight \[256, 128\] has it as \[16, 256\], 8 inputs a",
    ),
    "another dtype": (
        AWQ,
        made.awq(32),
        "qweight",
        lambda x: x.long(),
        "has qweight in int64; AWQ has it in int32",
    ),
    "groups that do not divide": (
        {**GPTQ, "group_size": 48},
        made.gptq(32),
        "scales",
        lambda x: x,
        r"has rows of 128, which its groups of 48 do not divide",
    ),
    "another group size": (
        {**GPTQ, "group_size": 64},
        made.gptq(32),
        "scales",
        lambda x: x,
        r"has scales of shape \[4, 128\]; GPTQ of a weight \[128, 128\] has it as \[2, 128\]",
    ),
    "the other format": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        made.gptq(32),
        "scales",
        lambda x: x,
        "has zero points other than 8, but is said to be symmetric; is its format another than 'gptq_v2'",
    ),
    "a group too large": (
        {**GPTQ, "desc_act": True},
        made.gptq(32, order="act"),
        "g_idx",
        lambda x: torch.zeros_like(x),
        "has g_idx that does not give each of its 4 groups 32 columns",
    ),
    "no g_idx": (
        {**GPTQ, "desc_act": True},
        made.gptq(32, order="act"),
        "g_idx",
        None,
        "has no g_idx, without which desc_act leaves the groups unknown",
    ),
    "no block scales": (
        BLOCK,
        made.fp8("block", "weight_scale_inv"),
        "weight_scale_inv",
        None,
        "has no weight_scale_inv, without which its FP8 weight means nothing",
    ),
    "too few block scales": (
        BLOCK,
        made.fp8("block", "weight_scale_inv"),
        "weight_scale_inv",
        lambda x: x[:1],
        r"has weight_scale_inv of shape \[1, 1\]; FP8 of a weight \[256, 128\] has it as \[2, 1\]",
    ),
    "NaN in e4m3": (
        MODELOPT,
        made.fp8("tensor"),
        "weight",
        lambda x: torch.full_like(x.view(torch.uint8), 127).view(torch.float8_e4m3fn),
        "has NaN in its weight",
    ),
    "a global scale of 0": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        made.nvfp4(shared=True, divides=False),
        "weight_scale_2",
        torch.zeros_like,
        "has a scale of 0 in weight_scale_2",
    ),
    "pre_quant_scale": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        made.nvfp4(shared=True, divides=False),
        "pre_quant_scale",
        lambda x: torch.ones(128),
        "has a pre_quant_scale, which fastkernels does not read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_named(tmp_path: Path, case: str) -> None:
    config, pack, leaf, make_broken, message = BROKEN[case]
    name = f"{made.GATE}.{leaf}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if make_broken is None:
            del tensors[name]
        else:
            tensors[name] = make_broken(tensors.get(name))

    folder, _, _ = made.make(tmp_path, config, pack, change=change)
    with pytest.raises(CheckpointError, match=message) as raised:
        LLM(folder, device="cpu", max_num_seqs=1)
    of_all = ("groups that do not divide", "another group size", "the other format")
    assert f"{'model.layers.0.self_attn.q_proj' if case in of_all else made.GATE} " in str(raised.value)


def test_tensors_that_belong_nowhere(tmp_path: Path) -> None:
    folder, _, _ = made.make(
        tmp_path, AWQ, made.awq(32), change=lambda t: t.update({f"{made.GATE}.rotation": torch.ones(3)})
    )
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.rotation', for which LlamaForCausalLM has no place"
    ):
        LLM(folder, device="cpu", max_num_seqs=1)
    # a scale without anything quantised
    write_checkpoint(folder, made.CONFIG, {"model.layers.0.self_attn.k_scale": torch.ones(1)})
    assert Checkpoint(folder).quantized is None
