"""generation_config.json: read, merged with config.json's stop tokens, refused when out of range."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastkernels.checkpoint import CheckpointError, GenerationConfig, read_generation_config
from fastkernels.config import ModelConfig
from tests.checkpoints import SIZES

CONFIG = ModelConfig.from_dict({**SIZES, "architectures": ["LlamaForCausalLM"]})


def _read(folder: Path, **values: Any) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation_config(folder, CONFIG)


def test_without_a_file_config_json_decides(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path, CONFIG) == GenerationConfig(eos_token_ids=(2,))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, (2,)), (7, (7, 2)), (2, (2,)), ([9, 2, 8], (9, 2, 8)), ([9, 9], (9, 2)), ([], (2,))],
)
def test_stop_tokens_are_merged(value: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert _read(tmp_path, eos_token_id=value).eos_token_ids == expected
    several = replace(CONFIG, eos_token_ids=(5, 6))
    assert read_generation_config(tmp_path, several).eos_token_ids[-2:] == (5, 6)


def test_sampling_defaults_are_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import GenerationConfig as Reference

    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": [2, 3],
    }
    ours = _read(tmp_path, **values)
    reference = Reference.from_pretrained(tmp_path)
    for key in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert getattr(ours, key) == getattr(reference, key) == values[key]
    assert list(ours.eos_token_ids) == reference.eos_token_id


def test_silence_means_greedy(tmp_path: Path) -> None:
    assert _read(tmp_path, temperature=0.6) == GenerationConfig(
        eos_token_ids=(2,), do_sample=False, temperature=0.6
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", -0.1, "temperature = -0.1; it must be a number from 0"),
        ("temperature", float("nan"), "temperature = nan"),
        ("temperature", "hot", "temperature = 'hot'"),
        ("top_k", -1, "top_k = -1; it must be an integer from 0"),
        ("top_k", 2.5, "top_k = 2.5"),
        ("top_p", 0, r"top_p = 0; it must be a number in \(0, 1\]"),
        ("top_p", 1.5, "top_p = 1.5"),
        ("min_p", 2, r"min_p = 2; it must be a number in \[0, 1\]"),
        ("repetition_penalty", 0, "repetition_penalty = 0; it must be a positive number"),
        ("repetition_penalty", True, "repetition_penalty = True"),
        ("do_sample", "yes", "do_sample = 'yes'; it must be true or false"),
        ("eos_token_id", "</s>", "eos_token_id = '</s>'; it must be a token id or a list of them"),
        ("eos_token_id", [1, -2], r"eos_token_id = \[1, -2\]"),
    ],
)
def test_values_out_of_range(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json has {message}"):
        _read(tmp_path, **{key: value})


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        read_generation_config(tmp_path, CONFIG)
