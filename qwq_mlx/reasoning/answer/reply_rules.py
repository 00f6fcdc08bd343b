"""The rules by which a text is read that marks no answer: its last line, or what follows the thinking.

Ordered tables, as in `rules`: in each, the first row that applies decides.

Does not: look at a whole thinking, which is full of sentences that could be an answer.
"""

from __future__ import annotations

from typing import NamedTuple

from qwq_mlx.reasoning.answer import last_lines, unmarked
from qwq_mlx.reasoning.answer.cues import is_bullet, is_courtesy, is_remark
from qwq_mlx.reasoning.answer.question import Question, choose, every_letter, named_letter, several_letters
from qwq_mlx.reasoning.answer.rule import Reading, Rule, first
from qwq_mlx.reasoning.answer.rules import BLOCKS, Words, conclusion

__all__ = ["BY_THE_QUESTION", "CLOSING_SENTENCES", "LAST_LINES", "REPLIES", "LastLine", "Reply"]

CLOSING_SENTENCES: tuple[Words, ...] = (
    Rule("one in bold", 1.0, last_lines.one_in_bold,
         "The one thing in bold.", ("So she has **12** apples.", "12")),
    Rule("one code span", 1.0, last_lines.one_code_span,
         "The one thing between backquotes.", ("So the output is `[1, 2]`.", "[1, 2]")),
    Rule("inequality", 1.0, last_lines.inequality,
         "An inequality and nothing else.", ("Therefore, x > 3.", "x > 3")),
    Rule("comparison", 1.0, last_lines.compared,
         "What is larger, older, ... than something else.", ("So 9.9 is larger than 9.11.", "9.9")),
    Rule("all but", 1.0, last_lines.excepted,
         "All of a kind but some.", ("So the domain is all real numbers except 2.", "all real numbers except 2")),
    Rule("equated", 1.0, last_lines.equated,
         'A number or formula behind the last "is", "equals" or "=".', ("So 3 + 4 = 7.", "7")),
    Rule("formulas", 1.0, last_lines.formulas,
         'Its formulas: one, or several joined by "and".', ("Therefore, it converges to $\\ln 2$.", "\\ln 2")),
    Rule("one quantity", 1.0, last_lines.one_quantity,
         "Its one date, or its one number with its unit.", ("So she has 12 apples.", "12 apples")),
    Rule("one quoted", 1.0, last_lines.one_quoted,
         "The one thing in quotation marks, at the end.", ('So one must write "listen"', "listen")),
    Rule("name", 1.0, last_lines.named,
         "The name or word that it ends with.", ("So the capital is Canberra.", "Canberra")),
    Rule("after a colon", 1.0, last_lines.after_colon,
         'What follows "is:" or "are:".', ("So the order is: C, A, B.", "C, A, B")),
    Rule("there is no", 1.0, last_lines.there_is_no,
         "That there is none.", ("So there is no solution.", "no solution")),
)  # fmt: skip
"""What a sentence says that begins with "So", "Therefore", "In total" or the like. Seen: the sentence behind that."""


class LastLine(NamedTuple):
    """The last line that says more than that all before it is right.

    line: the line.
    tail: the text's end.
    question: what the prompt asks for.
    is_whole: the text has no other line.
    """

    line: str
    tail: str
    question: Question
    is_whole: bool = False


def _closing(seen: LastLine) -> Reading[str] | None:
    sentence = last_lines.closing_sentence(seen.line)
    return None if sentence is None else first(CLOSING_SENTENCES, sentence)


def _json(seen: LastLine) -> str | None:
    objects = [text for text in (seen.line, seen.tail) if unmarked.json_object(text)]
    answers = [unmarked.json_answer(text) or (text.strip() if seen.question.is_json else None) for text in objects]
    return next(filter(None, answers), None)


def _one_line(seen: LastLine) -> Reading[str] | None:
    is_reply = seen.is_whole and last_lines.is_reply(seen.line)
    return first(REPLIES, Reply(seen.line, seen.question)) if is_reply else None


_PLANET = "Which planet is the largest?\n(A) Mars\n(B) Venus\n(C) Jupiter\n"

BY_THE_QUESTION: tuple[Rule[LastLine, str], ...] = (
    Rule("several letters", 1.0, lambda seen: several_letters(seen.line, seen.question.choices),
         "Several listed choices and nothing else.", ("Both B and C.", "B, C"), _PLANET),
    Rule("choice by letter", 1.0, lambda seen: named_letter(seen.line, seen.question.choices, is_bare=False),
         'The one listed choice that is named as "(B)" or "option B".', ("It must be (C) then.", "C"), _PLANET),
    Rule("choice in words", 1.0, lambda seen: choose(seen.line, seen.question.choices, is_part=True),
         "The one listed choice whose words are repeated.", ("I take Jupiter for the largest.", "C"), _PLANET),
    Rule("choice by bare letter", 1.0, lambda seen: named_letter(seen.line, seen.question.choices, is_bare=True),
         "The one listed choice whose letter stands alone.", ("It can only be C then", "C"), _PLANET),
    Rule("every letter", 1.0, lambda seen: every_letter(seen.line, seen.question),
         "All letters that it names, where several may be chosen.",
         ("Only B and C are.", "B, C"), f"Select all that apply. {_PLANET}"),
    Rule("true or false", 1.0,
         lambda seen: last_lines.said_true_or_false(seen.line) if seen.question.is_true_or_false else None,
         "The one of the two words that it uses, where the question asks for one.",
         ("So 91 is not prime, hence false.", "false"), "Is 91 prime? Answer True or False."),
    Rule("yes or no at the end", 1.0,
         lambda seen: last_lines.ended_yes_or_no(seen.line) if seen.question.is_yes_or_no else None,
         "The yes or no that it ends with, where the question can be answered so.",
         ("The number 91 is composite, so no.", "no"), "Is 91 prime?"),
    Rule("yes or no", 1.0, lambda seen: last_lines.said_yes_or_no(seen.line) if seen.question.is_yes_or_no else None,
         "The yes or no that it begins with, where the question can be answered so.",
         ("No, because 91 = 7 * 13.", "No"), "Is 91 prime?"),
)  # fmt: skip
"""What a line says in the question's own words."""

