"""Calibration text: a person's own prompts as token ids, windows of one length.

FILE.jsonl: a line a document, {"text": ...}, or a chat, {"messages": [{"role": ..., "content": ...}, ...]},
which goes through the checkpoint's chat template. FILE.txt: one document. Without a file: Python's own
standard library as it is installed here, less the files that the demo model's held-out text is made of, with
a warning.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint import DEMO_FOLDER, ChatTemplateError, Tokenizer
from fastkernels.quantize.scheme import QuantizationError

FAR_APART = 2.0  # perplexities of calibration and evaluation text, one over the other, that are warned about
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "lib-dynload", "__pycache__"}


Chat = list[Any]  # of messages
Document = str | Chat


class CalibrationError(QuantizationError):
    """A text that cannot be used: missing, empty, too short, not UTF-8, or lines that are no documents."""


@dataclass(frozen=True)
class TextWindows:
    """token_ids: int64 [num_windows, num_tokens + 1], the last of each the one that is predicted last
    source:    where they are from, for reports
    warnings:  sentences the person should see
    """

    token_ids: Tensor
    source: str
    warnings: tuple[str, ...] = ()

    @property
    def inputs(self) -> Tensor:
        return self.token_ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        return self.token_ids[:, 1:]


def calibration_windows(
    tokenizer: Tokenizer,
    path: str | Path | None = None,
    *,
    samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
) -> TextWindows:
    """``samples`` windows of ``sequence_length`` tokens, or as many as there are, drawn over the whole text.

    Raises CalibrationError, in one sentence, for a file that cannot be used.
    """
    if samples < 1 or sequence_length < 2:
        raise CalibrationError(
            f"calibration takes at least 1 sample of 2 tokens; it was given {samples} of {sequence_length}"
        )
    warnings = []
    if path is None:
        source = "Python's standard library"
        warnings.append(
            "calibrating on Python's standard library, which is what the demo model writes and hardly what "
            "yours is asked; give prompts of your own with --calibration FILE.jsonl"
        )
        documents: Iterable[Document] = _library_files(seed)
    else:
        source = str(path)
        documents = read_documents(path)
    stream: list[int] = []
    wanted = samples * sequence_length + 1
    for document in documents:
        stream += _encode(tokenizer, document, source)
        if path is None and len(stream) >= wanted:
            break
    found = (len(stream) - 1) // sequence_length
    if found < 1:
        raise CalibrationError(
            f"{source} holds {len(stream)} tokens, too few for one sample of {sequence_length}; give more "
            "text or a smaller --sequence-length"
        )
    if found < samples:
        warnings.append(
            f"{source} holds {found} samples of {sequence_length} tokens where {samples} were asked for"
        )
    chosen = sorted(random.Random(seed).sample(range(found), min(samples, found)))
    return TextWindows(_windows(stream, chosen, sequence_length), source, tuple(warnings))


def evaluation_windows(
    tokenizer: Tokenizer,
    path: str | Path | None = None,
    *,
    sequence_length: int = 1024,
    most: int | None = None,
) -> TextWindows:
    """A text from its beginning, in windows one after the other; the demo model's held-out text without a
    file.

    A text shorter than a window becomes one window; most: windows at most. Raises CalibrationError.
    """
    source = "the demo model's held-out text" if path is None else str(path)
    if path is None:
        text = gzip.decompress((DEMO_FOLDER / "heldout.txt.gz").read_bytes()).decode("utf-8")
        stream = tokenizer.encode(text, add_special_tokens=False)
    else:
        stream = [
            token for document in read_documents(path) for token in _encode(tokenizer, document, source)
        ]
    if len(stream) < 2:
        raise CalibrationError(f"{source} holds {len(stream)} tokens; a perplexity takes at least 2")
    sequence_length = min(sequence_length, len(stream) - 1)
    count = min((len(stream) - 1) // sequence_length, most or len(stream))
    return TextWindows(_windows(stream, range(count), sequence_length), source)


def perplexity_warning(calibration: float, evaluation: float) -> str | None:
    """A sentence where the two texts' perplexities are far apart; None where they are not."""
    ratio = max(calibration, evaluation) / min(calibration, evaluation)
    if ratio <= FAR_APART:
        return None
    return (
        f"the calibration text's perplexity is {calibration:.4g} and the evaluation text's {evaluation:.4g}: "
        "they are unlike each other, and a model quantised on the one may do worse on the other"
    )


def read_documents(path: str | Path) -> list[Document]:
    """Texts, and chats as lists of messages. Raises CalibrationError."""
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CalibrationError(f"the text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"the text {path} is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    if not content.strip():
        raise CalibrationError(f"the text {path} is empty")
    if path.suffix != ".jsonl":
        return [content]
    return [
        _document(f"{path}, line {number}", line)
        for number, line in enumerate(content.split("\n"), start=1)
        if line.strip()
    ]


def _document(where: str, line: str) -> Document:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"{where} is not valid JSON: {error}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return str(value["text"])
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return messages
    raise CalibrationError(
        f'{where} is no document; it must be {{"text": ...}} or {{"messages": [...]}}, each message with '
        '"role" and "content"'
    )


def _is_message(value: object) -> bool:
    """Templates print nothing for what is not there, so that a misspelt key would go unseen."""
    return isinstance(value, dict) and "role" in value and ("content" in value or "tool_calls" in value)


def _encode(tokenizer: Tokenizer, document: Document, source: str) -> list[int]:
    try:
        if isinstance(document, str):
            return tokenizer.encode(document)
        return tokenizer.encode_chat(document, add_generation_prompt=False)
    except (ChatTemplateError, ValueError) as error:
        raise CalibrationError(f"{source} holds a document that cannot be encoded: {error}") from None


def _library_files(seed: int) -> Iterator[str]:
    """The files in an order of their own, so that any number of them is a mixture."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    held_out = set(json.loads((DEMO_FOLDER / "heldout.json").read_text(encoding="utf-8"))["files"])
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    paths = [p for p in paths if p.as_posix() not in held_out and not _NOT_LIBRARY & set(p.parts)]
    random.Random(seed).shuffle(paths)
    paths.sort(key=lambda path: not _unseen(path))
    if not paths:
        raise CalibrationError(
            f"{folder} holds no Python files to calibrate on; give a text with --calibration"
        )
    for path in paths:
        yield (folder / path).read_bytes().decode("utf-8", errors="replace")


def _unseen(path: Path) -> bool:
    """Whether the demo model was validated on the file instead of trained on it, by the rule of
    tools/demo_corpus.py: to a text that it knows by heart its layers answer otherwise than to a new one."""
    return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % 64 == 1


def _windows(stream: list[int], chosen: Iterable[int], num_tokens: int) -> Tensor:
    ids = torch.tensor(stream, dtype=torch.int64)
    return torch.stack([ids[i * num_tokens : (i + 1) * num_tokens + 1] for i in chosen])
