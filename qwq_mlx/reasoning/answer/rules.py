"""The rules by which an answer is read, as ordered tables: in each, the first row that applies decides.

A new phrase is a row in `STATEMENTS`, a new form under a heading a row in `CONCLUSIONS`, and so on. The tables call
each other: `MARKS` reads text without a box by `CONCLUSIONS`, and those read a line by `STATEMENTS`. An answer's
confidence is the product over the rows that it was read by. `python -m qwq_mlx.reasoning.answer` prints the tables.

Does not: find marks in a stream (`markers` does), choose between several (`precedence` does), or read
a text that marks nothing (`reply_rules` does).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from qwq_mlx.reasoning.answer import last_lines, sentences, unmarked
from qwq_mlx.reasoning.answer.cues import MAX_LINE
from qwq_mlx.reasoning.answer.rule import Reading, Rule, first

__all__ = ["BLOCKS", "CONCLUSIONS", "MARK", "MARKS", "SHORT_LINES", "STATEMENTS", "Words", "conclusion", "stated"]

Words = Rule[str, str]


def stated(line: str) -> str | None:
    """The value that the last answer statement in a line gives, or None.

    Markup around the value and the end of its sentence are taken off.

    >>> stated("So the answer is **(B)**."), stated("Maybe it is even.")
    ('B', None)
    """
    reading = _statement(line)
    return None if reading is None else reading.value


def _statement(line: str) -> Reading[str] | None:
    return first(STATEMENTS, line[-MAX_LINE:])


def _says(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    """A matcher for one pattern: its last match's group "rest" begins with the value, or states it once more."""

    def matcher(line: str) -> str | None:
        rest = None
        for match in pattern.finditer(line):
            rest = match["rest"]
        if rest is None:
            return None
        return (stated(rest) if len(rest) < len(line) else None) or sentences.value_of(rest)

    return matcher


STATEMENTS: tuple[Words, ...] = (
    Rule("JSON field", 1.0, _says(sentences.JSON_FIELD),
         'The field "answer" or "final_answer" of a JSON object.', ('{"answer": "C"}', "C")),
    Rule("label", 1.0, _says(sentences.LABELLED),
         'A line that begins with "Answer:", "Result =" or the like.', ("Answer: 12", "12")),
    Rule("the answer is", 1.0, _says(sentences.ANSWER_IS),
         'A noun for the answer and a verb for "is".', ("So the correct option is B, as shown.", "B")),
    Rule("correction", 1.0, _says(sentences.CORRECTION),
         'A line that begins with "Correction:" or the like.', ("The answer is 7.\n\nCorrection: 8", "8")),
    Rule("it should be", 1.0, _says(sentences.SHOULD_BE),
         "A number in a line that doubts what came before it.",
         ("The answer is 7.\n\nWait, no. It should be 8.", "8")),
    Rule("option is correct", 1.0, _says(sentences.CHOSEN),
         "A lettered or numbered option that is called correct, or ends the sentence.", ("Option C is correct.", "C")),
    Rule("is the right answer", 1.0, _says(sentences.CALLED_RIGHT),
         "A letter that is called the correct answer.", ("B is the best choice here.", "B")),
    Rule("option is correct (Chinese)", 1.0, _says(sentences.CHINESE_CALLED_RIGHT),
         "The same in Chinese.", ("选项B是正确的。", "B")),
    Rule("picked", 1.0, _says(sentences.PICKED),
         "A letter that the writer chooses.", ("I'd go with (D).", "D")),
    Rule("it is", 1.0, _says(sentences.IT_IS),
         'A letter behind "So it is".', ("So it's C.", "C")),
    Rule("leaves", 1.0, _says(sentences.LEAVES),
         "The letter that is left over.", ("That leaves us with C.", "C")),
    Rule("####", 1.0, _says(sentences.GSM8K),
         "A number behind ####, as GSM8K writes its answers.", ("#### 42", "42")),
    Rule("is the answer", 1.0, _says(sentences.IS_THE_ANSWER),
         'A value before "is the answer".', ("So 144 is the answer.", "144")),
    Rule("answers the question", 1.0, _says(sentences.ANSWERS_THE_QUESTION),
         'What follows "to answer the question:".', ("So, to answer your question: 12.", "12")),
    Rule("the answer is (Chinese)", 1.0, _says(sentences.CHINESE_ANSWER_IS),
         'A noun for the answer and a verb for "is", in Chinese.', ("所以答案是 5。", "5")),
    Rule("the answer is (other languages)", 1.0, _says(sentences.ANSWER_IS_ELSEWHERE),
         'A noun for the answer and a verb for "is" or a colon, in one of 18 languages.',
         ("Die Lösung lautet 42.", "42")),
    Rule("picked (Chinese)", 1.0, _says(sentences.CHINESE_CHOSEN),
         "A letter that is chosen, in Chinese.", ("故选:C.", "C")),
)  # fmt: skip
"""What one line states. Seen: a line."""

