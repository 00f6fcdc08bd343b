"""Good texts of regular shape raise no alarm, and texts without end that bring nothing new raise one in time.

regular_texts.jsonl holds 224 good ones (matrices, tables, code, number sequences, proofs by cases, songs, Chinese,
logs): id, origin and text, and the question where it bounds how long the text may be. small_model_outputs.jsonl holds
what Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), converted to 4 bits by this package, wrote to ordinary questions with its
own sampling, at most 420 tokens each; none goes round in a loop by a reader's judgement.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from splices import PIECE

from qwq_mlx.reasoning.loops import Loop, LoopDetector

Cutter = Callable[[str], tuple[Sequence[int], Sequence[str]]]
DATA = Path(__file__).parent / "regular_texts.jsonl"
REGULAR = [json.loads(row) for row in DATA.read_text(encoding="utf-8").splitlines()]
SMALL_MODEL = DATA.with_name("small_model_outputs.jsonl").read_text(encoding="utf-8").splitlines()
EMOJI = [chr(0x1F600 + at) for at in range(25)]
WORDS = ("then", "so", "thus", "we", "check", "again", "this", "result", "is", "right", "the", "case")
HAN = ("然后", "所以", "因此", "我们", "再", "检查", "一遍", "这个", "结果", "是", "对", "的")
PHRASES = ("Check the condition again.", "Verify the last result.", "Look at the base case.")


def by_words(text: str) -> tuple[list[int], list[str]]:
    ids = dict[str, int]()
    pieces = PIECE.findall(text)
    return [ids.setdefault(piece, len(ids)) for piece in pieces], pieces


@pytest.fixture(params=["words", "tokens"])
def cut(request: pytest.FixtureRequest) -> Cutter:
    """Word-like pieces, and the tokens of Qwen2.5 where its tokenizer is at hand."""
    if request.param == "words":
        return by_words
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer.from_file(str(request.getfixturevalue("shared") / "qwq/tokenizer/tokenizer.json"))

    def by_tokens(text: str) -> tuple[list[int], list[str]]:
        encoded = model.encode(text, add_special_tokens=False)
        ends = [end for _, end in encoded.offsets]
        return encoded.ids, [text[a:b] if b > a else "" for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    return by_tokens


def first_loop(ids: Sequence[int], texts: Sequence[str], question: str = "") -> tuple[int, Loop] | None:
    """The number of tokens at the first report, and the report."""
    detector = LoopDetector(question=question)
    for n_tokens, (token_id, text) in enumerate(zip(ids, texts, strict=True), 1):
        loop = detector.feed(token_id, text)
        if loop is not None:
            return n_tokens, loop
    return None


def test_no_regular_text_raises_an_alarm(cut: Cutter) -> None:
    alarms = {}
    for row in REGULAR:
        loop = first_loop(*cut(row["text"]), question=row.get("question", ""))
        if loop is not None:
            alarms[row["id"]] = loop
    assert alarms == {}
    assert len(REGULAR) >= 200


def test_no_output_of_a_small_real_model_raises_an_alarm(cut: Cutter) -> None:
    outputs = [json.loads(line) for line in SMALL_MODEL]
    assert [each["question"] for each in outputs if first_loop(*cut(each["text"]), question=each["question"])] == []
    assert len(outputs) >= 34


def draws(words: Sequence[str], n: int, between: str) -> str:
    rng = random.Random(1)
    return between.join(rng.choice(words) for _ in range(n))


ENDLESS = {
    "1. Adjective": "\n".join(f"{n}. Adjective" for n in range(1, 400)),
    "Step N: Check the number.": "\n".join(f"Step {n}: Check the number." for n in range(1, 400)),
    "- **Step N:** the same": "\n".join(f"- **Step {n}:** Check it again." for n in range(1, 400)),
    "one of three phrases": "\n".join(f"{n}. {phrase}" for n, phrase in enumerate(draws(PHRASES, 300, "|").split("|"))),
    "25 emoji": draws(EMOJI, 800, " "),
    "25 emoji, one a line": draws(EMOJI, 800, "\n"),
    "12 words": draws(WORDS, 800, " "),
    "12 words in Chinese": draws(HAN, 800, ""),
    "one word": "hello " * 400,
    "digits": draws("0123456789", 800, ""),
    "digits in groups": draws([f"{n:04}" for n in range(0, 10_000, 7)], 400, " "),
    "one line of a poem": "春天的风吹过田野，花儿开放。\n" * 60,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_without_end_and_without_news_is_found_within_400_tokens(cut: Cutter, name: str) -> None:
    before = "We look for a pattern in the list and note what repeats.\n\n"
    n_before = len(cut(before)[0])
    loop = first_loop(*cut(before + ENDLESS[name]))
    assert loop is not None
    assert loop[0] - n_before <= 400
    assert loop[1].kind in ("cycle", "variants")


def test_numbered_rows_of_two_draws_are_found_within_1_200_tokens(cut: Cutter) -> None:
    """Of 300 combinations most rows are new for long; labels, which are alike in every row, once hid it for 3,000."""
    rng = random.Random(1)
    text = "\n".join(f"{n}. {rng.choice(EMOJI)} {rng.choice(WORDS)}" for n in range(1, 400))
    loop = first_loop(*cut(text))
    assert loop is not None
    assert loop[0] <= 1200


def test_a_fraction_in_the_question_does_not_say_how_long_a_product_may_be(cut: Cutter) -> None:
    """A real 1.5B went on so to its limit of 1,024 tokens."""
    question = (
        "Find the positive integer solution to \\[\\frac{x + 3}{9(x + 4)} - \\frac{2(x - 7)}{13} = \\frac{92}{585}.\\]"
    )
    before = "We start with\n\\[\n\\frac{x + 3}{9(x + 4)} = \\frac{2 \\cdot 465}{5 "
    loop = first_loop(*cut(before + "\\cdot 3 " * 300), question=question)
    assert loop is not None and loop[1].kind == "cycle"
    assert loop[0] - len(cut(before)[0]) <= 440


@pytest.mark.parametrize(
    "text", ["0" * 4000, "[" + "0, " * 2000, "0 0 0 0 0 0 0 0\n" * 300, "| | | | |\n" * 300, "```\n" + "x += 1\n" * 300]
)
def test_numbers_and_cells_without_end_are_found_later_than_sentences_but_within_2_200_tokens(text: str) -> None:
    loop = first_loop(*by_words(text))
    assert loop is not None
    assert loop[1].kind == "cycle"
    assert 380 < loop[0] < 2200


@pytest.mark.parametrize(
    ("letters", "between", "n_tokens", "what"),
    [
        ("0123456789", "", 400, "one number or word"),
        ("0123456789", " ", 400, "one number or word"),
        ("0123456789abcdefABCDEF+/", "", 400, "one number or word"),
        ("0123456789", ",", 1025, "numbers and marks on one line"),
    ],
)
def test_digits_and_letters_in_no_order_are_found(letters: str, between: str, n_tokens: int, what: str) -> None:
    text = draws(letters, 4000, between)
    loop = first_loop([ord(each) for each in text], list(text))
    assert loop is not None
    assert (loop[0], loop[1].kind) == (n_tokens, "variants")
    assert loop[1].evidence == f"the last {n_tokens:,} tokens are {what}, in no order"
    assert first_loop([ord(each) for each in text[:1000]], list(text[:1000]), "Write 1,000 of them.") is None


@pytest.mark.parametrize(
    ("question", "n_tokens"),
    [("Write the digit 0 for ever.", 400), ("Write 1,000 zeros.", 1003), ("The sum is 10^999999?", 400)],
)
def test_the_largest_number_in_the_question_says_how_long_a_number_may_be(question: str, n_tokens: int) -> None:
    loop = first_loop(*by_words("0" * 3000), question=question)
    assert loop is not None
    assert loop[0] == n_tokens


def test_code_and_open_brackets_are_no_sentences_but_a_blank_line_ends_them() -> None:
    line = "print(total)\n"
    for text, is_soon in ((f"```\n{line * 60}", False), (line * 60, True), ("\\[ x = 3 \\]\n\n" * 40, True)):
        loop = first_loop(*by_words(text))
        assert (loop is not None) == is_soon
