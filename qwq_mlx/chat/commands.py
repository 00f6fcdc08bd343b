"""What a line of the chat means: a question, or a command that begins with a slash.

Does not: carry anything out (`__main__` does).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_mlx.errors import OptionError

__all__ = ["COMMANDS", "Line", "parse_line", "think_tokens"]

COMMANDS = {
    "/system": "[TEXT]  show or replace the system prompt",
    "/save": "FILE  write the conversation",
    "/load": "FILE  go on with a saved conversation",
    "/retry": "answer the last question again",
    "/back": "take the last question and its answer off",
    "/think": "N | off  ask for the answer after N tokens of thinking",
    "/fold": "show thinking as one line, or in full again",
    "/stats": "what the turns cost, and the context that is left",
    "/help": "this list; a question that begins with a slash is written with two",
    "/quit": "end, as Ctrl-D does",
}
_TAKES_TEXT = {"/system": False, "/save": True, "/load": True, "/think": True}  # whether it must have one


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """command: one of COMMANDS, or "" for a question. text: the question, or what stands behind the command."""

    command: str
    text: str


def parse_line(line: str) -> Line:
    """Raises OptionError for a command that does not exist, or has too much or too little behind it."""
    if not line.startswith("/") or line.startswith("//"):
        return Line(command="", text=line.removeprefix("/") if line.startswith("//") else line)
    name, _, rest = line.partition(" ")
    name, text = name.strip(), rest.strip()
    if name not in COMMANDS:
        raise OptionError(f"There is no command {name!r}. /help shows them; begin a question with '//' for a slash.")
    if name not in _TAKES_TEXT and text:
        raise OptionError(f"{name} takes nothing behind it, found {text!r}.")
    if _TAKES_TEXT.get(name) and not text:
        raise OptionError(f"{name} needs more: {name} {COMMANDS[name].partition('  ')[0]}")
    return Line(command=name, text=text)


def think_tokens(text: str) -> int | None:
    """The budget behind /think. Raises OptionError for anything but a whole number or "off"."""
    if text == "off":
        return None
    if not text.isdecimal() or len(text) > 9:
        raise OptionError(f"/think is {text!r}, expected a number of tokens, or off.")
    return int(text)