_PARAGRAPH = "First the goat goes over, and then the wolf." + 5 * " She comes back for the other two."

SHORT_LINES: tuple[Words, ...] = (
    Rule("bold label", 1.0, unmarked.labelled,
         "What follows a label in bold.", ("**Speed:** 12 m/s", "12 m/s")),
    Rule("equation of numbers", 1.0, unmarked.equation_of_numbers,
         "The right side of an equation without variables.", ("2 + 3 = 5", "5")),
    Rule("one thing marked", 1.0, unmarked.one_marked,
         "The one thing in bold, in quotation marks or set as a formula.", ("The speed is **12 m/s**.", "12 m/s")),
    Rule("equated formulas", 1.0, unmarked.equated_formulas,
         "Several formulas, where they alone follow the first verb.", ("The roots are $2$ and $3$.", "2, 3")),
    Rule("yes or no", 1.0, unmarked.yes_or_no,
         "The yes or no that it begins with.", ("Yes, it converges.", "Yes")),
    Rule("equated number", 1.0, unmarked.equated_number,
         "The number behind the only verb.", ("The area is 12.", "12")),
)  # fmt: skip
"""What a short line says besides its words. Seen: the line."""

BLOCKS: tuple[Words, ...] = (
    Rule("answer tags", 1.0, unmarked.in_tags,
         "Answer tags that hold the whole text.", ("<answer>\n8\n</answer>", "8")),
    Rule("open box", 0.5, unmarked.open_box,
         "A box that the text ends in.", ("\\[ \\boxed{42", "42")),
    Rule("displayed formula", 1.0, unmarked.whole_formula,
         "One displayed formula and nothing else.", ("\\[ x = 3 \\]", "x = 3")),
    Rule("code block", 1.0, unmarked.code_block,
         "The last code block; of JSON its answer.", ("```\n42\n```\nThat is all.", "42")),
    Rule("total", 1.0, unmarked.total,
         "What its last line calls the total.", ("- April: 48\n- May: 24\n- Total: 72", "72")),
    Rule("lines in brackets", 1.0, unmarked.in_brackets,
         "Several lines in brackets that are closed at the end.", ("[[1, 0],\n[0, 1]]", "[[1, 0],\n[0, 1]]")),
    Rule("cut in brackets", 0.5, unmarked.cut_in_brackets,
         "A line of something in brackets that goes on.", ("[[0, 0, 0],", "[[0, 0, 0],")),
    Rule("list", 0.8, unmarked.all_items,
         "Parts, bullets or a table of at most 600 characters.", ("(a) 3\n(b) 5", "(a) 3\n(b) 5")),
)  # fmt: skip
"""What a text is that is no prose. Seen: the text."""

