"""Advice to read ahead: every byte of every file is asked for, and nothing fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwq_mlx.files import read_ahead as module
from qwq_mlx.files.read_ahead import read_ahead

Asked = list[tuple[int, int]]


def write(folder: Path, *sizes: int) -> list[Path]:
    paths = [folder / str(place) for place in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b"x" * size)
    return paths


def test_every_byte_is_asked_for_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Asked = []
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "_ADVISED_BYTES", 100)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, first, count, advice: asked.append((first, count)), raising=False
    )
    gone, first, second = tmp_path / "gone", *write(tmp_path, 250, 100)
    read_ahead([gone, first, second]).join()
    assert asked == [(0, 100), (100, 100), (200, 50), (0, 100)]


def test_every_byte_is_asked_for_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct

    asked: Asked = []

    def advise(fd: int, command: int, argument: bytes) -> None:
        assert command == 44
        asked.append(struct.unpack("qi", argument))

    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module, "_ADVISED_BYTES", 100)
    monkeypatch.setattr(fcntl, "fcntl", advise)
    read_ahead(write(tmp_path, 150)).join()
    assert asked == [(0, 100), (100, 50)]


def test_a_file_system_without_advice_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(module, "_advise", refuse)
    thread = read_ahead(write(tmp_path, 10))
    thread.join()
    assert not thread.is_alive()
