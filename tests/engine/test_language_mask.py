"""The language guard: what it masks on the small and on the real vocabulary, and what quotations let through."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.engine.detokenizer import Pieces
from qwq_mlx.engine.logits_processors.language_mask import QUOTED, LanguageMask, LanguageTables, home_scripts
from qwq_mlx.engine.logits_processors.penalties import LogitBias
from qwq_mlx.errors import OptionError
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.reasoning.scripts import scripts_of
from qwq_mlx.trace.trace import Trace

# Marks and what is between them, found the slow way: no mark within, one line, no straight mark behind a letter.
_QUOTED = re.compile(
    r"""(?<![A-Za-z0-9\\])"[^"\n]*("|$)|“[^”\n]*(”|$)|「[^」\n]*(」|$)|«[^»\n]*(»|$)"""
    r"""|(?<![A-Za-z0-9\\])\([^)\n]*(\)|$)|(?<![A-Za-z0-9\\])`[^`\n]*(`|$)""",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def real(real_tokenizer: LoadedTokenizer) -> Pieces:
    return Pieces(real_tokenizer)


@pytest.fixture(scope="module")
def english(real: Pieces) -> LanguageTables:
    return LanguageTables(real, home_scripts("How many r in strawberry?"))


def ids_of(pieces: Pieces, text: str) -> list[int]:
    ids: list[int] = pieces._backend.encode(text, add_special_tokens=False).ids
    return ids


def masked_ids(pieces: Pieces, guard: LanguageTables, text: str) -> list[int]:
    """The ids of a text that a run with this guard could not have drawn, each behind all before it."""
    mask, ids, logits = LanguageMask(guard), ids_of(pieces, text), mx.zeros((1, pieces.n_ids))
    tokens = mx.array(ids, mx.uint32)
    masked = [mask(tokens[:n], logits)[0, token_id].item() for n, token_id in enumerate(ids)]
    return [token_id for token_id, value in zip(ids, masked, strict=True) if value == -math.inf]


def masked(pieces: Pieces, guard: LanguageTables, text: str) -> str:
    return b"".join(pieces[token_id] for token_id in masked_ids(pieces, guard, text)).decode(errors="replace")


@pytest.mark.parametrize(
    "text",
    [
        "Wait, no: x² + 3 ≤ 4π, so α = 0.5 → “done” ✓ 🧮 👩‍👩‍👧 naïve Gödel … € \t\n",
        "def f(x):\n    return {'a': [1, 2]}  # ok",
        "\\[ \\boxed{\\frac{1}{2}} \\]<|im_end|>",
        'The word "思考" means to think, 「龘」 is rare, «потому» is Russian and `变量` is a name.',
        "So “所以答案是三” means the answer is three; ‘да’ and 'да' are yes, and Li Ming (李明) is a name（名字）.",
        "Then \\(速度 = 5\\), \\[时间 = 3\\] and $距离 = 15$.",
    ],
)
def test_what_an_answer_to_an_english_question_may_hold(real: Pieces, english: LanguageTables, text: str) -> None:
    assert masked(real, english, text) == ""


@pytest.mark.parametrize("text", ["所以答案是", "龘", "とても", "그래서", "потому", "لأن", "ดังนั้น", "כי", "क्योंकि"])
def test_what_it_may_not_hold(real: Pieces, english: LanguageTables, text: str) -> None:
    foreign = {each for each in ids_of(real, text) if english.foreign[each]}
    assert foreign, text
    for before, after in (("", ""), ("It is ", "."), ('"x" ', ""), ('5" of ', ""), ("don't ", ""), ("“a\n", "”")):
        assert masked(real, english, f"{before}{text}{after}") != "", before
    assert 0.15 < english.foreign.mean() < 0.4


def test_the_scripts_of_the_question_are_at_home(real: Pieces) -> None:
    guard = LanguageTables(real, home_scripts("请用中文回答: 草莓有几个 r?"))
    assert masked(real, guard, "所以答案是三个。龘") == ""
    assert masked(real, guard, "потому") != ""
    assert masked(real, guard, "“потому”,即因为") == ""


def test_an_opening_mark_is_no_way_out_for_good(real: Pieces, english: LanguageTables) -> None:
    thought = "思考 " * (2 * QUOTED)
    n_tokens = sum(english.foreign[each] for each in ids_of(real, thought))
    for mark in ('"', "“", "$", "\\("):
        assert len(masked_ids(real, english, mark + thought)) == n_tokens - QUOTED, mark
    again = masked_ids(real, english, "“思考” " * (2 * QUOTED))
    assert len(again) == QUOTED, "closing and opening again in the same line is no way round it"
    lines = f"“{'思考。' * QUOTED}”\n" * 3
    assert masked(real, english, lines) == "", "each line has its own quotations"


def test_tokens_that_open_or_close_and_write_at_once(real: Pieces, english: LanguageTables) -> None:
    """Qwen's vocabulary has a few: they are judged letter by letter."""
    one = {text: ids_of(real, text) for text in ("」と", "（笑", "”的")}
    assert all(len(ids) == 1 for ids in one.values())
    assert masked(real, english, "（笑）") == ""
    assert masked(real, english, "「x」と") == "」と"
    assert masked(real, english, "“x”的") == "”的"


def test_marks_that_are_spread_over_tokens_quote_too(real: Pieces, english: LanguageTables) -> None:
    """ " ‹" is two tokens in Qwen's vocabulary; any mark may come in pieces."""
    by_bytes = {real[each]: each for each in range(real.n_ids - 1, -1, -1)}
    thought = ids_of(real, "思考")

    def masked_of(parts: list[bytes]) -> list[bool]:
        """Whether a run could not have drawn "思考" behind these pieces, and behind a space more."""
        found = []
        for more in ([], [b" "]):
            ids = [by_bytes[part] for part in (*parts, *more)]
            fed, at_once = LanguageMask(english), LanguageMask(english)
            at_once.start([], ids)
            behind = [mask(mx.array(ids, mx.uint32), mx.zeros((1, real.n_ids))) for mask in (fed, at_once)]
            assert mx.array_equal(*behind)
            found.append(behind[0][0, thought[0]].item() == -math.inf)
        return found

    assert len(ids_of(real, " ‹")) == 2
    n_cut = 0
    for opening, closing in ("“”", "‘’", "„“", "「」", "『』", "«»", "‹›", "《》", "（）"):
        for mark, before, is_masked in ((opening, b"", False), (closing, opening.encode(), True)):
            raw = mark.encode()
            for cuts in ([1], [2], [1, 2]) if len(raw) == 3 else ([1],):
                parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
                if all(part in by_bytes for part in parts):
                    n_cut += 1
                    assert masked_of([before, *parts] if before else parts) == [is_masked] * 2, (mark, cuts)
    assert n_cut > 30
    # what only begins like a mark opens nothing: "…", a broken byte, and a mark's end alone
    for parts in (
        [b"\xe2\x80", b"\xa6"],
        [b"\xe2\x80", b"a"],
        [b"\x9c"],
        [b"\xe3\x80", b"\xe3\x80"],
        [b"\xe2", b"\x9c"],
    ):
        if all(part in by_bytes for part in parts):
            assert masked_of(parts) == [True, True], parts
    assert masked_of([b"\xe3\x80", b"\xe3\x80", b"\x8c"]) == [False, False], "the second beginning counts"


def test_where_qwq_really_drifted_the_guard_masks_it(real: Pieces, english: LanguageTables, shared: Path) -> None:
    n_drifts = 0
    for row in (shared / "traces" / "qwq_preview_traces.jsonl").read_text().splitlines():
        trace = json.loads(row)
        if re.search("[一-鿿]", trace["prompt"]) or not (found := re.search("[一-鿿]+", trace["response"])):
            continue
        n_drifts += 1
        ids, mask = ids_of(real, trace["response"][: found.start()]), LanguageMask(english)
        mask.start([], ids)
        allowed = mask(mx.array(ids, mx.uint32), mx.zeros((1, real.n_ids)))
        assert allowed[0, ids_of(real, found[0])[0]].item() == -math.inf, trace["id"]
    assert n_drifts == 4


@pytest.mark.parametrize("seed", [0])
def test_whatever_is_drawn_foreign_letters_are_quoted_and_both_ways_to_the_state_agree(
    real: Pieces, english: LanguageTables, seed: int
) -> None:
    random = np.random.default_rng(seed)
    marks = ['"', ' "', "“", "”", "「", "」", "«", "»", " (", ")", "`", "\n", " a", "b", "，", ' "(']
    offered = [ids_of(real, mark)[0] for mark in marks]
    offered += random.choice(np.flatnonzero(english.foreign), 40, replace=False).tolist()
    chances = mx.full((real.n_ids,), -math.inf)
    chances[mx.array(offered)] = 0.0
    chances[ids_of(real, "b")[0]] = 2.0
    mask, ids = LanguageMask(english), list[int]()
    for place in range(160):
        tokens, at_once = mx.array(ids, mx.uint32), LanguageMask(english)
        at_once.start([], ids)
        allowed = mask(tokens, chances[None])
        assert mx.array_equal(allowed, at_once(tokens, chances[None]))
        ids.append(int(mx.random.categorical(allowed[0], key=mx.random.key(1000 * seed + place)).item()))
    text = b"".join(real[each] for each in ids).decode(errors="ignore")
    assert len(scripts_of(text)) > 3, "foreign letters came"
    assert not set(scripts_of(_QUOTED.sub("", text))) - home_scripts("x"), text


@pytest.mark.parametrize(
    ("piece", "home", "is_foreign"),
    [
        (b"\xe6", "x", True),  # begins U+6000 to U+6FFF, all Han
        (b"\xe6\xb0", "x", True),
        (b"\xe6\xb0", "水", False),
        (b"\xe2", "x", False),  # begins dashes, quotation marks, arrows
        (b"\xe2\x80", "x", False),
        (b"\xf0\x9f", "x", False),  # begins most emoji
        (b"\xd0", "x", True),  # begins Cyrillic
        (b"\xd0", "да", False),
        (b"\xce", "x", False),  # begins Greek, which formulas use
        (b"\xc3", "x", False),  # begins é, ü ...
        (b"\x80\xb0", "x", False),  # goes on with a character, begins none
        (b"ab\xed\x95", "x", True),  # begins Hangul behind Latin text
        (b"", "x", False),
    ],
)
def test_a_token_that_begins_a_character_is_judged_by_what_it_can_become(
    piece: bytes, home: str, is_foreign: bool, tiny_checkpoint: Path
) -> None:
    pieces = Pieces(load_tokenizer(tiny_checkpoint, vocab_size=320))
    pieces._known = dict.fromkeys(range(pieces.n_ids), b"a") | {7: piece}
    guard = LanguageTables(pieces, home_scripts(home))
    assert np.flatnonzero(guard.foreign).tolist() == ([7] if is_foreign else [])
    allowed = LanguageMask(guard)(mx.array([], mx.uint32), mx.zeros((1, pieces.n_ids)))
    assert (allowed[0] == -mx.inf).tolist() == guard.foreign.tolist()


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


@pytest.mark.tiny
def test_a_guarded_run_writes_no_foreign_letters_and_an_unguarded_one_reports_them(reasoner: Reasoner) -> None:
    def generate(*, language_guard: bool) -> Trace:
        # only the three bytes of 水, a letter and, seldom, the line break: lines of Chinese and of broken characters
        strength = {b"\xe6": 2.0, b"\xb0": 2.0, b"\xb4": 2.0, b"a": 0.0, b"\n": -1.0}
        bias = {i: strength.get(reasoner.pieces[i], float("-inf")) for i in range(reasoner.pieces.n_ids)}
        return reasoner.generate(
            "x",
            sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=2, logit_bias=bias),
            limits=Limits(max_tokens=200, language_guard=language_guard),
            thinking=Thinking(on_loop="off"),
        )

    free, guarded = generate(language_guard=False), generate(language_guard=True)
    assert scripts_of(free.text).get("Han", 0) > 2
    switches = [event for event in free.events if event["event"] == "switch"]
    assert switches and all(event["scripts"].get("Han") for event in switches)
    for event in switches:
        line = "".join(reasoner.decode(list(free.ids[event["start"] : event["end"]])))
        assert scripts_of(line).get("Han") and event["start"] <= event["at"] < event["end"]
    assert "Han" not in scripts_of(guarded.text) and guarded.events == ()


