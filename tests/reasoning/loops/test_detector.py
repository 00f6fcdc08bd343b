"""Loops: exact ones in time, variants by recall, and no alarm where a text only looks repetitive."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splices import PIECE, doubting, renamed, restating, splice

from qwq_mlx.errors import OptionError
from qwq_mlx.reasoning.loops import Loop, LoopDetector, LoopOptions
from qwq_mlx.reasoning.loops.exact_cycles import _HISTORY, MAX_PERIOD, CycleFinder
from qwq_mlx.reasoning.loops.near_repeats import _HORIZON
from qwq_mlx.reasoning.loops.word_templates import TemplateReader


def watch(text: str, options: LoopOptions | None = None) -> list[Loop]:
    """Every report over a text cut into word-like tokens, with ids by spelling."""
    detector, ids, loops = LoopDetector(options), {}, []
    for token in PIECE.findall(text):
        loop = detector.feed(ids.setdefault(token, len(ids)), token)
        if loop is not None:
            loops.append(loop)
    return loops


def slow_length(ids: list[int], period: int) -> int:
    """How many of the last ids have that period, counted one by one."""
    length = period
    while length < len(ids) and ids[-1 - length] == ids[-1 - length + period]:
        length += 1
    return length


@settings(max_examples=150, deadline=None)
@given(
    before=st.lists(st.integers(0, 3), max_size=80),
    cycle=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    margin=st.integers(0, 40),
)
def test_every_exact_cycle_is_found_at_three_repetitions_and_the_margin(
    before: list[int], cycle: list[int], margin: int
) -> None:
    finder, ids = CycleFinder(margin=margin), []
    deadline = len(before) + 3 * len(cycle) + max(margin, 10)  # shorter runs than 8 ids are not looked at
    for token in (before + cycle * (4 + margin + 10))[:deadline]:
        ids.append(token)
        found = finder.feed(token)
        if found is not None:
            assert found.length <= slow_length(ids, found.period)
            assert found.length >= 3 * found.period + margin
            return
    pytest.fail(f"nothing found in {len(ids)} ids")


@pytest.mark.parametrize("period", [1, 7, 8, 9, 64, 511, 1024, 4096, 4097, MAX_PERIOD])
def test_long_periods_are_found_within_three_repetitions_plus_64(period: int) -> None:
    rng = random.Random(period)
    before = [rng.randrange(50) for _ in range(rng.randrange(500))]
    cycle = [rng.randrange(50) for _ in range(period)]
    finder = CycleFinder(margin=LoopOptions().cycle_margin)
    for n_ids, token in enumerate(before + cycle * (4 + 70 // period), 1):
        found = finder.feed(token)
        if found is not None:
            assert n_ids - len(before) <= 3 * period + 64
            assert found.period == period
            return
    pytest.fail("nothing found")


def test_random_ids_and_two_copies_are_no_cycle() -> None:
    rng = random.Random(5)
    finder = CycleFinder(margin=0)
    ids = [rng.randrange(40) for _ in range(3000)]
    assert not any(finder.feed(token) for token in ids * 2)


def test_the_detector_names_a_cycle_once_with_its_span_and_again_after_a_reset() -> None:
    detector = LoopDetector()
    feed = [detector.feed(at % 5 if at >= 20 else 1000 + at, "") for at in range(200)]
    loops = [loop for loop in feed if loop is not None]
    assert [(loop.kind, loop.start, loop.period) for loop in loops] == [("cycle", 20, 5)]
    assert loops[0].end == feed.index(loops[0]) + 1
    assert "repeat every 5" in loops[0].evidence
    detector.reset()
    assert any(detector.feed(at % 5, "") for at in range(100))


def trials() -> str:
    """A search through the combinations of four numbers: repetitive, but each line has news in its numbers."""
    rng = random.Random(2)
    lines = []
    for _ in range(150):
        a, b, c, d = (rng.randint(1, 13) for _ in range(4))
        lines.append(f"({a} + {b}) * {c} - {d} = {(a + b) * c - d}, not 24.")
    return "\n".join(lines)


def table() -> str:
    rng = random.Random(3)
    rows = [f"| {n} | {rng.random():.3f} | {rng.choice(['yes', 'no'])} | value of row |" for n in range(120)]
    return "| n | x | ok | note |\n|---|---|---|---|\n" + "\n".join(rows)


def code() -> str:
    body = "".join(f"    if op == 'OP{n}':\n        out.append({n})\n        continue\n" for n in range(80))
    return f"Here is the code:\n```python\ndef run(op, out):\n{body}```\n"


def digits() -> str:
    rng = random.Random(4)
    return "\n".join(" ".join(str(rng.randint(0, 9)) for _ in range(12)) for _ in range(150))


def spelling() -> str:
    return "\n".join(
        f"{at}. The letter is {letter}. Count so far: {at // 3}." for at, letter in enumerate("strawberry")
    )


def divisions() -> str:
    return "\n\n".join(
        f"Next, I check {n}. It is divided by {n % 7 + 2}, and that leaves {n % 5}." for n in range(101, 200)
    )


def numbered() -> str:
    return "\n".join(f"{n}. The number {n * n + 7} is not a prime, and neither is {n * n + 9}." for n in range(2, 80))


@pytest.mark.parametrize(
    "text", [trials(), table(), code(), digits(), spelling(), divisions(), numbered(), "??" * 20, "-" * 40]
)
def test_progress_that_looks_repetitive_is_no_loop(text: str) -> None:
    assert watch(text) == []


def test_numbering_the_same_step_or_counting_without_end_is_no_progress() -> None:
    step = "Pour all the water from the big jug into the small one, and then empty the small one again."
    assert [loop.kind for loop in watch("\n".join(f"{n}. {step}" for n in range(60)))] == ["variants"]
    assert watch("\n".join(f"Try number {n} of the list, which is not it either." for n in range(150))) == []
    assert [loop.kind for loop in watch("\n".join(f"Try number {n} of the list, not it." for n in range(900)))] != []


def test_the_same_step_with_other_numbers_and_names_is_a_loop_of_variants() -> None:
    rng = random.Random(1)
    step = "Wait, maybe I should consider that {} goes first and takes {} of them, "
    step += "but then the others would be left alone again. "
    names = ["Anna", "Boris", "Clara", "David"]
    text = "I start with an idea.\n\n" + "\n\n".join(
        step.format(rng.choice(names), rng.randint(2, 9)) for _ in range(12)
    )
    loops = watch(text)
    assert [loop.kind for loop in loops] == ["variants"]
    assert loops[0].period is not None
    assert 20 <= loops[0].period <= 40
    assert loops[0].start < 60


@pytest.mark.parametrize("statement", ["So the answer is 17.", "This gives \\boxed{17} again."])
def test_one_answer_stated_again_and_again_is_a_loop_of_its_candidate(statement: str) -> None:
    rng = random.Random(1)
    words = [chr(97 + a) + chr(97 + b) + chr(97 + c) for a in range(26) for b in range(26) for c in range(26)]
    text = "\n\n".join(" ".join(rng.sample(words, 30)) + f"\n\n{statement}\n" for _ in range(12))
    loops = watch(text)
    assert [loop.kind for loop in loops] == ["candidate"]
    assert loops[0].score == 12
    assert "'17' was stated 12 times" in loops[0].evidence


def test_doubt_after_doubt_without_a_new_word_is_a_loop() -> None:
    rng = random.Random(1)
    words = list("abcdefghijklmnop")
    text = " ".join(words) + "\n\n" + "\n\n".join(f"Wait, {' '.join(rng.sample(words, 6))}." for _ in range(60))
    assert "doubts" in [loop.kind for loop in watch(text)]


def test_doubts_that_put_known_words_together_anew_or_lie_apart_are_no_loop() -> None:
    rng = random.Random(1)
    words = [chr(97 + a) + chr(97 + b) for a in range(26) for b in range(26)]
    anew = " ".join(words) + "\n\n" + "\n\n".join(f"Wait, {' '.join(rng.sample(words, 6))}." for _ in range(60))
    assert watch(anew) == []
    pairs = iter(rng.sample([f"{a} {b}" for a in words for b in words], 240))
    apart = "\n\n".join(
        f"{' '.join(next(pairs) for _ in range(6))}.\n\nWait, no, that is not right." for _ in range(40)
    )
    assert watch(" ".join(words) + "\n\n" + apart) == []


def test_a_conclusion_may_repeat_the_thinking_but_only_once() -> None:
    rng = random.Random(1)
    words = [chr(97 + a) + chr(97 + b) for a in range(26) for b in range(26)]
    thinking = " ".join(rng.sample(words, 100))
    conclusion = f"\n\n**Final Answer**\n\n{thinking}"
    assert watch(thinking + conclusion) == []
    assert [loop.kind for loop in watch(thinking + 2 * conclusion)] == ["variants"]
    assert [loop.kind for loop in watch(f"{thinking}\n\n{thinking}")] == ["variants"]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("cycle_margin", -1, "cycle_margin is -1, expected 0 to 4096"),
        ("soon_limit", 0, "soon_limit is 0, expected 1 to 10000"),
        ("near_limit", 0, "near_limit is 0, expected 1 to 10000"),
        ("far_limit", 0.5, "far_limit is 0.5, expected 1 to 10000"),
        ("n_candidates", 1, "n_candidates is 1, expected 2 to"),
        ("n_doubts", 1, "n_doubts is 1, expected 2 to"),
        ("candidate_tokens", 15, "candidate_tokens is 15, expected 16 to"),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, value: float, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        LoopOptions(**{name: value})


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abbbbbb Z1111.9'`|\n", max_size=160), cuts=st.lists(st.integers(0, 80), max_size=20))
def test_word_templates_do_not_depend_on_how_the_text_is_cut(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole, pieces = TemplateReader(), TemplateReader()
    expected = list(whole.feed(text + "\n"))
    found = [word for a, b in itertools.pairwise(places) for word in pieces.feed(text[a:b])]
    assert found + list(pieces.feed("\n")) == expected


def test_memory_stays_bounded_over_a_long_output() -> None:
    rng = random.Random(1)
    detector = LoopDetector()
    for _ in range(80_000):
        token = rng.randrange(2000)
        detector.feed(token, f" w{token}")
    assert len(detector._cycles._ids) <= 2 * _HISTORY
    assert sum(len(notes) for *_, notes in detector._cycles._levels) <= 6 * _HISTORY
    assert len(detector._variants._places) <= _HORIZON
    assert sys.getsizeof(detector._seen) < 2**22


def real_texts(shared: Path) -> list[str]:
    rows = (json.loads(row) for row in (shared / "traces" / "qwq_preview_traces.jsonl").read_text().splitlines())
    return [row["response"] for row in rows if row["finish"] != "length?"]


def test_at_most_one_real_finished_output_in_250_raises_an_alarm(shared: Path) -> None:
    texts = real_texts(shared)
    assert sum(bool(watch(text)) for text in texts) <= max(1, len(texts) // 250)


def test_other_kinds_of_spliced_loops_are_found(shared: Path) -> None:
    texts = [text for text in real_texts(shared) if len(text) > 1500 and "```" not in text]
    for make, n_repetitions in ((renamed, 15), (doubting, 20), (restating, 15)):
        loops = [watch(make(texts, seed=seed, n_repetitions=n_repetitions) + "\n") for seed in range(5000, 5020)]
        assert sum(map(bool, loops)) >= 18, make.__name__


def test_spliced_loops_of_held_apart_seeds_are_found(shared: Path) -> None:
    texts = [text for text in real_texts(shared) if len(text) > 1500 and "```" not in text]
    # Limits were chosen with seeds below 1,000.
    splices = [splice(texts, seed=seed) for seed in range(5000, 5060)]
    found = sum(bool(watch(each.text(15))) for each in splices)
    assert found >= 0.85 * len(splices)
