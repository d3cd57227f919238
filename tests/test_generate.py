"""The commands, each in a process of its own, as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastkernels
from fastkernels import LLM, SamplingParams, cli
from fastkernels.generate import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
GENERATE = ("-m", "fastkernels.generate")
CLI = ("-m", "fastkernels.cli")


def run(
    *arguments: str, stdin: str = "", command: tuple[str, ...] = GENERATE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )


def run_here(*arguments: str, stdin: str = "") -> Any:
    """The same within this process, which has torch imported already."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


@pytest.fixture(scope="module")
def expected() -> str:
    with LLM("demo", device="cpu", max_num_seqs=1) as llm:
        return llm.generate("def fibonacci(n):", SamplingParams(max_tokens=24))[0].text


def test_without_arguments_the_demo_continues_its_prompt(expected: str) -> None:
    result = run("--max-tokens", "24", "--device", "cpu")
    assert result.returncode == 0
    assert result.stdout == f"def fibonacci(n):{expected}\n"
    for word in ("ms to the first token", "tokens/s", "24 output tokens", "KV pages", "cpu float32"):
        assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1, "nothing but the figures without a terminal"


@pytest.mark.parametrize("way", ["--prompt", "--prompt-file", "stdin"])
def test_json_is_one_object_and_nothing_else(way: str, tmp_path: Path, expected: str) -> None:
    (tmp_path / "prompt.txt").write_text("def fibonacci(n):")
    given = {
        "--prompt": ["--prompt", "def fibonacci(n):"],
        "--prompt-file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "stdin": [],
    }[way]
    stdin = "def fibonacci(n):" if way == "stdin" else ""
    result = run_here("--json", "--max-tokens", "24", "--device", "cpu", *given, stdin=stdin)
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert sorted(report) == sorted(
        ["text", "token_ids", "finish_reason", "ttft_ms", "tokens_per_s", "device", "dtype", "model"]
    )
    assert report["text"] == expected and len(report["token_ids"]) == 24
    assert report["finish_reason"] == "length"
    assert (report["device"], report["dtype"], report["model"]) == ("cpu", "float32", "demo")
    assert report["ttft_ms"] > 0 and report["tokens_per_s"] > 0


def test_quantization_reaches_the_model() -> None:
    common = ("--prompt", "import os", "--max-tokens", "8", "--json", "--device", "cpu")
    result = run_here(*common, "--quantization", "mxfp4", "--head-quantization", "int4-g32")
    with fastkernels.LLM(
        "demo", device="cpu", max_num_seqs=1, quantization="mxfp4", head_quantization="int4-g32"
    ) as llm:
        expected = llm.generate("import os", fastkernels.SamplingParams(max_tokens=8))[0]
    assert json.loads(result.stdout)["text"] == expected.text


def test_sampling_options_reach_the_model() -> None:
    common = ("--prompt", "import os", "--max-tokens", "16", "--json", "--device", "cpu")
    sampled = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed")
    texts = [json.loads(run_here(*common, *sampled, seed).stdout)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_stop_can_be_given_twice_and_the_text_shown_at_the_end(expected: str) -> None:
    stop = expected[8:12]
    stops = ("--stop", "nowhere", "--stop", stop)
    result = run_here("--prompt", "def fibonacci(n):", *stops, "--no-stream", "--device", "cpu")
    assert result.stdout == expected[: expected.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0; it must be an integer from 1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan; it must be a finite number from 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0; it must be a finite number from 0"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0; it must be a finite number above 0 to 1"),
        (["--prompt", "x " * 3000, "--device", "cpu"], "tokens; the context takes 2048"),
        (["--prompt", "x", "--model", "/nowhere/at/all"], "there is no model '/nowhere/at/all'"),
        (["--prompt", "x", "--prompt-file", "y"], "--prompt and --prompt-file were both given"),
        (["--prompt-file", "/nowhere/prompt.txt"], "the prompt file /nowhere/prompt.txt cannot be read"),
        (["--prompt", "x", "--chat", "--device", "cpu"], "has no chat template"),
        (
            ["--prompt", "x", "--device", "cpu", "--quantization", "int5"],
            "no quantization scheme is called 'int5'; there are fp8, fp8-block, int8, int8-zeros,",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    result = run_here(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    demo = Path(fastkernels.__file__).parent / "demo"
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((demo / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((demo / "model.safetensors").read_bytes()[:100_000])
    result = run("--prompt", "x", "--model", str(tmp_path))  # a whole process: no traceback comes out
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "model.safetensors" in result.stderr


def test_a_wrong_option_is_refused_with_exit_code_2() -> None:
    result = run_here("--dtype", "int8")
    assert result.exit_code == 2 and "int8" in result.stderr and "bf16" in result.stderr


def test_help_teaches() -> None:
    result = run_here("--help")
    assert result.exit_code == 0
    for word in ("Examples", "--temperature", "--prompt-file", "--json", "--chat", "--seed 1"):
        assert word in result.stdout


def test_the_console_script_has_the_same_as_a_subcommand(expected: str) -> None:
    options = ("--json", "--max-tokens", "24", "--device", "cpu", "--prompt", "def fibonacci(n):")
    assert json.loads(run("generate", *options, command=CLI).stdout)["text"] == expected
    listing = CliRunner().invoke(cli.app, ["--help"]).stdout
    assert "generate" in listing and "inspect" in listing and "--install-completion" in listing
    assert "Examples" in CliRunner().invoke(cli.app, ["generate", "--help"]).stdout
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == fastkernels.__version__


def test_a_warning_is_one_line_on_stderr() -> None:
    result = run("--prompt", "x", "--max-tokens", "1", "--device", "cpu", "--kv-cache-dtype", "fp8")
    assert result.returncode == 0
    assert "warning: the checkpoint has no scales for an FP8 KV cache" in result.stderr
    assert "UserWarning" not in result.stderr and "build.py" not in result.stderr
