"""Thinking and answer apart: what wins, where the spans lie, and that cutting the text differently changes nothing."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitting import split

from qwq_mlx.reasoning.answer import Split, Splitter
from qwq_mlx.reasoning.profile import Profile, find_profile

PREVIEW, TAGGED = find_profile("qwq-preview"), find_profile("qwq-tagged")
TAG_PROMPT = "Enclose the answer in the <ANSWER> tag, for example: <ANSWER>1</ANSWER>."
BOX = r"\boxed"


def conclusion(text: str, found: Split) -> str:
    assert found.conclusion_chars is not None
    return text[slice(*found.conclusion_chars)]


@pytest.mark.parametrize(
    ("text", "answer", "kind"),
    [
        (f"2 + 2 is 4.\n\n**Final Answer**\n\n\\[ {BOX}{{4}} \\]", "4", "heading"),
        (f"a\n\n**Final Answer:**\n\n\\[ {BOX}{{\\frac{{1}}{{2}}}} \\]\n", r"\frac{1}{2}", "heading"),
        (f"first {BOX}{{1}}\n\nWait, no.\n\nSo it is {BOX}{{2}}.", "2", "box"),
        (f"first {BOX}{{1}}\n\nWait, no.\n\nSo the answer is 7.", "7", "sentence"),
        (f"It is {BOX}{{7}}.\n\nLet me check: the answer is 7.", "7", "box"),
        (f"x = {BOX}{{2}} and y = {BOX}{{3}}.", "2, 3", "box"),
        (f"It is {BOX}{{2 + 2}} = {BOX}{{4}}.", "4", "box"),
        (f"The roots are {BOX}{{2}} and {BOX}{{3}}.", "2, 3", "box"),
        (f"{BOX}{{\\{{1, 2\\}}}}", r"\{1, 2\}", "box"),
        (f"{BOX} {{a}} then {BOX}{{...}} is a placeholder", "a", "box"),
        ("So, the correct answer is option 2.", "2", "sentence"),
        ("Thus the answer should be:\n\n12 cm\n", "12 cm", "sentence"),
        ("**Final Answer**\n\nThe area is 12.", "12", "heading"),
        ("Thinking.\n\n## Final Solution\nDo it so:\n```python\nx = {1: 2}\n```\nDone.", "x = {1: 2}", "heading"),
        ("所以,最终答案是 42。", "42", "sentence"),
        ("## Answer\n\n**B**\n", "B", "heading"),
    ],
)
def test_the_last_word_of_a_tagless_text_is_its_answer(text: str, answer: str, kind: str) -> None:
    found = split(text)
    assert (found.answer, found.kind) == (answer, kind)
    assert 0 < found.confidence < 1


def test_a_requested_tag_counts_only_when_the_prompt_asked_for_it() -> None:
    text = "I enclose it in <ANSWER> tags.\n\nSo: <ANSWER>2</ANSWER>"
    assert split(text, prompt=TAG_PROMPT).answer == "2"
    assert split(text, prompt=TAG_PROMPT).kind == "tag"
    assert split(text, prompt="How many?").kind == "paragraph"


CHOICES = "Who is she?\n1. Anna is Carl's child.\n2. Anna is Carl's aunt or uncle.\n3. Anna is Carl's parent.\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is that Anna is Carl's aunt or uncle.", "2"),
        ("Therefore, the correct answer is the third option.", "3"),
        ("The correct answer is:\n\n1. Anna is Carl's child.\n", "1"),
        ("Let me see.\n\nHence Anna is Carl's parent, I think.", "3"),
        ("Anna is Carl's parent or Anna is Carl's child.", None),
        ("The answer is Anna.", "Anna"),
        ("The answer is the sixth option.", "the sixth option"),
        (f"{BOX}{{\\text{{Anna is Carl's parent.}}}}", "3"),
    ],
)
def test_an_answer_in_words_is_matched_to_the_prompts_choices(text: str, answer: str | None) -> None:
    assert split(text, prompt=CHOICES).answer == answer


def test_choices_need_labels_without_a_gap() -> None:
    assert split("The answer is the first option.", prompt="1. one\n3. three\n").answer == "the first option"
    assert split("The answer is blue.", prompt="Which?\nA) red\nB) blue\n").answer == "B"


def test_a_tag_left_open_by_a_stop_string_still_gives_its_answer() -> None:
    assert split("So <answer>2", prompt=TAG_PROMPT).answer == "2"
    assert split("I use the <ANSWER> tag as told", prompt=TAG_PROMPT).answer is None


def test_an_answer_taken_back_without_another_is_kept_and_said_to_be_revised() -> None:
    found = split(f"It is {BOX}{{7}}.\n\nWait, that cannot be. Let me see", is_ended=False)
    assert found.answer == "7"
    assert found.is_revised
    assert found.confidence < split(f"It is {BOX}{{7}}.").confidence


def test_a_cut_thinking_has_no_conclusion_and_an_ended_one_a_weak_guess() -> None:
    text = "Let me see.\n\nThe wolf goes first."
    cut, ended = split(text, is_ended=False), split(text)
    assert (cut.conclusion, cut.answer, cut.confidence, cut.kind) == (None, None, 0.0, "none")
    assert conclusion(text, ended) == "The wolf goes first."
    assert (ended.answer, ended.confidence) == (None, 0.1)


def test_a_statement_that_was_cut_in_its_middle_is_not_taken() -> None:
    assert split("So the answer is 5", is_ended=False).answer is None
    assert split("So the answer is 5", is_ended=True).answer == "5"
    assert split("So the answer is 52.", is_ended=False).answer == "52"


def test_an_empty_output_has_empty_spans() -> None:
    found = Splitter(PREVIEW).finish()
    assert (found.thinking, found.conclusion, found.thinking_chars, found.answer) == ((0, 0), None, (0, 0), None)


def test_spans_are_tokens_also_where_a_token_releases_its_text_late() -> None:
    tokens = ["So ", "", "4", ".\n\n**Fin", "al Answer**", "\n\n", BOX, "{", "", "4", "}"]
    splitter = Splitter(PREVIEW)
    segments = [splitter.feed(token) for token in tokens]
    found = splitter.finish()
    assert found.thinking == (0, 3)
    assert found.conclusion == (3, len(tokens))
    assert segments == ["thinking"] * 4 + ["answer"] * 7


def test_a_conclusion_begins_where_its_announcement_does() -> None:
    text = f"Long thought.\n\nSo, my final answer is:\n\n\\[ {BOX}{{1}} \\]\n"
    assert conclusion(text, split(text)).startswith("So, my final")
    text = f"A thought. So it is {BOX}{{1}}."
    assert conclusion(text, split(text)) == f"So it is {BOX}{{1}}."


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", None])
def test_tags_split_where_the_thinking_closes_also_when_the_prompt_opened_it(prompt: str | None) -> None:
    text = f"It could be {BOX}{{1}}.</think>\n\nIt is {BOX}{{2}}."
    found = split(text, tagged=True, prompt=prompt)
    assert found.answer == "2"
    assert text[slice(*found.thinking_chars)] == f"It could be {BOX}{{1}}."
    assert conclusion(text, found) == f"\n\nIt is {BOX}{{2}}."


def test_tags_in_the_output_are_no_part_of_the_thinking() -> None:
    text = "<think>\nhm\n</think>\n\n42"
    found = split(text, tagged=True, prompt="<|im_start|>assistant\n")
    assert text[slice(*found.thinking_chars)] == "\nhm\n"
    assert (found.answer, found.kind) == ("42", "closed")


def test_a_thinking_that_never_closes_has_no_answer() -> None:
    found = split(f"It is {BOX}{{1}}", tagged=True, prompt="<think>\n")
    assert (found.conclusion, found.answer, found.confidence) == (None, None, 0.0)


def test_a_prompt_without_an_open_tag_gets_an_answer_at_once() -> None:
    splitter = Splitter(TAGGED, prompt="<|im_start|>assistant\n")
    assert splitter.feed("Paris.") == "answer"
    assert splitter.finish().answer == "Paris"


def test_a_quoted_closing_tag_in_the_answer_does_not_split_again() -> None:
    text = "a</think>The tag is </think>, twice <think> said."
    found = split(text, tagged=True)
    assert conclusion(text, found) == "The tag is </think>, twice <think> said."


PIECES = st.lists(
    st.sampled_from(
        [
            "**Final Answer**",
            "**answer",
            "**answer:** B",
            "\n",
            "\n\n",
            BOX,
            BOX + "{",
            "{",
            "}",
            "\\",
            "\\{",
            "5",
            "x ",
            "<ANSWER>",
            "</ANSWER>",
            "<think>",
            "</think>",
            "Wait, ",
            "So the answer is 3",
            ". ",
            "the answer is:",
            "# ",
            "## Final Solution",
            "```py\n",
            "\n```",
            "a" * 700,
            "答案是",
            "\U0001f600",
            "e\u0301",
            " and ",
            "=",
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=PIECES, cuts=st.lists(st.integers(0, 3000), max_size=40), tagged=st.booleans(), is_ended=st.booleans())
def test_cutting_the_text_differently_gives_the_same_split(
    text: str, cuts: list[int], tagged: bool, is_ended: bool
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    tokens = [text[a:b] for a, b in itertools.pairwise(places)]
    profile = TAGGED if tagged else PREVIEW
    whole, cut = Splitter(profile, prompt=TAG_PROMPT + "<think>"), Splitter(profile, prompt=TAG_PROMPT + "<think>")
    whole.feed(text)
    for token in tokens:
        cut.feed(token)
    expected, found = whole.finish(is_ended=is_ended), cut.finish(is_ended=is_ended)
    for name in ("thinking_chars", "conclusion_chars", "answer", "confidence", "kind", "is_revised"):
        assert getattr(found, name) == getattr(expected, name), name
    if found.conclusion is not None and found.conclusion_chars is not None:
        start = found.conclusion_chars[0]
        owner = next(i for i in range(len(tokens)) if places[i] <= start < places[i + 1])  # the slow way
        assert found.conclusion == (owner, len(tokens))
        assert found.thinking == (0, owner)


def slow_boxes(text: str) -> list[tuple[int, int, str]]:
    """Each outermost box without a blank line in it, by counting braces from every place where one begins."""
    found, at = [], 0
    while (start := text.find(BOX + "{", at)) >= 0:
        depth, end = 1, start + len(BOX) + 1
        while depth and end < len(text) and not text.startswith("\n\n", end - 1):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append((start, end, text[start + len(BOX) + 1 : end - 1].strip()))
        at = end
    return found


LINES = st.lists(
    st.sampled_from(
        ["some words", "x = {y}", "**Final Answer**", BOX + "{4}", BOX + "{\\frac{1}{2}}", BOX + "{}",
         BOX + "{a {b",
         "We get " + BOX + "{7} there", "**Final** thoughts", "", "", "so **Final Answer** is a phrase"]
    ),
    min_size=1,
    max_size=14,
)  # fmt: skip


@settings(deadline=None)
@given(LINES)
def test_marks_decide_as_in_a_slow_reading_of_the_whole_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    headings = [found.start() for found in re.finditer(r"^\*\*Final Answer\*\*$", text, re.MULTILINE)]
    boxes = [box for box in slow_boxes(text) if box[2]]
    found = split(text, size=5)
    last = headings[-1] if headings else None
    after = [box for box in boxes if last is None or box[0] > last]
    if after:
        assert found.answer == after[-1][2]
    if last is not None:
        assert (found.kind, found.conclusion_chars) == ("heading", (last, len(text)))
    elif boxes:
        line_start = text.rfind("\n", 0, boxes[-1][0]) + 1
        assert (found.kind, found.conclusion_chars) == ("box", (line_start, len(text)))
    else:
        assert found.kind in ("paragraph", "none")


def test_memory_stays_bounded_over_a_long_text() -> None:
    splitter = Splitter(PREVIEW)
    for _ in range(20_000):
        splitter.feed("**Final Answer** and ever so on { \\boxed{ <ANSWER> ")
    held = len(splitter._scanner._kept) + (splitter._marked.n_captured if splitter._marked else 0)
    assert held < 32_768
    assert len(splitter._pending) < 8


def test_nearly_all_answers_are_found_in_sentences_alone(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "traces" / "qwq_preview_traces.jsonl").read_text().splitlines()]
    n_right = n_all = 0
    for row in rows:
        text = re.sub(r"<ANSWER>\s*(\d)\s*</ANSWER>", r"\1", row["response"].split("**Final Answer")[0]).rstrip()
        if isinstance(row["expected"], str) and text != row["response"].rstrip():
            n_all += 1
            expected = split(row["response"], prompt=row["prompt"], size=50).answer
            n_right += split(text, prompt=row["prompt"].split("Enclose")[0], size=50).answer == expected
    assert n_right >= 0.98 * n_all


def test_every_expected_answer_that_the_real_traces_state_is_found(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "traces" / "qwq_preview_traces.jsonl").read_text().splitlines()]
    rows = [row for row in rows if isinstance(row["expected"], str)]
    differing = []
    for row in rows:
        splitter = Splitter(PREVIEW, prompt=row["prompt"])
        for token in re.findall(r"\s?\w+|\s+|[^\w\s]", row["response"]):
            splitter.feed(token)
        found = splitter.finish()
        if found.answer != row["expected"]:
            # Only a model's own mistake may differ: it must then have closed on just that value.
            assert found.answer is not None
            assert re.search(rf"[{{>]{re.escape(found.answer)}(?:}}|</ANSWER>)[^\d]*$", row["response"]), row["id"]
            differing.append(row["id"])
    assert len(differing) <= len(rows) * 6 // 222, differing


@pytest.mark.parametrize("doubt", ["Wait, is that right?", "Hmm, but 7 is odd.", "Hold on.", "等等,不对。"])
def test_a_final_answer_that_is_doubted_afterwards_is_kept_and_less_sure(doubt: str) -> None:
    sure, doubted = (Splitter(PREVIEW) for _ in range(2))
    text = "**Final Answer**\n\n\\[ \\boxed{7} \\]\n"
    sure.feed(text)
    doubted.feed(f"{text}\n{doubt}\n")
    found = doubted.finish()
    assert (found.answer, found.is_revised) == ("7", True)
    assert found.confidence < sure.finish().confidence


def test_code_is_no_answer_where_nobody_asked_for_code() -> None:
    text = "I check it by program.\n\n```python\nprint(2 + 2)\n```\n\nIt prints four."
    splitter = Splitter(PREVIEW, prompt="What is 2 + 2?")
    splitter.feed(text)
    assert splitter.finish().answer is None


@pytest.mark.parametrize(
    ("profile", "text", "thinking_char"),
    [
        (PREVIEW, f"2 + 2 is 4.\n\n**Final Answer**\n\n\\[ {BOX}{{4}} \\]", 0),
        (PREVIEW, f"Sum. So it is {BOX}{{4}}.", 0),
        (TAGGED, "<think>2 + 2</think>\n\nIt is 4.", len("<think>")),
    ],
)
def test_where_the_answer_begins_is_known_while_it_is_written(profile: Profile, text: str, thinking_char: int) -> None:
    splitter = Splitter(profile, prompt="2 + 2")
    places = []
    for token in re.findall(r"<think>|</think>|.", text, re.DOTALL):
        splitter.feed(token)
        places.append(splitter.answer_char)
    found = splitter.finish()
    assert found.conclusion_chars is not None
    assert places[0] is None and places[-1] == found.conclusion_chars[0]
    assert splitter.thinking_char == found.thinking_chars[0] == thinking_char
