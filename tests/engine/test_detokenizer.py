"""Streamed text equals the decoded whole, on a small and on the real vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tokenizer_json, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_mlx.engine.detokenizer import Pieces, StopScanner, TextStream, decode
from qwq_mlx.errors import LoadError
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder / "tokenizer.json", tokenizer_json())
    return load_tokenizer(folder, vocab_size=10_000)


@pytest.fixture(scope="module")
def real(real_tokenizer: LoadedTokenizer) -> LoadedTokenizer:
    return real_tokenizer


def reference(tokenizer: LoadedTokenizer, ids: list[int]) -> str:
    text: str = tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)
    return text


def streamed(pieces: Pieces, ids: list[int]) -> list[str]:
    stream = TextStream(pieces)
    return [*(stream.feed(token_id) for token_id in ids), stream.finish()]


def test_streamed_text_equals_the_decoded_whole_for_any_ids(tiny: LoadedTokenizer) -> None:
    pieces = Pieces(tiny)

    @settings(max_examples=300, deadline=None)
    @given(ids=st.lists(st.integers(0, tiny.n_ids - 1), max_size=60))
    def holds(ids: list[int]) -> None:
        whole = reference(tiny, ids)
        assert "".join(streamed(pieces, ids)) == whole
        assert decode(pieces, ids) == whole

    holds()


def test_streamed_text_of_any_unicode_has_no_replacement_character(tiny: LoadedTokenizer) -> None:
    pieces = Pieces(tiny)

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufffd")))
    def holds(text: str) -> None:
        ids = tiny.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        parts = streamed(pieces, ids)
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) == reference(tiny, ids)

    holds()


def test_the_real_vocabulary_streams_as_it_decodes(real: LoadedTokenizer) -> None:
    pieces = Pieces(real)
    random = np.random.default_rng(0)
    for length in (1, 2, 5, 40):
        for ids in random.integers(0, real.n_ids, (1000, length)).tolist():
            assert "".join(streamed(pieces, ids)) == reference(real, ids), ids


def test_every_id_of_the_real_vocabulary_alone_decodes_as_the_tokenizer_says(real: LoadedTokenizer) -> None:
    pieces = Pieces(real)
    expected = real.hf.backend_tokenizer.decode_batch([[i] for i in range(real.n_ids)], skip_special_tokens=False)
    assert [decode(pieces, [i]) for i in range(real.n_ids)] == expected


@pytest.mark.parametrize(
    "text", ["🧮", "é" * 3, "e\u0301\u0323", "مرحبا", "\x00a\x00", "👩‍👩‍👧", "数学", " \u200b\t\r\n "]
)
def test_characters_spread_over_tokens_appear_once_they_are_whole(tiny: LoadedTokenizer, text: str) -> None:
    ids = [i for byte in text.encode() for i in [_id_of_byte(tiny, byte)]]
    parts = streamed(Pieces(tiny), ids)
    assert "".join(parts) == text
    assert [len(part) for part in parts].count(1) == len(text)


def _id_of_byte(tokenizer: LoadedTokenizer, byte: int) -> int:
    pieces = Pieces(tokenizer)
    return next(i for i in range(tokenizer.n_ids) if pieces[i] == bytes([byte]))


def test_undecodable_bytes_are_shown_without_delay(tiny: LoadedTokenizer) -> None:
    continuation = _id_of_byte(tiny, 0x80)
    stream = TextStream(Pieces(tiny))
    # a decoder that looks at all ids since the last good character again needs an hour for this
    assert all(stream.feed(continuation) == "\ufffd" for _ in range(300_000))


def test_an_unfinished_character_at_the_end_is_one_replacement_character(tiny: LoadedTokenizer) -> None:
    ids = [_id_of_byte(tiny, byte) for byte in "🧮".encode()[:3]]
    assert streamed(Pieces(tiny), ids) == ["", "", "", "\ufffd"]
    assert reference(tiny, ids) == "\ufffd"


def test_breaker_ids_are_those_whose_text_holds_a_breaker(tiny: LoadedTokenizer) -> None:
    found = Pieces(tiny).holding(("**", "A"))
    texts = {reference(tiny, [i]) for i in found}
    assert texts == {"**", "A", " A", " An", " Ans", " Answ", " Answe", " Answer"} & texts
    assert "**" in texts and "A" in texts and all("**" in text or "A" in text for text in texts)


def test_another_decoder_is_refused(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads(json.dumps(tokenizer_json()))
    content["decoder"] = {"type": "Fuse"}
    write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(LoadError, match="the decoder is Fuse, expected ByteLevel"):
        Pieces(load_tokenizer(tmp_path, vocab_size=10_000))


def plain_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop that is completed first, the longest of those completed at one place."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3),
)
def test_stop_texts_are_found_across_parts_and_their_beginning_is_never_shown(
    parts: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown, hit = "", None
    expected, expected_hit = plain_cut("".join(parts), stops)
    for part in parts:
        released = scanner.feed(part)
        shown += released.text
        assert expected.startswith(shown)
        if released.hit is not None:
            hit = released.hit
            break
    else:
        shown += scanner.finish()
    assert (shown, hit) == (expected, expected_hit)


def test_text_that_cannot_be_a_stop_text_is_not_held_back() -> None:
    scanner = StopScanner(["END", "\n\n"])
    assert scanner.feed("so the E").text == "so the "
    assert scanner.feed("N").text == ""
    assert scanner.feed("ough\n").text == "ENough"
    assert scanner.finish() == "\n"


def test_a_long_stop_text_of_one_letter_is_matched_in_linear_work() -> None:
    scanner = StopScanner(["a" * 20_000 + "b"])
    # comparing the stop text at every place would be 2 * 10 ** 9 comparisons, minutes
    assert scanner.feed("a" * 100_000).text == "a" * 80_000
    assert scanner.feed("b").hit is not None
