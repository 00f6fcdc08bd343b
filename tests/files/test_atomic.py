"""Whole files and folders under their final names, whatever step fails."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import ConversionError
from qwq_mlx.files import atomic
from qwq_mlx.files.atomic import exchange, fsync_folder, publish, replaced_path, write_file


class Stop(BaseException):
    """Stands for the moment at which a process dies."""


def test_a_file_is_written_whole_and_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_at_fsync: list[bytes] = []
    path = tmp_path / "f"
    path.write_bytes(b"old")
    fsync = os.fsync

    def recorded(fd: int) -> None:
        seen_at_fsync.append(path.read_bytes())
        fsync(fd)

    monkeypatch.setattr(atomic, "fsync_file", recorded)
    write_file(path, b"new")
    assert seen_at_fsync == [b"old", b"new"]  # the data before the rename, the folder after it
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync_file", "rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "f"
    path.write_bytes(b"old")
    if step == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(atomic, "fsync_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_local", [True, False])
def test_on_macos_the_drive_itself_is_asked_and_a_volume_that_cannot_gets_an_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    """Its fsync stops at the drive's cache. Not measured on a Mac: the calls are recorded here."""
    calls: list[str] = []

    def full(fd: int, command: int) -> None:
        calls.append(f"fcntl {command}")
        if not is_local:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    with (tmp_path / "f").open("wb") as file:
        atomic.fsync_file(file.fileno())
    assert calls == (["fcntl 51"] if is_local else ["fcntl 51", "fsync"])


def make(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "f").write_text(content)
    return folder


def test_publishing_is_one_rename(tmp_path: Path) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), tmp_path / "out"
    publish(partial, final, replace=False)
    assert (final / "f").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_an_existing_output_is_never_overwritten_unasked(tmp_path: Path, kind: str) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), tmp_path / "out"
    if kind == "folder":
        make(final, "old")
    elif kind == "empty folder":
        final.mkdir()
    elif kind == "file":
        final.write_text("old")
    else:
        final.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ConversionError, match=r"out: exists already.*out\.partial.*remove the old folder or pass `force=True`"
    ):
        publish(partial, final, replace=False)
    assert (partial / "f").read_text() == "new"
    publish(partial, final, replace=True)
    assert (final / "f").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("died_at", range(7))
def test_dying_at_any_step_of_a_replacement_leaves_a_whole_folder_and_a_second_call_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died_at: int, can_exchange: bool
) -> None:
    """With an exchange the name never leads to nothing; without one it does between two renames."""
    partial, final = make(tmp_path / "out.partial", "new"), make(tmp_path / "out", "old")
    if can_exchange and not exchange(partial, final):
        pytest.skip("this file system cannot exchange two names")
    if can_exchange:
        assert exchange(partial, final)
    steps = iter(range(100))

    def dying(step: Any) -> Any:
        def run(*args: object) -> object:
            if next(steps) == died_at:
                raise Stop
            return step(*args)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying(Path.rename))
        patched.setattr(atomic, "fsync_folder", dying(fsync_folder))
        patched.setattr(atomic, "_remove", dying(atomic._remove))
        patched.setattr(atomic, "exchange", dying(exchange if can_exchange else lambda *_: False))
        with contextlib.suppress(Stop):
            publish(partial, final, replace=True)
            assert died_at == 6
    if can_exchange:
        assert (final / "f").read_text() in ("old", "new")
    assert any(path.exists() and (path / "f").read_text() == "new" for path in (partial, final))
    if not final.exists():
        assert (replaced_path(final) / "f").read_text() == "old"
    if not partial.exists():
        make(partial, "new")
    (partial / "f").write_text("new")  # what an exchange left there is the old folder, which the caller knows
    publish(partial, final, replace=True)
    assert (final / "f").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]


def test_names_are_exchanged_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    with pytest.raises(OSError, match="No such file"):
        exchange(one, tmp_path / "none")
    expected = ("2", "1") if exchange(one, other) else ("1", "2")
    assert ((one / "f").read_text(), (other / "f").read_text()) == expected


def test_a_pipe_or_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is there and no regular file"):
        write_file(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
