"""Every damaged or malicious checkpoint folder that headers, index and config can tell, and the message it gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import safetensors_bytes, write_tiny_checkpoint
from damage import (
    CONFIG,
    FIRST,
    INDEX,
    POINTER,
    SECOND,
    Damage,
    check,
    config,
    config_text,
    index,
    move,
    only,
    point,
    replace,
    tensors,
    write,
)

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import LoadError, QwqError, SourceError
from qwq_mlx.files.checkpoint import open_checkpoint

NORM = "model.norm.weight"
SHARDS: dict[str, tuple[Damage, str]] = {
    "shard missing": (
        lambda f: (f / FIRST).unlink(),
        f"1 of 2 shards missing: {FIRST}. Fetch them from the same commit",
    ),
    "all shards missing": (only(CONFIG, INDEX), "2 of 2 shards missing: "),
    "shard short by a byte": (
        lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size - 1),
        f"{SECOND}: ends 1 byte early",
    ),
    "shard cut in half": (
        lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size // 2),
        f"{SECOND}: ends .* bytes early",
    ),
    "shard of zero length": (lambda f: os.truncate(f / FIRST, 0), f"{FIRST}: has 0 bytes, expected at least 8"),
    "shard is a FIFO": (replace(FIRST, os.mkfifo), f"{FIRST}: is a FIFO, expected a regular file"),
    "shard is a folder": (replace(FIRST, Path.mkdir), f"{FIRST}: is a folder, expected a regular file"),
    "shard is a device": (
        replace(FIRST, lambda p: p.symlink_to("/dev/zero")),
        f"{FIRST}: is a link to /dev/zero, outside",
    ),
    "shard links outside": (
        move(FIRST, "../elsewhere", link=True),
        f"{FIRST}: is a link to .*elsewhere, outside the folder",
    ),
    "shard links to a broken name": (replace(FIRST, lambda p: p.symlink_to("gone")), f"{FIRST}: is a broken link"),
    "shard links to itself": (
        replace(FIRST, lambda p: p.symlink_to(p.name)),
        f"{FIRST}: is (a link that leads nowhere|a broken link)",
    ),
    "shard is a git-lfs pointer": (write(FIRST, POINTER), f"{FIRST}: is a git-lfs pointer"),
    "shard is an HTML page": (write(FIRST, "<!DOCTYPE html>"), f"{FIRST}: is an HTML page"),
    "stale shard": (
        lambda f: shutil.copy(f / FIRST, f / "model-old.safetensors"),
        f"1 .safetensors file that {INDEX} does not name: model-old.safetensors. Remove",
    ),
    "same tensor in two shards": (
        tensors(lambda t: t.update({"model.embed_tokens.weight": ("BF16", (320, 128), bytes(81920))})),
        f"{SECOND}: tensor model.embed_tokens.weight is also in {FIRST}, expected it once",
    ),
    "shards swapped": (
        lambda f: [(f / FIRST).rename(f / "x"), (f / SECOND).rename(f / FIRST), (f / "x").rename(f / SECOND)],
        "28 in another shard|in another shard: ",
    ),
    "only PyTorch files": (
        lambda f: [only(CONFIG)(f), (f / "pytorch_model.bin").write_bytes(b"PK")],
        "expected .safetensors files, found only pytorch_model.bin, which qwq_mlx does not open",
    ),
    "no weights": (only(CONFIG, "tokenizer.json"), "expected .safetensors files, found none"),
    "several shards and no index": (
        lambda f: (f / INDEX).unlink(),
        f"2 .safetensors files \\({FIRST}, {SECOND}\\) and no {INDEX}, which says how",
    ),
    "one shard of two and no index": (
        lambda f: [(f / INDEX).unlink(), (f / FIRST).unlink()],
        f"1 .safetensors file \\({SECOND}\\) and no {INDEX}",
    ),
    "shards without a tensor": (
        lambda f: [only(CONFIG)(f), (f / "model.safetensors").write_bytes(safetensors_bytes({}))],
        "its shards hold no tensor",
    ),
    "FIFO beside the shards": (lambda f: os.mkfifo(f / "tokenizer.model"), "tokenizer.model: is a FIFO, expected"),
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), "tokenizer.json: is a git-lfs pointer"),
    "tokenizer is an HTML page": (write("tokenizer.json", "<html>"), "tokenizer.json: is an HTML page"),
    "tokenizer links outside": (
        move("tokenizer.json", "../t.json", link=True),
        "tokenizer.json: is a link to .*t.json, outside",
    ),
    "config links outside": (
        replace(CONFIG, lambda p: p.symlink_to("/etc/passwd")),
        "config.json: is a link to /etc/passwd",
    ),
}

INDEXES: dict[str, tuple[Damage, str]] = {
    "index garbage": (write(INDEX, "{nonsense"), f"{INDEX}: is not JSON"),
    "index empty": (write(INDEX, ""), f"{INDEX}: is not JSON"),
    "index a list": (write(INDEX, "[]"), f"{INDEX}: holds a JSON list, expected an object"),
    "index a pointer": (write(INDEX, POINTER), f"{INDEX}: is a git-lfs pointer"),
    "index not UTF-8": (write(INDEX, b'{"weight_map":{"\xff":1}}'), f"{INDEX}: is not UTF-8 at byte 16"),
    "index without weight_map": (write(INDEX, "{}"), "weight_map is NoneType, expected an object"),
    "weight_map a list": (write(INDEX, '{"weight_map":["a"]}'), "weight_map is list, expected an object"),
    "weight_map empty": (write(INDEX, '{"weight_map":{}}'), "weight_map is empty, expected an object"),
    "path up": (
        point(NORM, "../outside.safetensors"),
        "puts 'model.norm.weight' in '../outside.safetensors', expected the name",
    ),
    "absolute path": (point(NORM, "/etc/passwd"), "in '/etc/passwd', expected the name of a .safetensors file"),
    "backslash path": (point(NORM, "..\\x.safetensors"), "expected the name of a .safetensors file in the same folder"),
    "drive path": (point(NORM, "C:x.safetensors"), "expected the name of a .safetensors file"),
    "folder in the name": (point(NORM, "sub/x.safetensors"), "expected the name of a .safetensors file"),
    "hidden name": (point(NORM, "..safetensors"), "expected the name of a .safetensors file"),
    "name with an escape": (point(NORM, "\x1b[2J.safetensors"), r"in '\\x1b\[2J.safetensors', expected"),
    "name with NUL": (point(NORM, "a\0.safetensors"), r"in 'a\\x00.safetensors', expected"),
    "endless name": (point(NORM, "x" * 5000 + ".safetensors"), "expected the name of a .safetensors file"),
    "pickle named": (point(NORM, "pytorch_model.bin"), "in 'pytorch_model.bin', expected the name"),
    "shard a number": (point(NORM, 7), "in '7', expected the name"),
    "shard null": (point(NORM, None), "in 'None', expected the name"),
    "shard that does not exist": (
        point(NORM, "model-00003-of-00002.safetensors"),
        "1 of 3 shards missing: model-00003",
    ),
    "tensor of another shard": (
        index(lambda v: v["weight_map"].update({NORM: FIRST})),
        rf"1 in another shard: model.norm.weight \(in {SECOND}, not {FIRST}\)",
    ),
    "tensor that no shard has": (point("model.extra", FIRST), "1 in the index alone: model.extra."),
    "tensor that the index forgot": (
        index(lambda v: v["weight_map"].pop(NORM)),
        "1 in the shards alone: model.norm.weight.",
    ),
    "tensor twice": (
        lambda f: (f / INDEX).write_text(
            (f / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{ "{NORM}": "{FIRST}",')
        ),
        "is not JSON \\(key 'model.norm.weight' stands twice\\)",
    ),
    "index of another model": (
        index(lambda v: v.update(weight_map={f"h.{i}": FIRST if i else SECOND for i in range(15)})),
        "15 in the index alone: h.0, .* and 5 more. 27 in the shards alone: ",
    ),
    "index deep": (write(INDEX, '{"a":' + "[" * 200_000), f"{INDEX}: is not JSON"),
    "index too large": (write(INDEX, " " * (8 << 20) + " {}"), "expected at most 8,388,608"),
}

CONFIGS: dict[str, tuple[Damage, str]] = {
    "config missing": (lambda f: (f / CONFIG).unlink(), "config.json: there is no such file. Fetch"),
    "config garbage": (write(CONFIG, "garbage"), "config.json: is not JSON"),
    "config empty": (write(CONFIG, ""), "config.json: is not JSON"),
    "config not UTF-8": (write(CONFIG, b'{"model_type": "\xe9"}'), "config.json: is not UTF-8 at byte 16"),
    "config UTF-16": (write(CONFIG, '{"model_type": "qwen2"}'.encode("utf-16")), "config.json: is not UTF-8 at byte 0"),
    "config a list": (write(CONFIG, "[1]"), "config.json: holds a JSON list, expected an object"),
    "config a number": (write(CONFIG, "1"), "config.json: holds a JSON int, expected an object"),
    "config a pointer": (write(CONFIG, POINTER), "config.json: is a git-lfs pointer"),
    "config an HTML page": (write(CONFIG, "<!doctype html>"), "config.json: is an HTML page"),
    "config a folder": (
        replace(CONFIG, Path.mkdir),
        "config.json: is not a regular file, expected JSON",
    ),
    "config a FIFO": (replace(CONFIG, os.mkfifo), "config.json: is a FIFO, expected a regular file"),
    "config deep": (write(CONFIG, "[" * 200_000), "config.json: is not JSON"),
    "config huge": (
        write(CONFIG, '{"a":"' + "x" * (1 << 20) + '"}'),
        "config.json: has 1,048,584 bytes, expected at most",
    ),
    "config number of 5,000 digits": (
        config_text('"hidden_size": 128', '"hidden_size": ' + "1" * 5000),
        "config.json: ",
    ),
    "config NaN": (config_text("1e-05", "NaN"), "config.json: is not JSON \\(NaN is no JSON number\\)"),
    "config Infinity": (
        config_text("1000000.0", "Infinity"),
        "config.json: is not JSON \\(Infinity is no JSON number\\)",
    ),
    "config key twice": (
        config_text('"vocab_size"', '"hidden_size": 64, "vocab_size"'),
        "key 'hidden_size' stands twice",
    ),
    "model_type missing": (config(model_type=None), "model_type is None, expected 'qwen2'"),
    "another architecture": (config(model_type="llama"), "model_type is 'llama', expected 'qwen2'"),
    "hidden_size missing": (config(hidden_size=None), "hidden_size is missing"),
    "hidden_size a text": (config(hidden_size="128"), "hidden_size is '128', expected a whole number from 1 to"),
    "hidden_size zero": (config(hidden_size=0), "hidden_size is 0, expected a whole number"),
    "hidden_size negative": (config(hidden_size=-128), "hidden_size is -128"),
    "hidden_size a float": (config(hidden_size=128.0), "hidden_size is 128.0"),
    "hidden_size true": (config(hidden_size=True), "hidden_size is True"),
    "hidden_size a list": (config(hidden_size=[128]), r"hidden_size is \[128\]"),
    "hidden_size other": (config(hidden_size=256), "of another shape: lm_head.weight .320, 128., expected .320, 256."),
    "zero heads": (config(num_attention_heads=0), "num_attention_heads is 0, expected a whole number from 1"),
    "zero KV heads": (config(num_key_value_heads=0), "num_key_value_heads is 0"),
    "heads that do not divide": (
        config(num_attention_heads=3, num_key_value_heads=3),
        "hidden_size 128 is not a multiple of",
    ),
    "KV heads that do not divide": (config(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of"),
    "KV heads other": (config(num_key_value_heads=1), "self_attn.k_proj.bias .64,., expected .32,."),
    "odd head width": (config(num_attention_heads=128, num_key_value_heads=2), "head width 1 is odd"),
    "head_dim other": (config(head_dim=64), "head_dim is 64, expected hidden_size / num_attention_heads = 32"),
    "ten million layers": (
        config(num_hidden_layers=10_000_000),
        "num_hidden_layers is 10000000, expected a whole number",
    ),
    "vocabulary of 2^40": (config(vocab_size=2**40), "vocab_size is 1099511627776, expected a whole number"),
    "hidden size of 2^31": (config(hidden_size=2**31), "hidden_size is 2147483648"),
    "MLP of 2^62": (config(intermediate_size=2**62), "intermediate_size is 4611686018427387904"),
    "context of 2^50": (config(max_position_embeddings=2**50), "max_position_embeddings is 1125899906842624"),
    "a layer more than the tensors": (config(num_hidden_layers=3), "12 missing: model.layers.2.input_layernorm.weight"),
    "a layer fewer than the tensors": (
        config(num_hidden_layers=1),
        "12 unknown: model.layers.1.input_layernorm.weight",
    ),
    "1,024 layers": (config(num_hidden_layers=1024), "12,264 missing: .* and 12,244 more"),
    "tied, but lm_head is there": (
        config(tie_word_embeddings=True),
        "has tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight",
    ),
    "untied, but lm_head is not there": (tensors(lambda t: t.pop("lm_head.weight")), "1 missing: lm_head.weight"),
    "tied as a text": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
    "eps zero": (config(rms_norm_eps=0), "rms_norm_eps is 0, expected a number from 1e-12 to 0.01"),
    "eps a text": (config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "eps overflows to infinity": (config_text("1e-05", "1e999"), "rms_norm_eps is inf"),
    "rope_theta negative": (config(rope_theta=-1), "rope_theta is -1, expected a number from 100 to 1e.12"),
    "rope scaling": (config(rope_scaling={"type": "ntk", "factor": 4.0}), "rope_scaling is {.*}, expected type"),
    "sliding window on": (config(use_sliding_window=True), "use_sliding_window is true, expected false"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    "end id beyond the vocabulary": (config(eos_token_id=320), "eos_token_id is 320, expected ids from 0 to 319"),
    "end id negative": (config(eos_token_id=-1), "eos_token_id is -1"),
    "end id a text": (config(eos_token_id="<|im_end|>"), "eos_token_id is '<|im_end|>'"),
    "tensor unknown": (
        tensors(lambda t: t.update({"model.backdoor": ("BF16", (2,), bytes(4))})),
        "1 unknown: model.backdoor",
    ),
    "tensor missing": (tensors(lambda t: t.pop(NORM)), "1 missing: model.norm.weight"),
    "tensor renamed": (
        tensors(lambda t: t.update({"norm": t.pop(NORM)})),
        "1 missing: model.norm.weight.*\n1 unknown: norm",
    ),
    "tensor transposed": (
        tensors(lambda t: t.update({"lm_head.weight": ("BF16", (128, 320), t["lm_head.weight"][2])})),
        r"lm_head.weight \(128, 320\), expected \(320, 128\)",
    ),
    "tensor with a row more": (
        tensors(lambda t: t.update({NORM: ("BF16", (129,), bytes(258))})),
        r"model.norm.weight \(129,\), expected \(128,\)",
    ),
}

ALL = {**SHARDS, **INDEXES, **CONFIGS}


def test_no_two_cases_have_one_name() -> None:
    assert len(ALL) == len(SHARDS) + len(INDEXES) + len(CONFIGS)
    assert len(ALL) > 80


@pytest.mark.parametrize("case", ALL)
def test_a_damaged_checkpoint_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, expected = ALL[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    check(folder)
    damage(folder)
    with pytest.raises(QwqError, match=re.compile(expected, re.DOTALL)) as error:
        check(folder)
    assert type(error.value) in (SourceError, LoadError)
    message = str(error.value)
    assert str(folder) in message
    assert len(message) < 6_000 + len(str(folder))
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", message) is None
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QwqError, match=re.compile(expected, re.DOTALL)):
        convert_checkpoint(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
IN_TEXT = ("NaN", "Infinity", "null", "true", '"128"', "[]", "{}", "0", "-1", "1.5", "2147483648", "1e999")
POSSIBLE = ("rope_theta", "2147483648")  # contexts of a million have had 4e9


@pytest.mark.parametrize("name", NUMBERS)
def test_a_config_field_of_any_wrong_kind_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    rest = json.loads((folder / CONFIG).read_text())
    del rest[name]
    for text in IN_TEXT:
        (folder / CONFIG).write_text(f'{{"{name}": {text}, {json.dumps(rest)[1:]}')
        if (name, text) == POSSIBLE:
            check(folder)
            continue
        with pytest.raises(
            QwqError, match=rf"config\.json: ({name} is |is not JSON \({re.escape(text)} is no JSON number)"
        ):
            check(folder)
    (folder / CONFIG).write_text(json.dumps(rest))
    with pytest.raises(LoadError, match=rf"config\.json: {name} is missing"):
        check(folder)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, r"nothing: there is no such folder\. Give a checkpoint's folder \(config\.json"),
        (lambda path: path.write_text("x"), "nothing: is a file, expected the folder of a checkpoint"),
        (Path.mkdir, r"nothing/config\.json: there is no such file"),
        (lambda path: path.symlink_to(path.name), r"nothing: cannot be listed \(Too many levels of symbolic links\)"),
    ],
)
def test_a_folder_that_is_none_is_said(tmp_path: Path, make: Damage, expected: str) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(SourceError, match=expected):
        open_checkpoint(tmp_path / "nothing")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The path of every file opened and every module imported, from Python's audit events."""
    events: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "import", "exec", "compile", "subprocess.Popen", "os.system"):
            events.append(f"{event} {arguments[0]!r}")

    sys.addaudithook(hook)  # cannot be removed: it looks at `active`
    yield events
    active.clear()


def test_code_beside_a_checkpoint_is_neither_run_nor_imported(tmp_path: Path, opened: list[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "evil")
    for name in ("evil.py", "modeling_qwen2.py", "sitecustomize.py", "pytorch_model.bin", "x.pth"):
        (folder / name).write_text("raise SystemExit('run')")
    config(model_file="evil.py", auto_map={"AutoModelForCausalLM": "evil.Model"})(folder)
    opened.clear()
    check(folder)
    touched = [event for event in opened if str(folder) in event]
    assert touched
    assert all(event.startswith("open ") for event in touched)
    assert not [event for event in opened if "evil" in event.replace(str(folder), "") and not event.startswith("open ")]


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_checkpoint(tmp_path / "c")
    real = Path.open

    def fail(path: Path, *arguments: Any) -> Any:
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(
        SourceError, match=r"tokenizer\.json: cannot be read \(Permission denied\)\. Check its permissions"
    ):
        open_checkpoint(folder)
