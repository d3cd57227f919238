"""Encoding and decoding against transformers, and streams that never split a character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkernels.checkpoint import CheckpointError, TextStream, Tokenizer
from tests.checkpoint.tokenizers_made import SPECIAL, TEXTS, byte_fallback, byte_level

SAMPLES = [
    *TEXTS,
    "",
    " ",
    "  two  spaces ",
    "hello world!",
    "日本語 \N{GRINNING FACE}é",
    "<|im_start|>user<|eos|>",
]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_and_decode_equal_transformers(make: Any, add_special_tokens: bool, tmp_path: Path) -> None:
    folder = make(tmp_path)
    ours, reference = Tokenizer(folder), _reference(folder)
    for text in SAMPLES:
        token_ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert token_ids == reference.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            expected = reference.decode(token_ids, skip_special_tokens=skip)
            assert ours.decode(token_ids, skip_special_tokens=skip) == expected
    assert len(ours) == len(reference)
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)


def test_bos_comes_from_the_post_processor_alone(tmp_path: Path) -> None:
    """As transformers decides where there is a tokenizer.json, whatever add_bos_token says."""
    for bos, flag in [(True, False), (False, True)]:
        folder = byte_level(tmp_path, bos=bos, add_bos_token=flag)
        token_ids = Tokenizer(folder).encode("fox")
        assert token_ids == _reference(folder).encode("fox")
        assert (token_ids[0] == 0) == bos


def test_truncation_and_padding_saved_from_training_are_off(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert len(Tokenizer(folder).encode(TEXTS[0])) > 3


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        byte_level(tmp_path, pad_token={"content": "<|eos|>", "special": True}, cls_token=None)
    )
    assert tokenizer.special_tokens == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|eos|>",
    }
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    assert tokenizer.token_id("<|im_end|>") == 3 and tokenizer.token_id("no such token") is None
    assert tokenizer.decode([2, 10_000]) == "", "ids past the vocabulary give no text"
    (tmp_path / "tokenizer_config.json").unlink()
    bare = Tokenizer(tmp_path)
    assert bare.special_tokens == {} and bare.bos_token_id is None and not bare.has_chat_template


def _stream(tokenizer: Tokenizer, token_ids: list[int], **options: Any) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push(token_id) for token_id in token_ids), stream.flush()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_stream_gives_the_decoded_text_in_whole_characters(
    make: Any, skip_special_tokens: bool, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(make(tmp_path))
    for text in SAMPLES:
        token_ids = tokenizer.encode(text)
        pieces = _stream(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert pieces[-1] == "", "a whole text leaves nothing for the end"
        assert REPLACEMENT not in "".join(pieces)


def test_stream_holds_a_character_until_it_is_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_fallback(tmp_path))
    token_ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "\N{GRINNING FACE}".encode()]
    assert _stream(tokenizer, token_ids) == ["", "", "", "\N{GRINNING FACE}", ""]  # type: ignore[arg-type]
    assert _stream(tokenizer, token_ids[:2])[-1] == REPLACEMENT * 2, "an unfinished one comes at the end"  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_level(tmp_path_factory.mktemp("level")))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_fallback(tmp_path_factory.mktemp("fallback")))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_as_it_decodes(level: Tokenizer, text: str) -> None:
    token_ids = level.encode(text)
    assert "".join(_stream(level, token_ids)) == level.decode(token_ids)


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, 329), max_size=80))
def test_any_tokens_stream_their_characters(level: Tokenizer, token_ids: list[int]) -> None:
    """Most of these are no UTF-8: characters come out as decoded, the rest at most a character late."""
    pieces = _stream(level, token_ids)
    assert "".join(pieces) == level.decode(token_ids)
    assert len(pieces[-1]) <= 9, "three tokens, of three bytes at most here"


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_with_byte_fallback(fallback: Tokenizer, text: str) -> None:
    token_ids = fallback.encode(text)
    assert "".join(_stream(fallback, token_ids)) == fallback.decode(token_ids)


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, 270), max_size=40))
def test_byte_fallback_survives_any_tokens(fallback: Tokenizer, token_ids: list[int]) -> None:
    """This decoder turns a whole run of bytes into replacements for one wrong byte: no text to equal."""
    assert all(isinstance(piece, str) for piece in _stream(fallback, token_ids))


def test_stream_decodes_a_few_tokens_at_a_time() -> None:
    """The cost of a token must not grow with the text."""
    longest = 0

    def decode(token_ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "".join(chr(97 + i % 26) if i >= 0 else REPLACEMENT for i in token_ids)

    stream = TextStream(decode)
    for i in range(200):
        stream.push(i)
    for _ in range(200):
        stream.push(-1)
    assert longest <= 25


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, the only tokenizer file"):
        Tokenizer(tmp_path)
    byte_level(tmp_path)
    with pytest.raises(ValueError, match="lone surrogate at index 2"):
        Tokenizer(tmp_path).encode("ab\ud800")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": ["<s>"]}))
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json has bos_token = \['<s>'\]; it must be a text"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: "):
        Tokenizer(tmp_path)
    assert set(SPECIAL) == {"<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"}
