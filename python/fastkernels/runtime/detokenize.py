"""The text of one output as its tokens come, cut before a stop string."""

from __future__ import annotations

from typing import Protocol


class TokenDecoder(Protocol):
    """``checkpoint.TextStream``: returns a token's text once its characters are whole."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class OutputText:
    """Joins the pieces of a decoder and watches for stop strings, also across the borders of tokens.

    text:    what may be shown so far; text that could be the beginning of a stop string is held back
    stopped: a stop string came; text ends before it
    """

    def __init__(self, decoder: TokenDecoder, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._held = ""

    def push(self, token_id: int) -> str:
        """Adds a token; returns what it lets be shown."""
        return "" if self.stopped else self._take(self._decoder.push(token_id))

    def flush(self) -> str:
        """Ends the text; returns what was held back."""
        if self.stopped:
            return ""
        piece = self._take(self._decoder.flush())
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _take(self, piece: str) -> str:
        if self._stop:
            piece = self._held + piece
            found = [index for index in map(piece.find, self._stop) if index >= 0]
            if found:
                self.stopped = True
                piece, self._held = piece[: min(found)], ""
            else:
                shown = len(piece) - self._num_held(piece)
                piece, self._held = piece[:shown], piece[shown:]
        self.text += piece
        return piece

    def _num_held(self, piece: str) -> int:
        """Length of the longest end of piece that begins a stop string."""
        longest = min(len(piece), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = piece[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
