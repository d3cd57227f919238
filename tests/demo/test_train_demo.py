"""tools/train_demo.py end to end on a few files: weights, folders and the errors of its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "train_demo.py"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_training_before_preparing_is_refused(tmp_path: Path) -> None:
    result = _run("train", "--work", tmp_path, "--model", "draft")
    assert result.returncode == 2
    assert "the order is prepare, train both models, package" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_small_corpus_goes_all_the_way(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers loads what was packaged")
    stdlib, work, out = tmp_path / "lib", tmp_path / "work", tmp_path / "model"
    # The split is by path: chunk.py is always held out.
    for path in ("chunk.py", "fractions.py", "test/test_re.py", _validation_path()):
        (stdlib / path).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / path).write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    assert _run("prepare", "--stdlib", stdlib, "--work", work).returncode == 0
    for name in ("main", "draft"):
        result = _run(
            *("train", "--work", work, "--model", name, "--steps", 2),
            *("--rows", 2, "--window-tokens", 32, "--eval-every", 2),
        )
        assert result.returncode == 0, result.stderr
        assert "step 2" in result.stdout
    result = _run("package", "--work", work, "--out", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads((out / "heldout.json").read_text(encoding="utf-8"))
    assert figures["files"] == ["chunk.py"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "draft")
    assert sum(p.numel() for p in model.parameters()) == 918144


def _validation_path() -> str:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from demo_corpus import part_of
    finally:
        sys.path.pop(0)
    return next(path for path in (f"module{i}.py" for i in range(10_000)) if part_of(path) == "validation")
