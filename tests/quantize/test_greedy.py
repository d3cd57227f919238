"""A checkpoint written, read again and compiled says what the model said that was quantised in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastkernels.quantize.run as run
from fastkernels import LLM, SamplingParams
from fastkernels.checkpoint import DEMO_FOLDER, Checkpoint
from fastkernels.checkpoint.weights import load_weights
from fastkernels.models import build
from fastkernels.quantize import find_scheme
from fastkernels.quantize.decoder_layers import round_inputs
from fastkernels.quantize.layer import quantize_layer
from fastkernels.quantize.methods import METHODS, assign_methods

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["def fibonacci(n):", "import os\n", "class Queue:\n    def __init__(self"]
NUM_TOKENS, NUM_LAYERS = 24, 4


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the demo model, which still say what is likely."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    tensors = load_file(DEMO_FOLDER / "model.safetensors")
    layers = tuple(f"model.layers.{index}." for index in range(NUM_LAYERS))
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.") or n.startswith(layers)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": NUM_LAYERS}))
    return folder


def model_in_memory(folder: Path, layers: list, scheme: str, device: torch.device) -> nn.Module:
    """The plain definition in fp32 with what the algorithms made of each layer; it rounds what its linears
    read as the schemes do."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = build(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    shapes = {}
    for index, result in enumerate(layers):
        for name, value in result.parameters.items():
            owner, _, leaf = f"model.layers.{index}.{name}".rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value.float().cpu(), requires_grad=False))
            if value.dim() == 2:
                shapes[owner] = tuple(value.shape)
    for name, method in assign_methods(shapes, scheme).items():
        round_inputs(model.get_submodule(name), method.scheme)
    model.build_table(1024)
    return model.to(device)


@pytest.mark.parametrize("scheme", METHODS)
def test_greedy_tokens_are_those_of_the_model_in_memory(few_layers, tmp_path, monkeypatch, scheme, device):
    rounds = find_scheme(METHODS[scheme][0]).activation is not None
    if rounds and device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("schemes that round activations are for Hopper GPUs")
    layers: list = []

    def quantized(*args):
        layers.append(quantize_layer(*args))
        return layers[-1]

    monkeypatch.setattr(run, "quantize_layer", quantized)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return [y * 2 for y in x if y is not None]\n\nclass A:\n    pass\n" * 30)
    run.quantize_checkpoint(
        few_layers,
        tmp_path / "out",
        scheme=scheme,
        text=text,
        samples=2,
        sequence_length=128,
        device=device.type,
    )
    assert len(layers) == NUM_LAYERS
    model = model_in_memory(few_layers, layers, scheme, device)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
    # The likeliest, or so near to it that the rounding of sums decides: in fp32, where it also moves some of
    # the rounded activations by a step, and in bf16.
    near = 0.3 if device.type == "cuda" else 0.1 if rounds else 0.01
    likeliest, total = 0, 0
    with LLM(tmp_path / "out", device=device.type, max_num_seqs=4) as llm:
        for output in llm.generate(PROMPTS, params):
            ids = [*output.prompt_token_ids, *output.token_ids[:-1]]
            with torch.inference_mode():
                logits = model(torch.tensor(ids, device=device), torch.arange(len(ids), device=device))
            logits = logits[-NUM_TOKENS:].cpu()
            taken = logits[torch.arange(NUM_TOKENS), torch.tensor(output.token_ids)]
            assert (logits.amax(1) - taken).max() <= near
            likeliest += int((logits.amax(1) == taken).sum())
            total += NUM_TOKENS
    assert likeliest >= 0.93 * total
