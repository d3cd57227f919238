"""The shipped demo models, judged by transformers alone: files, held-out perplexity, Python written."""

import ast
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the judge of the demo model")

DEMO = Path(__file__).parents[2] / "python" / "fastkernels" / "demo"
FOLDERS = {"main": DEMO, "draft": DEMO / "draft"}
FIGURES = json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in FOLDERS.items()
    }


@pytest.fixture(scope="module")
def heldout() -> str:
    return gzip.decompress((DEMO / "heldout.txt.gz").read_bytes()).decode("utf-8")


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_bf16_of_the_configured_shapes(name: str) -> None:
    config = json.loads((FOLDERS[name] / "config.json").read_text(encoding="utf-8"))
    with safe_open(FOLDERS[name] / "model.safetensors", "pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in tensors.values())
    assert "lm_head.weight" not in tensors and config["tie_word_embeddings"]
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], hidden)
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    assert tensors[last + "self_attn.q_proj.weight"].shape == (q_size, hidden)
    assert tensors[last + "self_attn.k_proj.weight"].shape == (kv_size, hidden)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 1024


def test_folder_stays_small() -> None:
    sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in FOLDERS.items()}
    assert 10e6 < sizes["main"] < 20e6
    assert 1e6 < sizes["draft"] < 2e6
    assert (DEMO / "heldout.txt.gz").stat().st_size < 200_000
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 20e6


def test_both_models_have_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (FOLDERS["main"] / file).read_bytes() == (FOLDERS["draft"] / file).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x + 1\n",
        "\t# caf\u00e9 \U0001f40d \u4e2d\n",
        "a\r\n\x00b",
        "  leading and trailing  ",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == 0 and 0 not in encoding.ids[1:]
    assert tokenizer.decode(encoding.ids) == text
    assert max(encoding.ids) < tokenizer.get_vocab_size() == 4096
    loaded = transformers.AutoTokenizer.from_pretrained(DEMO)
    assert loaded(text)["input_ids"] == encoding.ids


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_heldout_perplexity_is_the_recorded_one(
    name: str, tokenizer: Tokenizer, models: dict[str, Any], heldout: str
) -> None:
    ids = torch.tensor(tokenizer.encode(heldout, add_special_tokens=False).ids)
    assert len(ids) == FIGURES["num_tokens"]
    assert int((ids == 0).sum()) == len(FIGURES["files"])
    nats, window_tokens = 0.0, FIGURES["window_tokens"]
    for start in range(0, len(ids) - 1, window_tokens):
        window = ids[start : start + window_tokens + 1]
        logits = models[name](window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert math.exp(nats / (len(ids) - 1)) == pytest.approx(FIGURES[name]["perplexity"], rel=1e-4)
    bits_per_byte = nats / math.log(2) / FIGURES["num_bytes"]
    assert bits_per_byte == pytest.approx(FIGURES[name]["bits_per_byte"], rel=1e-4)


def test_model_card_states_the_recorded_figures() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for name in FOLDERS:
        assert f"**{FIGURES[name]['perplexity']}**" in card
        assert str(FIGURES[name]["bits_per_byte"]) in card


def _is_python(text: str) -> bool:
    """Whether the text parses once a last, unfinished statement is cut off."""
    lines = text.split("\n")
    for end in range(len(lines), 1, -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        return end >= 0.5 * len(lines) and isinstance(tree.body[0], ast.FunctionDef)
    return False


def test_greedy_continuation_is_python(tokenizer: Tokenizer, models: dict[str, Any]) -> None:
    prompt = torch.tensor([tokenizer.encode("def fibonacci(n):").ids])
    out = models["main"].generate(prompt, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(out[0].tolist())
    assert text.startswith("def fibonacci(n):\n")
    assert "return" in text
    assert _is_python(text), text


def test_sampled_continuations_are_mostly_python(tokenizer: Tokenizer, models: dict[str, Any]) -> None:
    prompt = torch.tensor([tokenizer.encode("def fibonacci(n):").ids])
    out = models["main"].generate(
        prompt,
        max_new_tokens=64,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        top_k=0,
        num_return_sequences=16,
    )
    texts = [tokenizer.decode(row.tolist()) for row in out]
    assert len(set(texts)) > 8
    parsed = sum(_is_python(text) for text in texts)
    print(f"{parsed} of {len(texts)} sampled continuations parse")
    assert parsed >= 8
