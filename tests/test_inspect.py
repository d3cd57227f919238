"""`python -m fastkernels.inspect`: what it prints, and that it reads config.json only."""

import json

import pytest
from typer.testing import CliRunner

from fastkernels.checkpoint import CheckpointError
from fastkernels.config import UnsupportedModelError
from fastkernels.errors import ModelNotFoundError
from fastkernels.inspect import app, find_config
from tests.checkpoint.quantized_made import gptq, make

WIDE = {"COLUMNS": "200"}


def _inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env=WIDE)
    assert result.exit_code == 0, result.output
    return result.output


def test_demo():
    text = _inspect("demo")
    assert text.startswith("demo: LlamaForCausalLM, 10 layers")
    for words in ("qkv_proj[0:256]", "layers 1 to 8", "8 steps each", "rope_append_kv", "paged_attention"):
        assert words in text
    assert "trace (before fusion)      166" in text
    assert "plan (after fusion)         86" in text
    assert "weights 15.14 MiB + arena" in text


def test_full_shows_every_step():
    text = _inspect("demo", "--full")
    assert "layers 1 to 8" not in text
    assert text.count("paged_attention") == 10


def test_a_preset_with_memory_says_how_many_pages_fit():
    text = _inspect("llama-3.1-8b", "--memory", "80", "--max-seq-len", "4096")
    assert "weights 14.96 GiB" in text
    assert " pages, " in text and "KV cache" in text


def test_a_pass_left_out():
    text = _inspect("demo", "--disable-pass", "act_mul", "--disable-pass", "add_norm")
    assert "act_mul (disabled)" in text and "silu_mul" not in text


def test_quantised_weights():
    text = _inspect("demo", "--quantization", "int4", "--head-quantization", "int8")
    for words in ("scheme=int4", "scheme=int8", "gate_up_proj.weight.packed", "weights 6.41 MiB + arena"):
        assert words in text


def test_a_quantised_checkpoint(tmp_path):
    folder, _, _ = make(
        tmp_path,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        gptq(32, order="act"),
    )
    text = _inspect(str(folder))
    for words in ("scheme=int4-g32-fp16", "gather_columns", "qkv_proj.weight.permutation"):
        assert words in text


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["MistralForCausalLM"],
                "vocab_size": 50,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
                "sliding_window": 12,
            }
        )
    )
    assert "window=12" in _inspect(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere"],
            "there is no model 'nowhere': give a checkpoint folder, 'demo', or one of llama-3.1-8b",
        ),
        (["demo", "--disable-pass", "fuse"], "no pass is called 'fuse'"),
        (["demo", "--dtype", "int8"], "dtype is 'int8'; it must be auto, bf16, fp16, fp32"),
        (["llama-3.1-8b", "--memory", "10"], "no memory for the KV cache: weights 14.96 GiB"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message):
    result = CliRunner().invoke(app, arguments, env=WIDE)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_errors_of_a_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no model"):
        find_config(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        find_config(str(tmp_path))
