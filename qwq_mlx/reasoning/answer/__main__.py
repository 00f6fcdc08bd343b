"""Print the rules by which an answer is read, as Markdown tables: python -m qwq_mlx.reasoning.answer

Does not: take arguments, or read an answer (`qwq_mlx.reasoning.answer.extract` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qwq_mlx.reasoning.answer.precedence import LAST_WORD, SEVERAL_BOXES
from qwq_mlx.reasoning.answer.reply_rules import BY_THE_QUESTION, CLOSING_SENTENCES, LAST_LINES, REPLIES
from qwq_mlx.reasoning.answer.rule import Rule
from qwq_mlx.reasoning.answer.rules import BLOCKS, CONCLUSIONS, MARKS, SHORT_LINES, STATEMENTS

TABLES: tuple[tuple[str, Sequence[Rule[Any, Any]]], ...] = (
    ("Which candidate is the last word", LAST_WORD),
    ("How an answer is marked; of several marks the last counts", MARKS),
    ("What a further box does to an answer", SEVERAL_BOXES),
    ("What a line states", STATEMENTS),
    ("What follows the thinking, and marks no answer", REPLIES),
    ("What a text is that is no prose", BLOCKS),
    ("What stands under a heading, or behind the thinking, without a box", CONCLUSIONS),
    ("What a short line says besides its words", SHORT_LINES),
    ("What the last line of a text without any mark says", LAST_LINES),
    ("What a line says in the question's own words", BY_THE_QUESTION),
    ('What a closing sentence says that begins with "So", "Therefore", "In total"', CLOSING_SENTENCES),
)
"""Every table with its title, the one that decides first at the top."""


def main() -> None:
    """Print every table."""
    print("In each table the first row that applies decides. An answer's confidence is the product over its rows.")
    for title, rules in TABLES:
        print(f"\n### {title}\n")
        print("\n".join(_lines(rules)))


def _lines(rules: Sequence[Rule[Any, Any]]) -> Iterable[str]:
    yield "| rule | confidence | matches | example | answer |"
    yield "|---|---|---|---|---|"
    for rule in rules:
        example, answer = (_cell(text) for text in rule.example)
        yield f"| {rule.name} | {rule.confidence:.2f} | {rule.matches} | {example} | {answer} |"


def _cell(text: str) -> str:
    shown = text if len(text) <= 80 else f"{text[:76]} ..."
    return "`` {} ``".format(shown.replace("\n", "⏎").replace("|", "\\|")) if shown else "none"


if __name__ == "__main__":
    main()
