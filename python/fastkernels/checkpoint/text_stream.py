"""Token ids in, text out, one token at a time, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
_MAX_INCOMPLETE_TOKENS = 3  # a character has at most 4 bytes, so an unfinished one at most 3 tokens


class TextStream:
    """Incremental decoding of one text.

    The concatenation of all that ``push`` and ``flush`` return is the decoded text. Each push decodes only
    the tokens
    of the last piece and the new ones: earlier ones matter solely for spaces at the seam, and one piece shows
    those.

    Not ``tokenizers.decoders.DecodeStream``: that raises when a model with byte fallback emits bytes that are
    no UTF-8, and holds back a text of such bytes for ever. Here they come out as replacement characters.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: Collection[int] = ()) -> None:
        """decode: token ids -> text; skipped: ids that give no text (special tokens)"""
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []  # tokens of the last piece, then those not yet returned
        self._num_returned = 0  # how many of them belong to the last piece

    def push(self, token_id: int) -> str:
        """The text that token_id completes; empty while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            return self._take(len(self._window), text)
        num_certain = len(self._window) - _MAX_INCOMPLETE_TOKENS
        if num_certain > self._num_returned:  # older tokens can no longer become a character
            return self._take(num_certain, self._decode(self._window[:num_certain]))
        return ""

    def flush(self) -> str:
        """The rest at the end of the text: replacement characters when it stops within a character."""
        return self._take(len(self._window), self._decode(self._window))

    def _take(self, num_tokens: int, text: str) -> str:
        piece = text[len(self._decode(self._window[: self._num_returned])) :]
        if piece:
            self._window = self._window[self._num_returned :]
            self._num_returned = num_tokens - self._num_returned
        return piece
