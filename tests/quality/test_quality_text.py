"""Texts become windows: which ids count, what is left out, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import OptionError
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer
from qwq_mlx.pocket import FOLDER as POCKET
from qwq_mlx.quality import text
from qwq_mlx.quality.text import QualityText, bundled_text, read_text

WORDS = "Wait, the answer is so and so. " * 80


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> LoadedTokenizer:
    return load_tokenizer(tiny_checkpoint, vocab_size=320)


def read(path: Path, folder: Path, tokenizer: LoadedTokenizer, **options: Any) -> QualityText:
    return read_text(path, tokenizer, open_model_folder(folder).config, **options)


def test_plain_text_is_cut_into_windows_and_every_id_but_the_first_counts(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: LoadedTokenizer
) -> None:
    path = tmp_path / "essay.txt"
    path.write_text(WORDS + "<|im_end|>")
    ids = encode_text(tokenizer, WORDS + "<|im_end|>")
    assert not set(ids) & set(tokenizer.added.values())
    found = read(path, tiny_checkpoint, tokenizer)
    assert [token for window in found.windows for token in window.ids] == ids
    assert [len(window.ids) for window in found.windows] == [512, len(ids) - 512]
    assert (found.n_positions, found.n_tokens, found.n_left_out) == (len(ids), len(ids) - 2, 0)
    assert (found.name, found.sha256) == ("essay.txt", hashlib.sha256(path.read_bytes()).hexdigest())
    cut = read(path, tiny_checkpoint, tokenizer, n_positions=600)
    assert [len(window.ids) for window in cut.windows] == [512, 88]
    assert cut.n_left_out == len(ids) - 600


def test_of_a_conversation_only_the_reply_and_its_end_count(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: LoadedTokenizer
) -> None:
    path = tmp_path / "talk.jsonl"
    pairs = [("How many?", "Seven, <|im_end|> I think. " * 3), ("And now?", "Eight.")]
    path.write_text("\n\n".join(json.dumps({"question": q, "reply": r}) for q, r in pairs))
    found = read(path, tiny_checkpoint, tokenizer)
    for window, (question, reply) in zip(found.windows, pairs, strict=True):
        prompt = prompt_ids(tokenizer, question, context=10_000)
        assert list(window.ids[: window.first]) == prompt
        assert list(window.ids[window.first :]) == [*encode_text(tokenizer, reply), tokenizer.eos_id]
    # a window that ends inside its prompt has nothing to measure and is left out whole
    first = len(found.windows[0].ids)
    short = read(path, tiny_checkpoint, tokenizer, n_positions=first + found.windows[1].first)
    assert (len(short.windows), short.n_left_out) == (1, len(found.windows[1].ids))


def test_windows_are_no_longer_than_the_models_context(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    from checkpoints import write_tiny_checkpoint

    folder = write_tiny_checkpoint(tmp_path / "short", max_position_embeddings=100)
    path = tmp_path / "essay.txt"
    path.write_text(WORDS)
    assert max(len(window.ids) for window in read(path, folder, tokenizer).windows) == 100


def test_a_model_without_a_template_gets_the_question_as_text(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder, vocab_size=320)
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"question": "Why?", "reply": WORDS}))
    window = read(path, folder, tokenizer).windows[0]
    assert list(window.ids[: window.first]) == encode_text(tokenizer, "Why?\n\n")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt: gives 0 tokens to measure, expected at least 32, better thousands\. Give a longer"),
        ("a.txt", b"Too short.", r"a\.txt: gives \d tokens to measure"),
        ("a.txt", b"good \xff bad" * 40, r"a\.txt: is not UTF-8 \(byte 5\), expected a text"),
        ("a.jsonl", b"", r"a\.jsonl: gives 0 tokens"),
        ("a.jsonl", b'\n{"question": "a"', r"a\.jsonl, line 2: is not JSON \("),
        ("a.jsonl", b'{"question": "a"}', r'line 1: is \'{"question": "a"}\', expected {"question"'),
        ("a.jsonl", b'{"question": "a", "reply": 3}', "line 1: is .* with two texts"),
        ("a.jsonl", b'{"question": " ", "reply": "b"}', "line 1: is .* with two texts"),
        ("a.jsonl", b"[1]", "line 1: holds a JSON list, expected an object"),
        ("a.jsonl", b"[" * 100_000, "line 1: is not JSON .*recursion"),
        ("a.jsonl", b'{"question": "\\ud800", "reply": "b"}', "line 1: holds the lone surrogate U.D800"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: LoadedTokenizer, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(OptionError, match=message):
        read(path, tiny_checkpoint, tokenizer)


def test_a_text_that_is_no_readable_file_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.txt: there is no such file. Give a text"):
        read(tmp_path / "nowhere.txt", tiny_checkpoint, tokenizer)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="pipe: is not a regular file, expected a text"):
        read(tmp_path / "pipe", tiny_checkpoint, tokenizer)
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    with pytest.raises(OptionError, match="31 tokens of text are asked for, expected at least 32"):
        read(path, tiny_checkpoint, tokenizer, n_positions=31)
    monkeypatch.setattr(text, "_MAX_BYTES", 100)
    with pytest.raises(OptionError, match=r"a\.txt: has 2,480 bytes, expected at most 100"):
        read(path, tiny_checkpoint, tokenizer)
    monkeypatch.undo()

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    config = open_model_folder(tiny_checkpoint).config
    monkeypatch.setattr("qwq_mlx.files.reading.open_to_read", denied)
    with pytest.raises(OptionError, match=r"a\.txt: cannot be opened \(Permission denied\)"):
        read_text(path, tokenizer, config)


def test_the_bundled_texts_fit_their_models(tiny_checkpoint: Path, tokenizer: LoadedTokenizer) -> None:
    pocket = open_model_folder(POCKET)
    own = read_text(bundled_text(pocket.config), load_tokenizer(POCKET, vocab_size=576), pocket.config)
    assert own.name == "pocket.jsonl"
    assert own.n_tokens > 1_000
    other = read_text(bundled_text(open_model_folder(tiny_checkpoint).config), tokenizer, pocket.config)
    assert (other.name, other.n_positions) == ("reasoning.jsonl", text.DEFAULT_POSITIONS)


def test_the_pockets_text_is_what_its_script_writes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(repository / "scripts"), *sys.path])
    from pocket import quality_text

    from qwq_mlx.pocket.problems import is_held_out

    written = bundled_text(open_model_folder(POCKET).config).read_text(encoding="utf-8")
    assert written == "".join(f"{line}\n" for line in quality_text.lines())
    problems = [
        each for kind in ("letters", "game24") for each in quality_text.data.held_out_problems(kind, 2, seed=11)
    ]
    assert all(is_held_out(each) and each.question in written.replace('\\"', '"') for each in problems)


def test_a_limit_that_leaves_too_little_says_so(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: LoadedTokenizer
) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"question": WORDS, "reply": WORDS}))
    with pytest.raises(OptionError, match=r"gives 0 tokens .* Give a longer text, or let more tokens be run\."):
        read(path, tiny_checkpoint, tokenizer)
