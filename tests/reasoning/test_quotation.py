"""Where a quotation or a formula is open: written out by hand, one mark under each character that stands inside."""

from __future__ import annotations

import pytest

from qwq_mlx.reasoning.quotation import Quoting, followed


def inside(text: str, *, brackets: bool = False) -> str:
    """ "^" under each character that is quoted or ends a quotation, "." under the others."""
    state, found = Quoting(), ""
    for char in text:
        found += "^" if state.is_open else "."
        state = followed(state, char, brackets=brackets)
    return found


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('a "b" c', "...^^.."),
        ("a 'b' c", "...^^.."),
        ("a “b” c", "...^^.."),
        ("a ‘b’ c", "...^^.."),
        ("„b“ „b” c", ".^^..^^.."),
        ("「b」『b』", ".^^.^^"),
        ("«b» ‹b›《b》", ".^^..^^.^^"),
        ("a `b` c", "...^^.."),
        ("$b$ c", ".^^.."),
        (r"\(b\) c", "..^^^.."),
        (r"\[b)\] c", "..^^^^.."),
        ("5\" b, don't, f(x), a$b$", "........................"),  # straight marks behind a letter or a digit
        (r"\$5 b \"c", ".........."),
        ('"b\nc"', ".^^.."),  # the line ends it; the mark behind c opens nothing
        ('"b\n "c', ".^^..^"),
        ("“b\"'c” d", ".^^^^^.."),  # no other mark ends it
        ("$b\\", ".^^"),
        ("(b) （c） d", "..........."),
    ],
)
def test_what_is_quoted(text: str, quoted: str) -> None:
    assert inside(text) == quoted[: len(text)]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("Li (b) c", "....^^.."),
        ("Li （b） c", "....^^.."),
        ("Li（b）c", "...^^."),
        ("f(b) (c", "......^"),
        ("(b\nc", ".^^."),
        (r"\(b) \) c", "..^^^^^.."),
    ],
)
def test_round_brackets_where_they_are_asked_for(text: str, quoted: str) -> None:
    assert inside(text, brackets=True) == quoted
    assert "^" not in inside(text) or "\\" in text