CONCLUSIONS: tuple[Words, ...] = (
    Rule("formula, code or list", 1.0, lambda text: first(BLOCKS, text),
         "One formula, a code block, a total, or a list.", ("\\[ x = 3 \\]", "x = 3")),
    Rule("statement", 1.0, lambda text: next(filter(None, map(_statement, reversed(unmarked.lines_of(text)))), None),
         "The last line that states an answer.", ("The answer is B.\nOxygen has less.", "B")),
    Rule("one paragraph", 1.0, unmarked.one_paragraph,
         "A first line of more than 200 characters: the answer where it stands alone and has at most 600, else none.",
         (_PARAGRAPH, _PARAGRAPH)),
    Rule("short line", 1.0, lambda text: first(SHORT_LINES, unmarked.first_line(text)),
         "What its first line says besides its words.", ("The area is 12.\nIt is small.", "12")),
    Rule("sentence with one number", 0.8, lambda text: last_lines.number_in_words(unmarked.first_line(text)),
         "The last equation's value, or the one number, in a first line of words.",
         ("Natalia sold 72 clips.", "72 clips")),
    Rule("last clause", 0.8, lambda text: last_lines.last_clause(unmarked.first_line(text)),
         'The number in a last clause behind ", so" in its first line.', ("He has 3 and she has 4, so 7 in all.", "7")),
    Rule("few words", 1.0, unmarked.few_words,
         "A first line of at most three words, or without any.", ("Canberra.", "Canberra")),
    Rule("whole line", 0.6, unmarked.whole_line,
         "Its first line as it stands.", ("The goat goes first.", "The goat goes first")),
)  # fmt: skip
"""What a text under a heading, or behind the thinking's closing tag, says without a box. Seen: the text."""


def conclusion(text: str) -> Reading[str] | None:
    """What a text without a box says: under a heading, or behind the thinking."""
    # A box without braces holds what follows.
    return first(CONCLUSIONS, re.sub(r"\\boxed(?:\s*\[([^\[\]\n]{1,80})\]|\s+(?=[^{\s])|(?=\d))", r"\1", text))


def _reduced(line: str) -> Reading[str] | None:
    """A line's statement; of a sentence in it what that comes to: "the value of x is 9" gives "9"."""
    reading = _statement(line)
    return reading and replace(reading, value=_core(reading.value))


def _announced(line: str) -> Reading[str] | None:
    reading = conclusion(line)
    return replace(reading, value=_core(reading.value)) if reading and reading.value else None


def _core(value: str) -> str:
    if (number := unmarked.counted(value)) is not None:
        return number
    reading = first(SHORT_LINES, value) if re.match(r"[A-Za-z]{2,} ", value) else None
    return reading.value if reading else value


def _code(code: str) -> str | Reading[str]:
    return unmarked.json_answer(code) or ("" if "\n" in code else _statement(code)) or code


MARKS: tuple[Words, ...] = (
    Rule("heading", 0.98, conclusion,
         'What follows a line such as "**Final Answer**": its box, else what the conclusions below read.',
         ("**Final Answer**\n\nThe area is 12.", "12")),
    Rule("tag", 0.95, str.strip,
         "The content of an answer tag that the prompt asked for.", ("So <answer>5</answer>.", "5"),
         "Put it in <answer></answer>."),
    Rule("box", 0.9, str.strip,
         "The content of \\boxed{}.", ("So it is \\boxed{5}.", "5")),
    Rule("sentence", 0.85, _reduced,
         "The last line that states an answer.", ("So the answer is 5.\n\nI'm sure.", "5")),
    Rule("announced", 0.85, _announced,
         "A line of at most 200 characters behind one that announces the answer.",
         ("The correct answer is:\n\n12 cm\n", "12 cm")),
    Rule("code", 0.7, _code,
         "The last code block that is no example of use; of JSON its answer.", ("```py\nf = 1\n```", "f = 1")),
)  # fmt: skip
"""How an answer is marked; of several of one strength the last counts. Seen: what the mark holds."""

MARK = {rule.name: rule for rule in MARKS}
"""The rows of `MARKS` by name."""
