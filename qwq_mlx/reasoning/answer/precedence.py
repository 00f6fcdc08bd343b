"""Which of several answers is the model's last word, as ordered tables: in each, the first row that applies decides.

`SEVERAL_BOXES` says what a further box does to an answer while the text is written, `LAST_WORD` which of the candidates
counts when it is over.

Does not: read an answer's value (`rules` does), or keep candidates (`splitter` does).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from qwq_mlx.reasoning.answer.cues import corrects, is_separator, rejects
from qwq_mlx.reasoning.answer.rule import Rule
from qwq_mlx.reasoning.answer.split import Candidate

__all__ = ["FAR", "LAST_WORD", "SEVERAL_BOXES", "Boxes", "Ending"]

FAR = {"heading": 1.0, "sentence": 0.3}
"""Factor on the confidence by kind, 0.7 for the others, where more than 1,500 characters follow the answer."""


class Boxes(NamedTuple):
    """A further box or tag behind an answer that is marked already.

    value, further: what the answer is so far, and what the further mark holds.
    between: the text between two boxes of one conclusion that stand side by side in one line, None for others.
    is_inside: the further mark stands in the last one.
    is_next_part: it answers the question's next part, or stands in the next item of the conclusion's list.
    is_same_conclusion: it stands in the same line, or under the same heading, and no doubt between them.
    """

    value: str | None
    further: str
    between: str | None
    is_inside: bool
    is_next_part: bool
    is_same_conclusion: bool


def _again(seen: Boxes) -> str | None:
    if seen.between is None:
        return None
    between = seen.between.strip(" $")
    is_again = between.startswith(("=", "\\approx")) or (between.startswith("or") and "=" not in between)
    return seen.further if is_again or seen.value == seen.further else None


def _beside(seen: Boxes) -> str | None:
    return f"{seen.value}, {seen.further}" if seen.between is not None else None


SEVERAL_BOXES: tuple[Rule[Boxes, str], ...] = (
    Rule("inside", 1.0, lambda seen: seen.value if seen.is_inside else None,
         "A box in a tag, or a tag in a box, is one answer.", ("<answer>\\boxed{5}</answer>", "5"),
         "Answer in <answer></answer>."),
    Rule("next part", 1.0, lambda seen: f"{seen.value}, {seen.further}" if seen.is_next_part else None,
         'Parts "(a)" and "(b)", or items of one list, are joined.', ("(a) \\boxed{3}\n\n(b) \\boxed{8}", "3, 8")),
    Rule("rejected", 1.0, lambda seen: seen.value if rejects(seen.between or "") else None,
         'A second box behind "not" or "instead of" is none.', ("So \\boxed{2}, not \\boxed{3}.", "2")),
    Rule("corrected", 1.0, lambda seen: seen.further if corrects(seen.between or "") else None,
         'A second box behind "wait", "actually" or an arrow takes the place of the first.',
         ("So \\boxed{2}. Wait, no, \\boxed{3}.", "3")),
    Rule("again", 1.0, _again,
         'Behind "=", "≈" or "or" the second box says the first again.', ("\\boxed{2 + 2} = \\boxed{4}", "4")),
    Rule("side by side", 1.0, lambda seen: _beside(seen) if is_separator(seen.between or "") else None,
         "Boxes in one line with only a comma, a name or a word like \"and\" between them are joined.",
         ("The roots are \\boxed{2} and \\boxed{3}.", "2, 3")),
    Rule("near each other", 0.8, _beside,
         "Boxes at most 24 characters apart in one line are joined.",
         ("It is \\boxed{2} plus some \\boxed{3}.", "2, 3")),
    Rule("same conclusion", 1.0, lambda seen: seen.further if seen.is_same_conclusion else None,
         "The later box in one line or under one heading counts.",
         ("**Final Answer**\n\n\\boxed{4}\n\n\\boxed{5}", "5")),
)  # fmt: skip
"""What a further box or tag does to an answer; where no row applies it is a new answer."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What was found in a text that is over.

    marked: by the last heading, tag or box.
    sentence: by the last statement since then, or since the marked answer was doubted.
    code: the last code block that can be an answer.
    boxed_in_code: the last box in a code block.
    reply: what follows the thinking's closing tag.
    last_line: what the last line comes to.
    is_ended: the model ended its text itself.
    is_far: whether much text follows the statement.
    """

    marked: Candidate | None
    sentence: Candidate | None
    code: Candidate | None
    boxed_in_code: Candidate | None
    reply: Candidate | None
    last_line: Candidate | None
    is_ended: bool
    is_far: bool


def _stated_again(seen: Ending) -> Candidate | None:
    marked, sentence = seen.marked, seen.sentence
    is_again = marked and marked.is_revised and sentence and sentence.value == marked.value
    return replace(marked, is_revised=False) if marked and is_again else None


def _stated_anew(seen: Ending) -> Candidate | None:
    return seen.sentence if seen.marked and seen.marked.is_revised else None


def _marked(seen: Ending) -> Candidate | None:
    return seen.marked if seen.marked and not seen.marked.is_revised else None


def _worked_out_anew(seen: Ending) -> Candidate | None:
    marked, last_line = seen.marked, seen.last_line
    if marked is None or last_line is None or last_line.place.char < marked.end:
        return None
    return None if last_line.value in (None, marked.value) else last_line


def _code_asked_for(seen: Ending) -> Candidate | None:
    code, sentence = seen.code, seen.sentence
    return code if code and seen.is_ended and (sentence is None or code.end > sentence.end) else None


LAST_WORD: tuple[Rule[Ending, Candidate], ...] = (
    Rule("stated again", 1.0, _stated_again,
         "A marked answer that was doubted, and then stated again in a sentence.",
         ("It is \\boxed{5}.\n\nWait, is it?\n\nSo the answer is 5.", "5")),
    Rule("stated anew", 1.0, _stated_anew,
         "The statement that follows a doubt about a marked answer.",
         ("It is \\boxed{5}.\n\nWait, no.\n\nSo the answer is 6.", "6")),
    Rule("marked", 1.0, _marked,
         "The last heading, tag or box.", ("The answer is 4? No.\n\nIt is \\boxed{5}.", "5")),
    Rule("worked out anew", 1.0, _worked_out_anew,
         "The last line behind a doubt, where it comes to something else than the marked answer.",
         ("It is \\boxed{5}.\n\nWait, I forgot one.\n\nSo there are 6.", "6")),
    Rule("doubted", 0.5, lambda seen: seen.marked,
         "A marked answer that was doubted without giving another.", ("It is \\boxed{5}.\n\nWait, is it?", "5")),
    Rule("code", 1.0, _code_asked_for,
         "The last code block, where the prompt may ask for code and no statement follows.",
         ("```py\nf = 1\n```\nThis sets f.", "f = 1")),
    Rule("sentence", 1.0, lambda seen: seen.sentence if seen.is_ended or not seen.is_far else None,
         "The last statement; of a text that was cut, only near its end.", ("So the answer is 5.", "5")),
    Rule("box in code", 1.0, lambda seen: seen.boxed_in_code,
         "A box in a code block, where nothing else counts.", ("```\n\\boxed{5}", "5")),
    Rule("reply", 1.0, lambda seen: seen.reply,
         "What follows the thinking.", ("2 + 3 is 5.</think>5", "5")),
    Rule("last line", 1.0, lambda seen: seen.last_line,
         "What the last line comes to; nothing of a text that was cut.", ("So she has 12 apples.", "12 apples")),
)  # fmt: skip
"""Which of the candidates is the model's last word."""