LAST_LINES: tuple[Rule[LastLine, str], ...] = (
    Rule("by the question", 0.5, lambda seen: first(BY_THE_QUESTION, seen),
         "A listed choice, or yes or no, where the question asks for one.", ("It must be (C) then.", "C"), _PLANET),
    Rule("no choice", 0.5, lambda seen: "" if seen.question.choices else None,
         "Of a multiple choice, no other answer.", ("So it is 12.", ""), _PLANET),
    Rule("number alone", 0.5, lambda seen: last_lines.number_alone(seen.line),
         "A number and nothing else.", ("= 42", "42")),
    Rule("box without braces", 0.5, lambda seen: last_lines.box_without_braces(seen.line),
         "A box that holds what follows it.", ("So it is \\boxed42", "42")),
    Rule("closing sentence", 0.5, _closing,
         "A sentence that concludes.", ("In total, she paid $45.", "$45")),
    Rule("displayed formula", 0.5, lambda seen: last_lines.displayed(seen.tail),
         "A displayed formula behind a colon or a verb.", ("The inverse is:\n\\[ x - 1 \\]", "x - 1")),
    Rule("JSON", 0.7, _json,
         "A text that is a JSON object: its answer, or the object where JSON was asked for.",
         ('{"answer": {"value": 42}}', "42")),
    Rule("code block alone", 0.5, lambda seen: last_lines.only_code(seen.tail),
         "A code block and nothing else.", ("```output\n42\n```", "42"), "What is 40 + 2?"),
    Rule("one line", 0.5, _one_line,
         "A text that is one line, read as a reply.", ("2 + 3 = 5", "5")),
    Rule("nothing", 0.5, lambda seen: "",
         "Anything else gives no answer.", ("I hope this helps!", "")),
)  # fmt: skip
"""What the last line of a text comes to that marks no answer."""


class Reply(NamedTuple):
    """What follows the thinking, and what the prompt asks for."""

    text: str
    question: Question


def _asked(seen: Reply) -> Reading[str] | None:
    lines = unmarked.lines_of(seen.text)
    ends = dict.fromkeys([*lines[:1], *lines[-1:]])
    return next(filter(None, (first(BY_THE_QUESTION, LastLine(line, "", seen.question)) for line in ends)), None)


def _last(seen: Reply) -> str:
    lines = unmarked.lines_of(seen.text)
    return next((line for line in reversed(lines) if not is_remark(line) and not is_courtesy(line)), "")


def _closing_line(seen: Reply) -> Reading[str] | None:
    last = _last(seen)
    is_prose = last != unmarked.first_line(seen.text) and not is_bullet(last)
    sentence = last_lines.closing_sentence(last, needs_cue=False) if is_prose else None
    return first(CLOSING_SENTENCES, sentence) if sentence else None


def _few_words(seen: Reply) -> Reading[str] | None:
    is_short = len(unmarked.lines_of(seen.text)) == 1 and unmarked.few_words(seen.text) is not None
    return conclusion(seen.text) if is_short else None


REPLIES: tuple[Rule[Reply, str], ...] = (
    Rule("by the question", 0.9, _asked,
         "A listed choice, or yes or no, in the first or last line, where the question asks for one.",
         ("7 * 13</think>False — 91 is 7 * 13.", "False"), "Is 91 prime? Answer True or False.<think>"),
    Rule("formula, code or list", 0.9, lambda seen: first(BLOCKS, seen.text),
         "One formula, a code block, a total, or a list.", ("5</think>\\[ x = 5 \\]", "x = 5")),
    Rule("closing sentence", 0.8, lambda seen: _closing(LastLine(_last(seen), "", seen.question)),
         "A last line that concludes.", ("5</think>So the capital is Canberra.", "Canberra")),
    Rule("displayed formula", 0.9, lambda seen: last_lines.displayed(seen.text),
         "A displayed formula behind a colon or a verb.", ("5</think>The inverse is:\n\\[ x - 1 \\]", "x - 1")),
    Rule("closing line", 0.8, _closing_line,
         "Of several lines the last, read as a closing sentence.",
         ("5</think>She sold 48, then 24.\n\nThat makes **72** clips.", "72")),
    Rule("number alone", 0.9, lambda seen: last_lines.number_alone(seen.text.strip()),
         "A number and nothing else.", ("6 * 12</think>= 72", "72")),
    Rule("few words", 0.9, _few_words,
         "What one line of at most three words says.", ("Her name?</think>Ann Lee.", "Ann Lee")),
    Rule("conclusion", 0.8, lambda seen: conclusion(seen.text),
         "What it says as a conclusion.", ("2 + 3 is 5.</think>The sum of both numbers is 5.", "5")),
)  # fmt: skip
"""What follows the thinking's closing tag, and marks no answer."""
