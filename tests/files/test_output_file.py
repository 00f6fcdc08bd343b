"""A file to be written never is an input, a model's own file, a device or a folder, whatever leads to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qwq_mlx.errors import OptionError
from qwq_mlx.files.output_file import check_output_file, check_output_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("", lambda _: None, "save is '', which is empty, expected the name of a file"),
    (".", lambda _: None, "save is .*, which is a folder"),
    ("/", lambda _: None, "save is '/', which is a folder"),
    ("folder", Path.mkdir, "save is .*folder', which is a folder"),
    ("none/file", lambda _: None, "but there is no folder .*none'. Make it first"),
    ("f" * 248, lambda _: None, "save has a name of 248 bytes, expected at most 223"),
    ("pipe", _fifo, "which is a device, a pipe or a socket"),
    ("socket", _socket, "which is a device, a pipe or a socket"),
    ("/dev/null", lambda _: None, "which is a device, a pipe or a socket"),
    ("questions.jsonl", lambda _: None, r"which is read by the same command \(.*questions\.jsonl\)"),
    ("hard", lambda path: path.hardlink_to(path.parent / "questions.jsonl"), "which is read by the same command"),
    ("soft", lambda path: path.symlink_to("questions.jsonl"), "which is read by the same command"),
    ("model/model.safetensors", lambda _: None, "which lies in the model's folder"),
    ("model/new", lambda _: None, "which lies in the model's folder"),
    ("model/deep/new", lambda _: None, "which lies in the model's folder"),
    ("way", lambda path: path.symlink_to("model/model.safetensors"), "which lies in the model's folder"),
]


@pytest.mark.parametrize(("name", "prepare", "message"), BAD, ids=[name[:20] or "empty" for name, _, _ in BAD])
def test_what_must_not_be_written_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    name: str,
    prepare: Callable[[Path], object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("{}\n")
    prepare(Path(name) if name else tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OptionError, match=message):
        check_output_file(name, name="save", inputs=[tmp_path / "questions.jsonl"], folders=[model])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_new_name_and_a_file_that_is_nobodys_are_fine(tmp_path: Path, model: Path) -> None:
    (tmp_path / "old").write_text("x")
    for name in ("new", "old", "model-too"):
        check_output_file(tmp_path / name, name="save", inputs=[tmp_path / "none"], folders=[model])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_in_is_told_before_the_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OptionError, match=r"cannot be written in\. Choose another folder"):
        check_output_file(tmp_path / "new", name="save")


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    (tmp_path / "link").symlink_to("one")
    for same in ("one", "link", "../" + tmp_path.name + "/one"):
        with pytest.raises(OptionError, match="receipt and save are both"):
            check_output_files({"save": tmp_path / "one", "receipt": tmp_path / same}, inputs=[])
    check_output_files({"save": tmp_path / "one", "receipt": tmp_path / "two", "output": None}, inputs=[None])
