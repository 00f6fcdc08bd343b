"""The tokenizer of a folder: the same ids as transformers', and every folder without a usable one is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import LoadError, SourceError
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer

TEXTS = (
    "",
    "How many r in strawberry?",
    "1 + 2 * 3 = 479\n\n\tdef f(x):\r\n    return x  \n",
    "Grüße, 中文 and русский, é vs e\u0301, שלום, 👩‍👩‍👧 \x00 \u200d\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n",
)


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """The tokenizer files of the tiny checkpoint, to be damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path / name)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_ids_are_those_of_transformers_own_loader(tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ours = load_tokenizer(tiny_checkpoint, vocab_size=320)
    for text in TEXTS:
        assert ours.hf.encode(text) == theirs.encode(text)
    ids = list(range(ours.n_ids))
    assert ours.hf.decode(ids) == theirs.decode(ids)
    assert ours.added == theirs.get_added_vocab()
    assert ours.eos_id == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template


def test_the_real_tokenizer_gives_the_ids_of_transformers(
    shared: Path, official_tokenizer: Any, real_tokenizer: LoadedTokenizer
) -> None:
    theirs, ours = official_tokenizer, real_tokenizer
    assert (ours.n_ids, ours.eos_id, len(ours.added)) == (151_665, 151_645, 22)
    assert set(ours.special) == set(theirs.all_special_tokens)
    for text in (*TEXTS, (shared / "qwq" / "FACTS.md").read_text()):
        assert ours.hf.encode(text) == theirs.encode(text)


def test_the_plain_tokenizer_gives_the_same_ids_and_knows_no_added_token(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint, vocab_size=320)
    for text in TEXTS[:-1]:
        assert tokenizer.plain.encode(text, add_special_tokens=False).ids == tokenizer.hf.encode(text)
    ids = tokenizer.plain.encode(TEXTS[-1], add_special_tokens=False).ids
    assert set(ids).isdisjoint(tokenizer.added.values())
    assert tokenizer.hf.decode(ids) == TEXTS[-1]


def test_truncation_and_padding_in_the_file_change_no_prompt(folder: Path) -> None:
    before = load_tokenizer(folder, vocab_size=320).hf.backend_tokenizer.encode("wait, wait").ids
    strategy = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    edit(folder / "tokenizer.json", lambda value: value.update(truncation=strategy, padding=padding))
    tokenizer = load_tokenizer(folder, vocab_size=320)
    assert tokenizer.hf.backend_tokenizer.encode("wait, wait").ids == before
    assert len(before) > 3


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"tokenizer\.json: there is no such file, .* Copy tokenizer\.json and"):
        load_tokenizer(folder, vocab_size=320)


def test_the_settings_file_may_be_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder, vocab_size=320)
    assert (tokenizer.eos_id, tokenizer.chat_template) == (None, None)


def test_ids_beyond_the_embedding_are_refused(folder: Path) -> None:
    n_ids = load_tokenizer(folder, vocab_size=320).n_ids
    with pytest.raises(LoadError, match=rf"the largest id is {n_ids - 1}, the model's embedding has {n_ids - 1} rows"):
        load_tokenizer(folder, vocab_size=n_ids - 1)


def test_an_empty_vocabulary_is_refused(folder: Path) -> None:
    def empty(value: dict[str, Any]) -> None:
        value["model"]["vocab"], value["model"]["merges"], value["added_tokens"] = {}, [], []

    edit(folder / "tokenizer.json", empty)
    with pytest.raises(LoadError, match=r"tokenizer\.json: the vocabulary is empty"):
        load_tokenizer(folder, vocab_size=320)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "<!DOCTYPE html>"])
def test_a_damaged_tokenizer_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(
        LoadError, match=r"tokenizer\.json: not a tokenizer that this version of tokenizers can read \("
    ):
        load_tokenizer(folder, vocab_size=320)


def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value.update(eos_token="</s>"))
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: eos_token is '</s>', which tokenizer\.json does not"):
        load_tokenizer(folder, vocab_size=320)


def test_an_end_token_may_be_written_as_an_object(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value.update(eos_token={"content": "<|endoftext|>"}))
    tokenizer = load_tokenizer(folder, vocab_size=320)
    assert tokenizer.eos_id == tokenizer.added["<|endoftext|>"]


@pytest.mark.parametrize("change", [{"9": {"content": "<|im_end|>"}}, {"300": {"content": "<think>"}}, {"9": 4}])
def test_added_tokens_on_which_the_two_files_disagree_are_refused(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value["added_tokens_decoder"].update(change))
    with pytest.raises(
        LoadError,
        match=r"the added token .* (has the id \d+, tokenizer\.json says \d+\. Copy|is not in tokenizer\.json, which)",
    ):
        load_tokenizer(folder, vocab_size=320)


def test_the_template_file_wins_over_the_settings(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("of the file")
    assert load_tokenizer(folder, vocab_size=320).chat_template == "of the file"


def test_the_older_template_file_is_read_where_there_is_no_other(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the older file"}))
    assert load_tokenizer(folder, vocab_size=320).chat_template != "of the older file"
    edit(folder / "tokenizer_config.json", lambda value: value.pop("chat_template"))
    assert load_tokenizer(folder, vocab_size=320).chat_template == "of the older file"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(LoadError, match=r"chat_template\.json: chat_template is int, expected a text"):
        load_tokenizer(folder, vocab_size=320)


def test_of_several_named_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    edit(folder / "tokenizer_config.json", lambda value: value.update(chat_template=named))
    assert load_tokenizer(folder, vocab_size=320).chat_template == "b"


def test_a_template_that_is_no_text_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value.update(chat_template=7))
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: chat_template is int, expected a text"):
        load_tokenizer(folder, vocab_size=320)


def test_damaged_settings_are_refused_by_name(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: holds a JSON list, expected an object\. Copy it"):
        load_tokenizer(folder, vocab_size=320)


def test_a_template_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ a }}\xff")
    with pytest.raises(LoadError, match=r"chat_template\.jinja: is not UTF-8 \(byte 7\)"):
        load_tokenizer(folder, vocab_size=320)


def test_a_template_that_is_a_fifo_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(LoadError, match=r"chat_template\.jinja: is not a regular file"):
        load_tokenizer(folder, vocab_size=320)


def test_a_template_too_large_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(LoadError, match=r"chat_template\.jinja: has 2,097,152 bytes, expected at most 1,048,576"):
        load_tokenizer(folder, vocab_size=320)


def test_a_template_that_cannot_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(LoadError, match=r"tokenizer\.json: cannot be read \(Permission denied\)\. Check the folder"):
        load_tokenizer(folder, vocab_size=320)


def test_a_tokenizer_that_is_only_checked_does_not_import_transformers(tiny_checkpoint: Path) -> None:
    """It takes a second: half of what a conversion did before its first byte."""
    code = (
        "import sys; from pathlib import Path; from qwq_mlx.model.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(tiny_checkpoint)!r}), vocab_size=320); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
