"""Lines from a person: with history and editing where prompt_toolkit and a terminal are there, plain otherwise.

A message is one line; a line that ends in a backslash goes on in the next, and three double quotes begin and end a
block of lines. The prompt goes to stderr, so that stdout holds the model's text alone.

Does not: know commands (`commands` does), or keep lines on disk unless a history file is given.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from qwq_mlx.cli.streams import without_marks
from qwq_mlx.errors import PromptError

__all__ = ["ReadLine", "editing_reader", "has_editing", "plain_reader", "read_message"]

ReadLine = Callable[[str], str]
"""Shows a prompt and returns one line without its end; raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""

_BLOCK = '"""'
_MORE = "... "
_MAX_LINE = 1_000_000  # characters


def read_message(read_line: ReadLine, prompt: str) -> str:
    """One message, its lines joined. Raises EOFError where there is none."""
    line = read_line(prompt)
    if line.lstrip().startswith(_BLOCK):
        return _read_block(read_line, line.lstrip().removeprefix(_BLOCK))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read_line(_MORE)
        except EOFError:
            line = ""
    return "\n".join([*lines, line])


def _read_block(read_line: ReadLine, line: str) -> str:
    lines = []
    while not line.rstrip().endswith(_BLOCK):
        lines.append(line)
        try:
            line = read_line(_MORE)
        except EOFError:
            return "\n".join(lines)
    return "\n".join([*lines, line.rstrip().removesuffix(_BLOCK)]).strip("\n")


def plain_reader(source: TextIO, prompts: TextIO) -> ReadLine:
    """Lines of a stream without byte order mark and CR; the prompt is shown on another one.

    The reader raises PromptError for a line of more than a million characters, which a pipe without end may be.
    """
    is_first = True

    def read_line(prompt: str) -> str:
        nonlocal is_first
        prompts.write(prompt)
        prompts.flush()
        line = source.readline(_MAX_LINE + 2)
        if not line:
            raise EOFError
        if len(line) > _MAX_LINE + 1:
            raise PromptError(
                f"stdin: a line has more than {_MAX_LINE:,} characters, expected one message a line. Send shorter ones."
            )
        if is_first:
            line, is_first = without_marks(line), False
        return line.removesuffix("\n").removesuffix("\r")

    return read_line


def has_editing() -> bool:
    """Whether prompt_toolkit is installed."""
    return importlib.util.find_spec("prompt_toolkit") is not None


def editing_reader(prompts: TextIO, history: Path | None) -> ReadLine:
    """Lines typed at the terminal with editing, and history in a file of the user's own or for this session."""
    toolkit = importlib.import_module("prompt_toolkit")
    output = importlib.import_module("prompt_toolkit.output")
    histories = importlib.import_module("prompt_toolkit.history")
    typed = histories.InMemoryHistory()
    if history is not None:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        typed = histories.FileHistory(str(history))
    session = toolkit.PromptSession(history=typed, output=output.create_output(stdout=prompts))

    def read_line(prompt: str) -> str:
        line: str = session.prompt(prompt)
        return line

    return read_line
