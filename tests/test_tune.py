"""`fastkernels tune`: what it prints, with a GPU that is made up, and what it says without one."""

import pytest
import torch
from typer.testing import CliRunner

from fastkernels import tune
from fastkernels.cli import app
from fastkernels.compiler.tune import HOPPER
from fastkernels.runtime import build
from tests.checkpoint.quantized_made import fp8, make
from tests.conftest import CUDA_REASON


@pytest.fixture
def made_up_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "choose_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(
        build, "CudaTimer", lambda device: lambda product, num_tokens, tactic: len(str(tactic)) + 0.25
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _tune(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_what_it_prints(made_up_gpu, tmp_path):
    options = ("llama-3.1-8b", "--max-num-tokens", "24", "--max-num-seqs", "2")
    lines = _tune(*options).splitlines()
    rows = [line.split()[3:] for line in lines if line.startswith("linear bf16 6144x4096")]
    assert rows == [
        *([tokens, "torch", "5.2", "linear", "6.2"] for tokens in ("1", "2", "4", "8")),
        *([tokens, "torch", "5.2", "matmul", "-1", "9.2"] for tokens in ("16", "24")),
    ]
    assert lines[-1].startswith("26 choices, ") and lines[-1].endswith(
        str(tmp_path / "fastkernels/tactics.json")
    )
    assert "26 choices, 0 times taken" in _tune(*options)
    assert "26 choices, 0 times taken" not in _tune(*options, "--again")
    assert "matmul e4m3-block bf16 6144x4096" in _tune(*options, "--quantization", "fp8-block")


def test_a_bar_on_a_terminal_shows_how_far_it_is(made_up_gpu):
    arguments = ["tune", "llama-3.1-8b", "--max-num-tokens", "2", "--max-num-seqs", "2"]
    for terminal in (True, False):
        env = {"COLUMNS": "160", "FORCE_COLOR": "1" if terminal else None}
        result = CliRunner().invoke(app, [*arguments, "--again"], env=env)
        assert result.exit_code == 0, result.output
        assert ("timing matrix products" in result.stderr and "100%" in result.stderr) == terminal


def test_a_quantised_checkpoint(made_up_gpu, tmp_path):
    """Its products are those of its weights."""
    folder, _, _ = make(tmp_path, {"quant_method": "fp8", "activation_scheme": "static"}, fp8("tensor"))
    text = _tune(str(folder), "--max-num-tokens", "2", "--dtype", "bf16")
    for words in ("matmul e4m3 bf16 256x128", "matmul e4m3 bf16 128x256", "linear bf16 301x128"):
        assert words in text
    result = CliRunner().invoke(app, ["tune", str(folder), "--dtype", "bf16", "--quantization", "int8"])
    assert result.exit_code == 2
    assert "the checkpoint is quantised already (FP8); leave out quantization='int8'" in result.stderr


@pytest.mark.skipif(CUDA_REASON is None, reason="there is a GPU")
def test_without_a_gpu():
    result = CliRunner().invoke(app, ["tune", "demo"])
    assert result.exit_code == 2
    assert result.stderr == "error: nothing to tune: there is no GPU here that this build has kernels for\n"
