"""Thinking and answer as they are sent: whole, in order, no half mark in the thinking, stops in the answer alone."""

from __future__ import annotations

import re

import pytest

from qwq_mlx.reasoning.answer import Splitter
from qwq_mlx.reasoning.profile import Profile, find_profile
from qwq_mlx.serve.reply import ReplyText

PREVIEW, TAGGED = find_profile("qwq-preview"), find_profile("qwq-tagged")
HEADED = "2 + 2 is 4, so I end.\n\n**Final Answer**\n\n\\[ \\boxed{4} \\]"


def sent(
    text: str,
    profile: Profile = PREVIEW,
    *,
    stops: tuple[str, ...] = (),
    size: int = 1,
    is_open: bool | None = None,
) -> tuple[str, str]:
    """Thinking and answer of a text that comes in pieces of this many characters, tags in one."""
    splitter = Splitter(profile, prompt="2 + 2", is_open=is_open)
    reply = ReplyText(stops, close_tag=profile.close_tag)
    reasoning = content = ""
    for token in re.findall(rf"</?think>|.{{1,{size}}}", text, re.DOTALL):
        splitter.feed(token)
        piece = reply.feed(token, splitter.answer_char, splitter.thinking_char)
        reasoning, content = reasoning + piece.reasoning, content + piece.content
        if reply.stop_text is not None:
            return reasoning, content
    split = splitter.finish()
    piece = reply.finish(split.conclusion_chars[0] if split.conclusion_chars else None)
    return reasoning + piece.reasoning, content + piece.content


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_heading_reaches_the_client_in_the_answer_alone(size: int) -> None:
    start = HEADED.index("**Final")
    assert sent(HEADED, size=size) == (HEADED[:start], HEADED[start:])


@pytest.mark.parametrize("size", [1, 5])
def test_tags_are_in_neither_part_and_blank_lines_open_no_answer(size: int) -> None:
    assert sent("<think>2 + 2 < 5\n</think>\n\nIt is 4.", TAGGED, size=size) == ("2 + 2 < 5\n", "It is 4.")


def test_a_prompt_may_have_opened_the_thinking_and_a_reply_may_have_none() -> None:
    assert sent("2 + 2 is 4\n</think>\n\nIt is 4.", TAGGED, is_open=True) == ("2 + 2 is 4\n", "It is 4.")
    assert sent("2 + 2 is <b", TAGGED, is_open=True) == ("2 + 2 is <b", "")
    assert sent("It is 4.", TAGGED, is_open=False) == ("", "It is 4.")


def test_an_answer_that_is_known_late_is_sent_whole() -> None:
    reasoning, content = sent("Sum them. So it is \\boxed{4}.")
    assert content == "So it is \\boxed{4}." and reasoning.startswith("Sum them. ")
    text = "Sum them.\n\nThe answer is 4."
    assert sent(text) == (text, "The answer is 4.")


def test_lines_that_might_have_been_a_heading_are_sent_as_thinking() -> None:
    text = "**Step 1** is long\n# a comment\n* a list\n" + HEADED
    assert sent(text)[0] == text.partition("**Final")[0]


@pytest.mark.parametrize("size", [1, 4])
def test_a_stop_text_counts_in_the_answer_alone(size: int) -> None:
    assert sent(HEADED, stops=("4",), size=size) == (HEADED.partition("**Final")[0], "**Final Answer**\n\n\\[ \\boxed{")
    assert sent(HEADED, stops=("so I", "none"), size=size) == sent(HEADED)


def test_a_text_that_was_cut_has_no_answer() -> None:
    reply = ReplyText()
    assert reply.feed("2 + 2 is\n**Final", None).reasoning == "2 + 2 is\n"
    assert reply.finish(None).reasoning == "**Final" and reply.content == ""


def test_a_raw_text_is_all_answer() -> None:
    reply = ReplyText(is_raw=True)
    assert reply.feed("\n\nx", None).content == "\n\nx" and reply.finish(0).content == ""
