"""The standard streams as a command needs them: all three open, and stdin as text of a bounded size.

Services start programs with stdin, stdout or stderr closed. The next file that is opened then gets descriptor 0, 1 or
2, so that a weights file becomes stdin, and what was meant for people is written into a file.

Does not: decide what goes to which stream (the commands do).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

from qwq_mlx.errors import OptionError, PromptError

__all__ = ["check_working_folder", "open_standard_streams", "read_stdin", "without_marks"]

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by descriptor
_MAX_STDIN_BYTES = 16 << 20  # some 4 million tokens, a hundred times the context of QwQ-32B
_BYTE_ORDER_MARK = "\ufeff"


def open_standard_streams() -> None:
    """Put the null device in the place of each standard stream that is closed."""
    for descriptor, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:  # POSIX gives the lowest free one, Windows need not
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def check_working_folder() -> None:
    """Raises OptionError where the working folder was deleted: no relative name has a meaning then."""
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd() is the same with more words
    except OSError as error:
        raise OptionError(
            f"The working folder is gone ({error.strerror}). Go to one that is there (cd) and run again."
        ) from error


def read_stdin(stream: BinaryIO) -> str:
    """All of stdin as text. Raises PromptError: more than 16 MiB (a pipe without end, say), or not UTF-8."""
    raw = bytearray()
    while len(raw) <= _MAX_STDIN_BYTES and (block := stream.read(1 << 20)):
        raw += block
    if len(raw) > _MAX_STDIN_BYTES:
        raise PromptError(
            f"stdin: has more than {_MAX_STDIN_BYTES:,} bytes, expected one question. For many questions use --input."
        )
    try:
        return without_marks(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PromptError(
            f"stdin: byte {error.start:,} is not UTF-8, expected UTF-8 text. Convert it first (iconv)."
        ) from error


def without_marks(text: str) -> str:
    """A text without what editors on Windows add: a byte order mark, and a CR before each LF."""
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n")
