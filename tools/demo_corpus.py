"""The corpus of the demo model: a standard library's source, split by file, and a byte-level BPE tokenizer.

A file belongs to one part, chosen by the hash of its path, so that the split does not change when files are
added. Only library files are held out; test files only train:

library    the modules themselves
tests      the test suite (more text, more monotonous: drawn less often in training)
validation chooses the checkpoint and the dropout
heldout    is touched once, for the perplexity the model card states
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"  # id 0: ends a file, so it is both the stop token and what stands before a file
VOCAB_SIZE = 4096
HELDOUT_BUCKETS = 64  # one bucket of library files is held out, one validates

# Machine-written tables and lists of words rather than Python as people write it.
_SKIPPED = re.compile(
    r"^(site-packages|lib-dynload|config-|dist-packages)"
    r"|^encodings/(cp|iso|mac|koi|kz|ptcp|tis|hp|palmos)"
    r"|^pydoc_data/|^_sysconfigdata|^lib2to3/tests/data|^test/(bad|encoded_modules|cjkencodings)"
)
_TEST_FOLDERS = {"test", "tests", "idle_test"}


def part_of(path: str) -> str:
    """The part a file belongs to, from its path relative to the library folder, with forward slashes."""
    if _TEST_FOLDERS & set(path.split("/")[:-1]):
        return "tests"
    bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % HELDOUT_BUCKETS
    return {0: "heldout", 1: "validation"}.get(bucket, "library")


def read_corpus(stdlib: Path) -> dict[str, dict[str, str]]:
    """part -> {path: text} of every .py file under `stdlib`, in sorted order.

    Raises ValueError when the folder holds no Python files.
    """
    corpus: dict[str, dict[str, str]] = {part: {} for part in ("library", "tests", "validation", "heldout")}
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib).as_posix()
        if _SKIPPED.search(path):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few tests are written in other encodings on purpose
        if text.strip():
            corpus[part_of(path)][path] = text
    if not corpus["library"]:
        raise ValueError(f"{stdlib} holds no Python files; give the Lib folder of a CPython")
    return corpus


def train_tokenizer(corpus: dict[str, dict[str, str]]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, trained on the library part and a quarter of the tests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(corpus["library"].values()) + list(corpus["tests"].values())[::4]
    tokenizer.train_from_iterator(texts, trainer)
    # As with other Llama tokenizers, encoding adds the start token, here the one that stands before a file:
    # without it a prompt reads as the middle of something the model has not seen.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def encode_part(tokenizer: Tokenizer, texts: dict[str, str]) -> np.ndarray:
    """Token ids [num_tokens] uint16 of the files one after the other, END_OF_TEXT before each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts.values())):
        ids.extend(encoding.ids)
    return np.asarray(ids, dtype=np.uint16)


def prepare(stdlib: Path, work: Path) -> None:
    """Writes tokenizer.json, <part>.npy for each part, and heldout.txt into `work`."""
    corpus = read_corpus(stdlib)
    tokenizer = train_tokenizer(corpus)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))
    for part, texts in corpus.items():
        ids = encode_part(tokenizer, texts)
        np.save(work / f"{part}.npy", ids)
        num_bytes = sum(len(text.encode()) for text in texts.values())
        print(f"{part}: {len(texts)} files, {num_bytes} bytes, {len(ids)} tokens")
    # Special tokens are recognised in text, so the file boundaries survive encoding the whole as one string.
    (work / "heldout.txt").write_text(
        "".join(END_OF_TEXT + text for text in corpus["heldout"].values()), encoding="utf-8", newline=""
    )
    (work / "heldout_files.txt").write_text("\n".join(corpus["heldout"]) + "\n", encoding="utf-8")
