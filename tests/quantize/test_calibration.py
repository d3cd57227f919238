"""Texts for calibration and evaluation: what becomes of files, and what is said of broken ones."""

import json
from pathlib import Path

import pytest
import torch

from fastkernels.checkpoint import Tokenizer
from fastkernels.quantize.calibration import (
    DEMO_FOLDER,
    CalibrationError,
    calibration_windows,
    evaluation_windows,
    perplexity_warning,
    read_documents,
)

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_FOLDER)


def test_without_a_file_it_is_the_standard_library_and_says_so(tokenizer):
    windows = calibration_windows(tokenizer, samples=4, sequence_length=64)
    assert windows.token_ids.shape == (4, 65) and windows.token_ids.dtype == torch.int64
    assert torch.equal(windows.inputs[:, 1:], windows.targets[:, :-1])
    assert "give prompts of your own with --calibration" in windows.warnings[0]
    again = calibration_windows(tokenizer, samples=4, sequence_length=64)
    assert torch.equal(windows.token_ids, again.token_ids)
    held_out = set(map(tuple, evaluation_windows(tokenizer, sequence_length=64).inputs.tolist()))
    assert not held_out & set(map(tuple, windows.inputs.tolist()))


def test_the_held_out_text_is_the_recorded_one(tokenizer):
    windows = evaluation_windows(tokenizer)
    figures = json.loads((DEMO_FOLDER / "heldout.json").read_text())
    assert windows.token_ids.shape == ((figures["num_tokens"] - 1) // 1024, 1025)
    assert windows.token_ids[0, 0] == 0 and not windows.warnings


def test_text_and_lines(tokenizer, tmp_path):
    words = "def f(x):\n    return x + 1\n" * 40
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "a.jsonl").write_text(
        "\n".join([json.dumps({"text": words}), "", json.dumps(words), json.dumps({"text": words, "id": 1})])
    )
    one = calibration_windows(tokenizer, tmp_path / "a.txt", samples=2, sequence_length=32)
    assert one.inputs.shape == (2, 32) and not one.warnings
    assert read_documents(tmp_path / "a.jsonl") == [words] * 3
    many = calibration_windows(tokenizer, tmp_path / "a.jsonl", samples=1000, sequence_length=32)
    assert many.token_ids[0, :33].tolist() == tokenizer.encode(words)[:33]
    assert f"holds {len(many.token_ids)} samples of 32 tokens where 1000 were asked for" in many.warnings[0]
    short = evaluation_windows(tokenizer, tmp_path / "a.txt", sequence_length=100_000)
    assert short.token_ids.shape == (1, len(tokenizer.encode(words)))


def test_chats_go_through_the_template(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_FOLDER / name).read_bytes())
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps({"messages": chat})] * 20))
    with pytest.raises(CalibrationError, match=r"cannot be encoded: .* has no chat template"):
        calibration_windows(Tokenizer(tmp_path), path, samples=1, sequence_length=8)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    windows = calibration_windows(tokenizer, path, samples=1, sequence_length=100)
    assert "<user>why?\n<assistant>because\n<user>" in tokenizer.decode(windows.token_ids[0].tolist())


def broken(folder: Path) -> dict[str, Path]:
    files = {
        "empty": (b"  \n", "txt"),
        "short": (b"x = 1", "txt"),
        "latin": (b"caf\xe9 " * 100, "txt"),
        "lines": (b'{"text": "a"}\n{"txt": "b"}\n', "jsonl"),
        "json": (b'{"text": "a"}\n{"text": \n', "jsonl"),
        "number": (b"3\n", "jsonl"),
        "misspelt": (b'{"messages": [{"role": "user", "text": "why?"}]}\n', "jsonl"),
    }
    for name, (content, suffix) in files.items():
        (folder / f"{name}.{suffix}").write_bytes(content)
    return {name: folder / f"{name}.{suffix}" for name, (_, suffix) in files.items()} | {
        "missing": folder / "missing.txt",
        "folder": folder,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"empty.txt is empty$"),
        ("short", r"short.txt holds \d+ tokens, too few for one sample of 64; give more text or a smaller"),
        ("latin", r"latin.txt is not UTF-8: .* at byte 3$"),
        ("lines", r'lines.jsonl, line 2 is no document; it must be {"text": ...} or {"messages": \[...\]}'),
        ("json", r"json.jsonl, line 2 is not valid JSON"),
        ("number", r"number.jsonl, line 1 is no document"),
        ("misspelt", r'misspelt.jsonl, line 1 is no document; .*, each message with "role" and "content"$'),
        ("missing", r"missing.txt cannot be read: No such file"),
        ("folder", r"cannot be read: Is a directory"),
    ],
)
def test_broken_files_are_said_in_a_sentence(tokenizer, tmp_path, name, message):
    with pytest.raises(CalibrationError, match=message) as error:
        calibration_windows(tokenizer, broken(tmp_path)[name], samples=1, sequence_length=64)
    assert "\n" not in str(error.value)


def test_sizes_that_are_refused(tokenizer):
    with pytest.raises(CalibrationError, match="at least 1 sample of 2 tokens; it was given 0 of 5"):
        calibration_windows(tokenizer, samples=0, sequence_length=5)


def test_texts_that_are_far_apart_are_warned_about():
    assert perplexity_warning(8.0, 12.0) is None and perplexity_warning(12.0, 8.0) is None
    assert "perplexity is 20 and the evaluation text's 8" in (perplexity_warning(20.0, 8.0) or "")
    assert perplexity_warning(3.0, 8.0) is not None
