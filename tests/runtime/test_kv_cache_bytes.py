"""Engines whose KV cache has 8 bits: as good as the definition with rounded keys, chosen by checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint, CheckpointError
from fastkernels.checkpoint.quantized.kv_cache import OFFSETS_FILE
from fastkernels.checkpoint.weights import load_weights as load_definition
from fastkernels.cli import app
from fastkernels.config import ConfigError
from fastkernels.models import build
from fastkernels.quantize.algorithms.grid import nearest
from fastkernels.runtime.build import choose_kv_cache

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, KV_HEADS = 10, 2
TEXT = (
    "import os\n\n\ndef walk(folder):\n    for root, dirs, files in os.walk(folder):\n        yield root\n\n"
)
KINDS = {"fp8": ("float", "e4m3", torch.float8_e4m3fn), "int8": ("int", "int8", torch.int8)}
# Large enough for the demo's keys of any text; scales of one head or of all.
SCALES = {"fp8": (0.06, 0.03), "int8": (0.16, 0.06)}


def with_kv(folder: Path, kind: str | None, scales: dict[str, torch.Tensor], **config: object) -> Path:
    """The demo model with tensors of a KV cache beside its own."""
    shutil.copytree(DEMO_FOLDER, folder)
    tensors = load_file(DEMO_FOLDER / "model.safetensors")
    save_file({**tensors, **scales}, folder / "model.safetensors")
    if kind is not None:
        scheme = {"num_bits": 8, "type": KINDS[kind][0], "strategy": "tensor", "symmetric": True}
        config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    if config:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**whole, "quantization_config": config}))
    return folder


def scales_of(kind: str, name: str = "{x}_scale") -> dict[str, torch.Tensor]:
    """Of every layer another; those of odd layers one a head."""
    found = {}
    for layer in range(LAYERS):
        for x, size in zip("kv", SCALES[kind], strict=True):
            shape = (KV_HEADS, 1, 1) if layer % 2 else ()
            found[f"model.layers.{layer}.self_attn.{name.format(x=x)}"] = size * (1 + torch.rand(shape))
    return found


def write_offsets(folder: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of the keys of every layer."""
    name = "model.layers.{}.self_attn.k_offset"
    offsets = {name.format(layer): torch.randn(KV_HEADS, 64) * scale for layer in range(LAYERS)}
    save_file(offsets, folder / OFFSETS_FILE)
    return offsets


