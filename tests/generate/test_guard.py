"""The language guard's mask, on the small and on the real vocabulary; and switches in the Trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwq_mlx.generate.guard import foreign_ids, home_scripts
from qwq_mlx.generate.options import Limits, Sampling, Thinking
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.text import Pieces
from qwq_mlx.generate.trace import Trace
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.reasoning.language import scripts_of


@pytest.fixture(scope="module")
def real(shared: Path) -> Pieces:
    return Pieces(load_tokenizer(shared / "qwq" / "tokenizer", vocab_size=152_064))


def test_the_mask_of_an_english_question_on_the_real_vocabulary(real: Pieces) -> None:
    tokenizer = real._backend
    foreign = set(foreign_ids(real, home_scripts("How many r in strawberry?")))

    def is_writable(text: str) -> bool:
        return foreign.isdisjoint(tokenizer.encode(text, add_special_tokens=False).ids)

    for text in (
        "Wait, no: x² + 3 ≤ 4π, so α = 0.5 → “done” ✓ 🧮 👩‍👩‍👧 naïve Gödel … € \t\n",
        "def f(x):\n    return {'a': [1, 2]}  # ok",
        "\\[ \\boxed{\\frac{1}{2}} \\]<|im_end|>",
    ):
        assert is_writable(text), text
    for text in ("所以答案是", "龘", "とても", "그래서", "потому", "لأن", "ดังนั้น", "כי", "क्योंकि"):
        assert not is_writable(text), text
    assert 0.15 < len(foreign) / real.n_ids < 0.4


def test_the_scripts_of_the_question_are_at_home(real: Pieces) -> None:
    foreign = set(foreign_ids(real, home_scripts("请用中文回答: 草莓有几个 r?")))
    encode = real._backend.encode
    assert foreign.isdisjoint(encode("所以答案是三个。龘", add_special_tokens=False).ids)
    assert not foreign.isdisjoint(encode("потому", add_special_tokens=False).ids)


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
    assert foreign_ids(pieces, home_scripts(home)) == ([7] if is_foreign else [])


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
            limits=Limits(max_tokens=300, language_guard=language_guard),
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
