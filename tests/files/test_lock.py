"""One process at a time on one output folder, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwq_mlx.convert.write import disk_fault
from qwq_mlx.errors import ConversionError, DiskFullError
from qwq_mlx.files.lock import FolderLock

HOLD = """
import sys
from pathlib import Path
from qwq_mlx.files.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_until_the_first_is_gone(tmp_path: Path, repository: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(ConversionError, match=rf"out: process {first.pid} on .* is writing it\. Wait"),
            FolderLock(output),
        ):
            pass
        first.kill()
        first.wait()
    assert (tmp_path / ".out.lock").exists()  # stale: its process was killed
    with FolderLock(output):
        assert f"process {os.getpid()} " in (tmp_path / ".out.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out"):
        with pytest.raises(ConversionError, match="is writing it"), FolderLock(tmp_path / "out"):
            pass
        with FolderLock(tmp_path / "other"):
            pass


def test_a_lock_file_that_its_holder_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    path = tmp_path / ".out.lock"

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # the holder ends between our open and our flock
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with FolderLock(tmp_path / "out"):
        assert path.exists()
        with pytest.raises(ConversionError, match="is writing it"), FolderLock(tmp_path / "out"):
            pass


def test_an_impossible_place_and_a_file_system_without_locks_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConversionError, match=r"\.out\.lock: cannot be made \(No such file or directory\)\. Choose"):
        FolderLock(tmp_path / "missing" / "out").__enter__()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConversionError, match=r"this file system cannot lock \(No locks available\)\. Choose"):
        FolderLock(tmp_path / "out").__enter__()


def test_a_full_disk_is_said_and_leaves_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match=r"out\.lock: the disk is full .*Make room"), FolderLock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_not_called_a_full_disk(tmp_path: Path) -> None:
    fault = disk_fault(OSError(errno.EFBIG, os.strerror(errno.EFBIG)), tmp_path / "shard", 9)
    assert isinstance(fault, DiskFullError) and "shard: a file may not be that large here (see ulimit -f" in str(fault)
