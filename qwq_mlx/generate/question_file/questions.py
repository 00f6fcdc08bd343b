"""A file of questions: JSON lines, each checked before a model is loaded.

    {"question": "How many r in strawberry?", "id": "r1", "expected": "3"}
    {"messages": [{"role": "user", "content": "..."}]}

Data sets name these fields in other ways: "prompt" and "problem" are taken as the question, "answer" as what is
expected, and content as a list of text parts is joined. Every other field is ignored. What was taken or ignored is told
once a field.

Does not: compare answers with "expected" (it is passed on), or make prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import PromptError, SourceError, system_said
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.model.prompt import Messages, conversation

__all__ = ["Question", "read_lines", "read_questions"]

_OTHER_NAMES = {"prompt": "question", "problem": "question", "answer": "expected"}
_FIELDS = ("question", "messages", "id", "expected")
_OURS = frozenset(_FIELDS)
_ADVICE = 'Write one object a line, like {"question": "..."}.'
_MAX_LINE_BYTES = 64 << 20
_MAX_BYTES = 1 << 30
_EVERY = 1000  # lines between two reports of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line. index: from 0, counting questions. id: its own, else the index. sha256: of the line's values."""

    index: int
    id: str | int
    messages: Messages
    expected: Any
    sha256: str


def read_questions(
    path: Path,
    *,
    system_prompt: str | None = None,
    note: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda n_questions: None,
) -> tuple[Question, ...]:
    """All questions of a file; empty lines are passed over.

    system_prompt: as it will be put first.
    note: told once of each field that is ignored, or taken as another.
    progress: told now and then how many questions were read.
    Raises SourceError: a line that is no question, two lines of one id, more than 1 GiB (a device without end, say).
    """
    reader = _Reader(path, system_prompt, note)
    questions: list[Question] = []
    lines_of: dict[str | int, int] = {}
    for place, line in read_lines(path):
        question = reader.question(line, f"{path}: line {place:,}", len(questions))
        if question.id in lines_of:
            raise SourceError(
                f"{path}: line {place:,} has the id {question.id!r}, as has line {lines_of[question.id]:,}. "
                "Give each question an id of its own, or none."
            )
        lines_of[question.id] = place
        questions.append(question)
        if len(questions) % _EVERY == 0:
            progress(len(questions))
    if not questions:
        raise SourceError(f"{path}: holds no question. {_ADVICE}")
    return tuple(questions)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not empty. A pipe is read too, as a shell's <(...) gives one."""
    n_bytes = 0
    try:
        with path.open("rb") as file:
            for place, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), start=1):
                n_bytes += len(line)
                if len(line) > _MAX_LINE_BYTES or n_bytes > _MAX_BYTES:
                    raise SourceError(
                        f"{path}: line {place:,} ends beyond byte {n_bytes:,}, expected lines of at most "
                        f"{_MAX_LINE_BYTES:,} bytes and {_MAX_BYTES:,} in all. Give a file of questions, or split it."
                    )
                if text := (line.removeprefix(b"\xef\xbb\xbf") if place == 1 else line).strip():
                    yield place, text
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Give a file of JSON lines.')}") from error


class _Reader:
    """Makes questions of lines, and tells once of each field that is not one of ours."""

    def __init__(self, path: Path, system_prompt: str | None, note: Callable[[str], None]) -> None:
        self._path, self._system_prompt, self._note = path, system_prompt, note
        self._told: set[str] = set()

    def question(self, line: bytes, where: str, index: int) -> Question:
        value = self._fields(parse_json_object(line, what=where, advice=_ADVICE))
        if ("question" in value) == ("messages" in value):
            raise SourceError(
                f'{where} has {"both" if "question" in value else "neither"} "question" and "messages". {_ADVICE}'
            )
        question_id = value.get("id", index)
        if not isinstance(question_id, (str, int)) or isinstance(question_id, bool):
            raise SourceError(f"{where} has the id {question_id!r}, expected a text or a whole number.")
        name = "question" if "question" in value else "messages"
        messages = value[name]
        if not isinstance(messages, str if name == "question" else list):
            raise SourceError(
                f"{where}: {name} is a {type(messages).__name__}, "
                'expected a text, or a list of {"role": "user", "content": "..."}.'
            )
        if name == "messages":
            messages = [self._message(each) for each in messages]
        try:
            conversation(messages, system_prompt=self._system_prompt)
        except PromptError as error:
            raise SourceError(f"{where}: {error}") from error
        digest = sha256_json(value)
        return Question(index=index, id=question_id, messages=messages, expected=value.get("expected"), sha256=digest)

    def _fields(self, value: dict[str, Any]) -> dict[str, Any]:
        """The fields that are ours, under our names; ours go before another name for the same."""
        if value.keys() <= _OURS:
            return value
        taken = {name: value[name] for name in _FIELDS if name in value}
        for name in (each for each in value if each not in _OURS):  # of two names for one field the first counts
            ours = _OTHER_NAMES.get(name)
            if ours is None or ours in taken or (ours == "question" and "messages" in taken):
                self._tell(name, f"the field {name!r} is ignored")
            else:
                taken[ours] = value[name]
                self._tell(name, f"the field {name!r} is taken as {ours!r}")
        return taken

    def _message(self, message: Any) -> Any:
        """A message without what is not ours: further fields, and content as a list of text parts."""
        if not isinstance(message, dict):
            return message
        for name in (each for each in message if each not in ("role", "content")):
            self._tell(f"messages.{name}", f"the field {name!r} of messages is ignored")
        content = message.get("content")
        if isinstance(content, list) and content and all(map(_is_text_part, content)):
            self._tell("messages.content", "content as a list of text parts is joined")
            content = "".join(part["text"] for part in content)
        ours = {name: message[name] for name in ("role", "content") if name in message}
        return {**ours, "content": content} if "content" in ours else ours

    def _tell(self, name: str, text: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self._note(f"{self._path}: {text}")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
