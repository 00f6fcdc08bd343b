"""The standard streams: closed ones, a working folder that is gone, and text from stdin."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwq_mlx.chat.reader import plain_reader
from qwq_mlx.cli.command import make_parser, run_command
from qwq_mlx.cli.streams import read_stdin
from qwq_mlx.errors import PromptError

# A process of its own, because pytest needs its own descriptors open.
_CLOSED = """
import os, sys
from qwq_mlx.cli.streams import open_standard_streams
open_standard_streams()
next_free = os.open(os.devnull, os.O_RDONLY)
sys.stdout.write("shown"); sys.stdout.flush()
sys.stderr.write("said"); sys.stderr.flush()
os.write(int(sys.argv[1]), f"{next_free > 2} {sys.stdin.read()!r}".encode())
"""


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_closed_streams_become_the_null_device(closed: tuple[int, ...]) -> None:
    reading, writing = os.pipe()
    redirections = " ".join(f"{each}>&-" for each in closed)
    command = f'exec "$0" -c "$1" {writing} {redirections}'
    process = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, _CLOSED],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        assert told.read() == b"True ''", process.stderr.decode()
    assert process.returncode == 0
    assert process.stdout == (b"" if 1 in closed else b"shown")
    assert process.stderr == (b"" if 2 in closed else b"said")


def test_a_working_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    code = run_command(make_parser("thing", description="Does it.", exit_codes="0 done"), [], lambda command: 0)
    assert code == 2
    assert "The working folder is gone" in capsys.readouterr().err


def test_stdin_is_text_without_what_editors_add() -> None:
    assert read_stdin(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo\n\xef\xbb\xbf")) == "one\ntwo\n\ufeff"
    lines = plain_reader(io.StringIO("\ufeffone\r\n\ufefftwo\n", newline=""), io.StringIO())
    assert [lines(""), lines("")] == ["one", "\ufefftwo"]


class _Endless(io.RawIOBase):
    def __init__(self) -> None:
        self.n_reads = itertools.count()

    def read(self, size: int = -1) -> bytes:
        assert next(self.n_reads) < 20
        return bytes(size)


def test_endless_input_ends_in_an_error() -> None:
    with pytest.raises(PromptError, match=r"stdin: has more than 16,777,216 bytes, expected one question\."):
        read_stdin(_Endless())  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"a line has more than 1,000,000 characters"):
        plain_reader(io.StringIO("x" * 1_000_002), io.StringIO())("")
