"""Scripts: what counts as a switch, what does not, and where it is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_mlx.reasoning.scripts import ScriptWatcher, Switch, allowed, script_of, scripts_of


def watch(text: str, prompt: str = "How many?", size: int = 1) -> list[Switch]:
    watcher = ScriptWatcher(prompt)
    found = [watcher.feed(text[at : at + size]) for at in range(0, len(text), size)]
    return [switch for switch in [*found, watcher.finish()] if switch is not None]


@pytest.mark.parametrize(
    ("char", "script"),
    [
        ("a", "Latin"), ("é", "Latin"), ("思", "Han"), ("の", "Kana"), ("カ", "Kana"), ("한", "Hangul"),
        ("ж", "Cyrillic"),
        ("π", "Greek"), ("ش", "Arabic"), ("א", "Hebrew"), ("क", "Devanagari"), ("ไ", "Thai"), ("ა", "Other"),
        ("5", None), ("。", None), (" ", None), ("\ud800", None), ("😀", None), ("\0", None),
    ],
)  # fmt: skip
def test_each_letter_has_its_script_and_nothing_else_has_one(char: str, script: str | None) -> None:
    assert script_of(char) == script


def test_a_step_in_another_script_is_reported_with_its_place_and_share() -> None:
    text = "One step.\nAnother 让我们 step\nlast"
    (switch,) = watch(text)
    assert (switch.start, switch.end) == (10, text.index("last"))
    assert switch.at == text.index("让")
    assert switch.scripts == (("Han", 3),)
    assert switch.share == pytest.approx(3 / 14, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "the word “思考” means to think",
        "so \\(甲 = 5\\) holds",
        "angle $α甲$",
        "`变量` is a name",
        "α + β = π",
        "naïve café",
        "中",
    ],
)
def test_quotations_formulas_and_a_single_letter_are_no_switch(text: str) -> None:
    assert watch(text) == []


def test_the_prompts_own_scripts_are_at_home_and_whole_latin_steps_then_are_not() -> None:
    prompt = "请问 3 只鸡有几条腿?"
    assert watch("我们来算,用 x 表示。\n", prompt) == []
    (switch,) = watch("Let me think about it step by step.\n", prompt)
    assert switch.scripts == (("Latin", 27),)
    assert watch("思考 in English too\n", "What does 思 mean?") == []


def test_a_quotation_that_never_closes_ends_with_its_line() -> None:
    assert len(watch('He said "well\n我们 then')) == 1


def test_a_guard_lets_the_own_script_formulas_and_latin_through() -> None:
    assert allowed(" 12 = π", ())
    assert allowed("Anna", ["Han"])
    assert allowed("思考", ["Han"])
    assert not allowed("思考", ["Latin"])


@settings(deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=10))
def test_scripts_do_not_depend_on_how_the_text_is_cut(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole, pieces = ScriptWatcher(""), ScriptWatcher("")
    whole.feed(text)
    whole.finish()
    for a, b in itertools.pairwise(places):
        pieces.feed(text[a:b])
    pieces.finish()
    assert pieces.totals == whole.totals
    assert sum(whole.totals.values()) <= sum(scripts_of(text).values())


def test_the_real_outputs_with_stray_han_are_found_and_no_other(shared: Path) -> None:
    for row in (shared / "traces" / "qwq_preview_traces.jsonl").read_text().splitlines():
        trace = json.loads(row)
        n_han = sum("\u4e00" <= char <= "\u9fff" for char in trace["response"])  # the slow way
        switches = watch(trace["response"], trace["prompt"], size=4)
        assert sum(count for switch in switches for _, count in switch.scripts) == n_han, trace["id"]