def quoting(reasoner: Reasoner, *, language_guard: bool = True, seed: int = 2, n: int = 200) -> Stream:
    """A run that writes only the three bytes of 水, a letter, quotation marks and line breaks."""
    strength = {b"\xe6": 2.0, b"\xb0": 2.0, b"\xb4": 2.0, b"a": 0.0, b"\n": -1.0, b'"': 0.5}
    bias = {i: strength.get(reasoner.pieces[i], float("-inf")) for i in range(reasoner.pieces.n_ids)}
    return reasoner.stream(
        "x",
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed, logit_bias=bias),
        limits=Limits(max_tokens=n, language_guard=language_guard),
        thinking=Thinking(on_loop="off"),
    )


@pytest.mark.tiny
def test_a_guarded_run_quotes_foreign_letters_and_goes_on_the_same_from_anywhere(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    run = quoting(reasoner)
    steps = list(run)
    text = run.trace().text
    assert scripts_of(text).get("Han", 0) > 2 and "Han" not in scripts_of(_QUOTED.sub("", text))
    unguarded = quoting(reasoner, language_guard=False)
    list(unguarded)
    assert "Han" in scripts_of(_QUOTED.sub("", unguarded.trace().text))
    is_open = [steps[n].text == '"' for n in range(len(steps))]
    half, first = quoting(reasoner), []
    for cut in (is_open.index(True) + 1, is_open.index(True) + 3, 120):
        first += [next(half) for _ in range(cut - len(first))]
        half.save(tmp_path / "run")
        assert first + list(reasoner.resume(tmp_path / "run")) == steps
        forked = half.fork(at=cut, seed=2)
        assert first + list(forked) == steps, "the same seed draws the same"


@pytest.mark.tiny
def test_a_bias_that_leaves_nothing_beside_the_guard_is_refused(tiny_checkpoint: Path) -> None:
    pieces = Pieces(load_tokenizer(tiny_checkpoint, vocab_size=320))
    guard = LanguageTables(pieces, home_scripts("x"))
    ours = {i: -math.inf for i in range(pieces.n_ids) if not guard.foreign[i]}
    LogitBias(ours, n_ids=pieces.n_ids)
    with pytest.raises(OptionError, match="logit_bias bans every id that the language guard allows, so nothing could"):
        LogitBias(ours, n_ids=pieces.n_ids, masked=guard.foreign.tolist())