@pytest.fixture(scope="module", params=[*KINDS, "fp8 less offsets"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    torch.manual_seed(5)
    kind, _, offsets = request.param.partition(" less ")
    folder = with_kv(tmp_path_factory.mktemp("kv") / kind, kind, scales_of(kind))
    if offsets:
        write_offsets(folder)
    return folder, kind


class RoundedAttention(nn.Module):
    """The definition's attention over keys and values as a cache gives them back."""

    def __init__(
        self, attention: nn.Module, scales: list[torch.Tensor], weight_type: str, offset: torch.Tensor
    ) -> None:
        super().__init__()
        self.attention, self.scales, self.weight_type = attention, scales, weight_type
        self.offset = offset

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k - self.offset
        k, v = (
            nearest(x / scale.view(-1, 1), self.weight_type) * scale.view(-1, 1)
            for x, scale in zip((k, v), self.scales, strict=True)
        )
        return self.attention(q, k, v)


def definition_logits(folder: Path, kind: str, ids: list[int]) -> torch.Tensor:
    checkpoint, offsets = Checkpoint(DEMO_FOLDER), folder / OFFSETS_FILE
    key_offsets = load_file(offsets) if offsets.exists() else {}
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_definition(model, checkpoint, dtype=torch.float32)
    model.build_table(len(ids))
    for index, layer in enumerate(model.model.layers):
        names = [f"model.layers.{index}.self_attn.{x}_scale" for x in "kv"]
        scales = [Checkpoint(folder).tensor(name).float() for name in names]
        offset = key_offsets.get(f"model.layers.{index}.self_attn.k_offset", torch.zeros(()))
        attention = RoundedAttention(layer.self_attn.attention, scales, KINDS[kind][1], offset)
        layer.self_attn.attention = attention
    with torch.inference_mode():
        return model(torch.tensor(ids), torch.arange(len(ids)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- what is computed ---------------------------------------------------------------------------------------


def test_logits_are_those_of_rounded_keys(stored, device):
    """Whole, and in chunks over keys that are bytes already, of more tokens than Hopper's prefill needs.

    A sum that falls on the other side of a midpoint moves a code, on the CPU in fp32 now and then.
    """
    folder, kind = stored
    options = {"device": device.type, "dtype": "fp32" if device.type == "cpu" else "bf16", "max_num_seqs": 4}
    with LLM(folder, **options) as llm:
        assert llm.kv_cache_dtype == KINDS[kind][2]
        ids = llm.tokenizer.encode(TEXT * 20)[:600]
        found = llm.logits(ids)
    expected = definition_logits(folder, kind, ids)
    with LLM(folder, **options, kv_cache_dtype=options["dtype"]) as llm:
        plain = llm.logits(ids)
    assert llm.kv_cache_dtype == llm.dtype
    cost = relative(plain, expected)  # of rounding keys; in bf16 of all else too
    assert 0.002 < cost < 0.05
    assert relative(found, expected) <= (0.2 * cost if device.type == "cpu" else 1.2 * cost)
    with LLM(folder, **options, max_num_tokens=250) as llm:
        assert relative(llm.logits(ids), found) <= 0.5 * cost


def test_greedy_tokens(stored, device):
    """Prompts that run together, prefilled and decoded, take the likeliest token of the logits."""
    folder, _ = stored
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0)
    with LLM(folder, device=device.type, max_num_seqs=4, max_seq_len=512) as llm:
        prompts = [TEXT, "def fibonacci(n):", TEXT * 4, "class Queue:"]
        for output in llm.generate(prompts, params):
            logits = llm.logits(output.prompt_token_ids + output.token_ids[:-1])
            logits = logits[len(output.prompt_token_ids) - 1 :]
            taken = logits[torch.arange(24), torch.tensor(output.token_ids)]
            # A token next to the likeliest: sums of a chunk and of a decode are rounded in another order.
            assert (logits.amax(1) - taken).max() <= (0.02 if device.type == "cpu" else 0.3)


def test_it_agrees_with_a_cache_of_the_models_dtype(stored, device):
    folder, _ = stored
    with LLM(folder, device=device.type, max_num_seqs=1) as llm:
        ids = llm.tokenizer.encode(TEXT * 8)
        found = llm.logits(ids).log_softmax(-1)
    with LLM("demo", device=device.type, max_num_seqs=1) as llm:
        exact = llm.logits(ids).log_softmax(-1)
    assert (exact.exp() * (exact - found)).sum(-1).mean() <= 0.005
    assert (exact.argmax(-1) == found.argmax(-1)).float().mean() >= 0.97


# INT4 weights with FP8 KV, FP8 compute with FP16 KV, and what else goes together.
PAIRS = [
    ("int4", "fp8"),
    ("int4", "int8"),
    ("fp8", "fp16"),
    ("fp8", "fp8"),
    ("int8", "fp8"),
    ("nvfp4", "fp8"),
]


@pytest.mark.parametrize(("scheme", "cache"), PAIRS)
def test_weights_and_cache_of_fewer_bits(tmp_path, scheme, cache, device):
    """The two roundings together cost little more than the weights' alone."""
    if device.type == "cuda" and scheme in ("fp8", "int8") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("schemes that round activations are for Hopper GPUs")
    folder = with_kv(tmp_path / "kv", None, scales_of("int8" if cache == "int8" else "fp8"))
    if cache == "int8":  # no scheme says what the scales are for: they are taken for e4m3's
        tensors = {
            n: t * 127 / 448 if "_scale" in n else t
            for n, t in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors")
    options = {"device": device.type, "dtype": "fp16", "max_num_seqs": 1}
    with LLM("demo", **options) as llm:
        ids = llm.tokenizer.encode(TEXT * 6)
        exact = llm.logits(ids).log_softmax(-1)
    divergences = []
    for model, kv_cache_dtype in (("demo", "fp16"), (folder, cache)):
        with LLM(model, **options, quantization=scheme, kv_cache_dtype=kv_cache_dtype) as llm:
            found = llm.logits(ids).log_softmax(-1)
        divergences.append((exact.exp() * (exact - found)).sum(-1).mean().item())
    assert divergences[1] <= 1.2 * divergences[0] + 0.005
    assert divergences[0] < 0.05


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_twice_the_pages_in_the_same_memory(stored, dtype):
    folder, _ = stored
    options = {"device": "cpu", "dtype": dtype, "max_num_seqs": 64, "kv_cache_bytes": 1 << 23}
    with LLM(folder, **options) as llm, LLM(folder, **options, kv_cache_dtype=dtype) as plain:
        ratio = 4 if dtype == "fp32" else 2
        assert llm.ledger.kv_bytes_per_page == LAYERS * 2 * KV_HEADS * 16 * 64
        assert plain.ledger.kv_bytes_per_page == ratio * llm.ledger.kv_bytes_per_page
        assert llm.num_pages == ratio * plain.num_pages
        assert llm.ledger.kv_bytes == llm.num_pages * llm.ledger.kv_bytes_per_page <= 1 << 23
        offsets = 64 if (folder / OFFSETS_FILE).exists() else 0
        assert llm.ledger.weights_bytes - plain.ledger.weights_bytes == LAYERS * (2 + offsets) * KV_HEADS * 4


# --- what a checkpoint says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
            "{x}_proj.{x}_scale",
        ),
        ({"quant_method": "fp8", "kv_cache_scheme": "static", "ignored_layers": []}, "kv_scale"),
        ({}, "attn.{x}_scale"),
    ],
)
def test_names_and_words_of_other_tools(tmp_path, config, name):
    scales = scales_of("fp8", name)
    kv = Checkpoint(with_kv(tmp_path / "kv", None, scales, **config)).kv
    assert (kv.kind, kv.unread, len(kv.names)) == ("fp8", None, 2 * LAYERS)
    for wanted, stored in kv.names.items():
        expected = scales[stored].flatten().expand(KV_HEADS)
        assert torch.equal(kv.read(wanted, KV_HEADS, "fp8"), expected)
        assert torch.allclose(kv.read(wanted, KV_HEADS, "int8"), expected * 448 / 127)


def test_what_a_checkpoint_says_is_taken_or_refused(tmp_path):
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    fp8 = Checkpoint(with_kv(tmp_path / "fp8", "fp8", scales_of("fp8"))).kv
    assert (
        choose_kv_cache("auto", fp8, cpu, bf16) == choose_kv_cache("fp8", fp8, cpu, bf16) == "float8_e4m3fn"
    )
    assert choose_kv_cache("int8", fp8, cpu, bf16) == "int8"
    assert choose_kv_cache("bf16", fp8, cpu, bf16) == "model"
    with pytest.raises(
        ConfigError, match="kv_cache_dtype is fp16; the cache of this engine, whose dtype is bf16"
    ):
        choose_kv_cache("fp16", fp8, cpu, bf16)
    cuda = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="takes an engine of bf16 or fp16; this engine's dtype is fp32"):
        choose_kv_cache("fp8", fp8, cuda, torch.float32)
    with pytest.warns(UserWarning, match=r"held in torch.float32: a KV cache of bytes on CUDA takes"):
        assert choose_kv_cache("auto", fp8, cuda, torch.float32) == "model"
    plain = Checkpoint(DEMO_FOLDER).kv
    assert choose_kv_cache("auto", plain, cpu, bf16) == "model"
    with pytest.warns(UserWarning, match=r"no scales for an FP8 KV cache; .* a scale of 1"):
        assert choose_kv_cache("fp8", plain, cpu, bf16) == "float8_e4m3fn"
    with pytest.raises(
        ConfigError, match="kv_cache_dtype is int8: an INT8 cache needs a scale for every layer"
    ):
        choose_kv_cache("int8", plain, cpu, bf16)
    none = Checkpoint(with_kv(tmp_path / "int8", "int8", {})).kv
    with pytest.warns(UserWarning, match="is held in torch.bfloat16: an INT8 cache needs a scale for every"):
        assert choose_kv_cache("auto", none, cpu, bf16) == "model"
    odd = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 4}}
    four = Checkpoint(with_kv(tmp_path / "int4", None, scales_of("fp8"), **odd)).kv
    with pytest.warns(
        UserWarning, match=r"fastkernels has none as kv_cache_scheme \{'num_bits': 4\} asks for"
    ):
        assert choose_kv_cache("auto", four, cpu, bf16) == "model"
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp4'; it must be one of auto, bf16"):
        LLM("demo", kv_cache_dtype="fp4")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.zeros(1), "k_scale holds a scale of 0; scales are positive"),
        (torch.tensor(float("nan")), "k_scale holds a scale of nan"),
        (torch.ones(3), r"k_scale has shape \[3\]; a KV cache takes one scale, or one for each of 2 heads"),
    ],
)
def test_broken_scales_are_refused(tmp_path, scale, message):
    scales = {**scales_of("fp8"), "model.layers.3.self_attn.k_scale": scale}
    with pytest.raises(CheckpointError, match=message):
        LLM(with_kv(tmp_path / "kv", "fp8", scales), device="cpu", max_num_seqs=1)


