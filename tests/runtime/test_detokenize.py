import pytest

from fastkernels.runtime.detokenize import OutputText


class Pieces:
    """A decoder whose tokens are indices of given texts; `rest` comes at the end."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


def collect(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], OutputText]:
    output = OutputText(Pieces(pieces, rest), stop)
    shown = [output.push(index) for index in range(len(pieces))]
    shown.append(output.flush())
    assert "".join(shown) == output.text
    return shown, output


def test_without_stop_texts_pieces_pass_through():
    shown, output = collect(["a", "", "bc"], (), rest="d")
    assert shown == ["a", "", "bc", "d"] and not output.stopped


def test_the_text_is_cut_before_a_stop_text_across_tokens():
    shown, output = collect(["one ", "E", "N", "D two"], ("END",))
    assert shown == ["one ", "", "", "", ""]
    assert output.text == "one " and output.stopped


def test_what_only_began_like_a_stop_text_is_shown_later():
    shown, output = collect(["a", "E", "N", "x"], ("END",))
    assert shown == ["a", "", "", "ENx", ""] and not output.stopped


def test_what_is_held_at_the_end_is_shown():
    shown, output = collect(["a", "EN"], ("END",))
    assert shown == ["a", "", "EN"] and not output.stopped


def test_the_earliest_stop_text_wins():
    _, output = collect(["abcdef"], ("ef", "bcd", "cde"))
    assert output.text == "a"


def test_a_stop_text_can_end_in_the_rest():
    _, output = collect(["aE"], ("END",), rest="ND")
    assert output.text == "a" and output.stopped


def test_overlapping_beginnings_are_held_as_far_as_needed():
    shown, output = collect(["aab", "aab", "c"], ("aabaac", "aabc"))
    assert shown == ["", "aab", "", ""]
    assert output.text == "aab" and output.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_cutting_into_tokens_gives_the_same_text(size):
    text = "the quick brown fox\n\nUser: jumps over\n\nUs"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    _, output = collect(pieces, ("\n\nUser:", "lazy"))
    assert output.text == "the quick brown fox" and output.stopped
