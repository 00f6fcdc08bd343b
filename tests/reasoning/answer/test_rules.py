"""The tables of rules: every row reads its own example, and the tables print as Markdown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from splitting import split

from qwq_mlx.reasoning.answer import rules
from qwq_mlx.reasoning.answer.__main__ import TABLES
from qwq_mlx.reasoning.answer.rule import Rule, first

ROWS = [(table, rule) for _, table in TABLES for rule in table]
UNDER_A_HEADING = (rules.BLOCKS, rules.CONCLUSIONS, rules.SHORT_LINES)


@pytest.mark.parametrize(("table", "rule"), ROWS, ids=[rule.name for _, rule in ROWS])
def test_each_rule_reads_its_example_in_a_whole_text(table: tuple[Rule[Any, Any], ...], rule: Rule[Any, Any]) -> None:
    example, answer = rule.example
    text = f"**Final Answer**\n\n{example}" if table in UNDER_A_HEADING else example
    found = split(text, tagged="</think>" in text, prompt=rule.prompt or None)
    assert (found.answer or "") == answer
    assert rule.name in found.rule.split(" / ")


def test_names_are_unique_in_their_table() -> None:
    for title, table in TABLES:
        names = [rule.name for rule in table]
        assert len(set(names)) == len(names), title


def test_an_earlier_row_goes_first_and_confidences_multiply() -> None:
    def row(name: str, confidence: float, reads: dict[str, Any]) -> Rule[str, str]:
        return Rule(name, confidence, reads.get, "", ("", ""))

    inner = (row("five", 0.5, {"5": "five"}), row("any digit", 0.4, {"5": "digit", "6": "digit"}))
    outer = (row("none", 0.9, {}), row("digits", 0.8, {text: first(inner, text) for text in "56"}))
    assert first(outer, "5") == first((row("digits / five", 0.4, {"5": "five"}),), "5")
    reading = first(outer, "6")
    assert reading is not None
    assert (reading.value, reading.rule, round(reading.confidence, 6)) == ("digit", "digits / any digit", 0.32)
    assert first(outer, "7") is None


def test_the_tables_print_as_markdown(repository: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "qwq_mlx.reasoning.answer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=repository)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("### ") for line in lines) == len(TABLES)
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == len(ROWS) + len(TABLES)
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)
    assert done.stderr == ""