def test_offsets_of_keys(tmp_path):
    """The plan has them where the file is there and the cache is of bytes; broken ones are refused."""
    folder = with_kv(tmp_path / "kv", "fp8", scales_of("fp8"))
    offsets = write_offsets(folder)
    with LLM(folder, device="cpu", max_num_seqs=1) as llm:
        assert set(offsets) <= set(llm.plan.weights)
    with LLM(folder, device="cpu", max_num_seqs=1, kv_cache_dtype="fp32") as llm:
        assert not set(offsets) & set(llm.plan.weights)
    third = "model.layers.3.self_attn.k_offset"
    for broken, message in (
        (torch.zeros(KV_HEADS), rf"{third} has shape \[2\]; the model's is \[2, 64\]"),
        (torch.full((KV_HEADS, 64), float("nan")), f"{third} holds NaN or infinity"),
        (None, f"has no tensor '{third}'"),
    ):
        wrong = {name: x for name, x in {**offsets, third: broken}.items() if x is not None}
        save_file(wrong, folder / OFFSETS_FILE)
        with pytest.raises(CheckpointError, match=message):
            LLM(folder, device="cpu", max_num_seqs=1)


def test_random_weights_and_the_command_line(stored):
    folder, kind = stored
    ids = list(range(40))
    with LLM("demo", device="cpu", random_weights=True, max_num_seqs=1) as llm:
        exact = llm.logits(ids)
    with LLM("demo", device="cpu", random_weights=True, kv_cache_dtype=kind, max_num_seqs=1) as llm:
        assert relative(llm.logits(ids), exact) < 0.1
    runner = CliRunner()
    command = ["--model", str(folder), "--prompt", "def f", "--max-tokens", "2", "--device", "cpu"]
    assert runner.invoke(app, ["generate", *command, "--kv-cache-dtype", kind]).exit_code == 0
    assert runner.invoke(app, ["generate", *command, "--kv-cache-dtype", "int4"]).exit_code == 2
    shown = runner.invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0 and f"cache={str(KINDS[kind][2]).removeprefix('torch.')}" in shown.stdout
