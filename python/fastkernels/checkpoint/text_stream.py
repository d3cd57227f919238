"""Token ids in, text out, one token at a time, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
_MAX_UNFINISHED = 3  # bytes, so tokens at most, of a character that lacks its last
_MAX_WINDOW_TOKENS = 24
_KEPT_WINDOW_TOKENS = 12  # enough for _MAX_UNFINISHED replacement characters of three one-byte tokens each


class TextStream:
    """Incremental decoding of one text.

    The concatenation of all that ``push`` and ``flush`` return is the decoded text. Each push decodes only
    the last piece and what follows it: earlier tokens matter solely for spaces at the seam, and one piece
    shows those.

    Not ``tokenizers.decoders.DecodeStream``: that raises when a model with byte fallback emits bytes that are
    no UTF-8, and holds back a text of such bytes for ever. Here they come out as replacement characters.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: Collection[int] = ()) -> None:
        """decode: token ids -> text; skipped: ids that give no text (special tokens)"""
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []  # the tokens that are still decoded
        self._boundary = 0  # tokens of the window before the last boundary between characters
        self._num_returned = 0  # characters of the decoded window that were returned

    def push(self, token_id: int) -> str:
        """The text that token_id completes; empty while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._window) - self._boundary > _MAX_UNFINISHED:  # most of these will never be a character
            num_held = min(num_held, _MAX_UNFINISHED)
        piece = self._take(text, len(text) - num_held)
        if num_held == 0 and piece:
            self._restart(self._boundary, num_held)
            self._boundary = len(self._window)
        elif len(self._window) > _MAX_WINDOW_TOKENS:  # bytes that never become a character
            self._restart(len(self._window) - _KEPT_WINDOW_TOKENS, num_held)
            self._boundary = 0
        return piece

    def flush(self) -> str:
        """The rest at the end of the text: replacement characters when it stops within a character."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        piece = text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return piece

    def _restart(self, num_dropped: int, num_held: int) -> None:
        if num_dropped:
            self._window = self._window[num_dropped:]
            self._num_returned = max(len(self._decode(self._window)) - num_held, 0)
