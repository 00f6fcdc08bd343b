"""A file of questions: JSON lines, each checked before a model is loaded.

    {"question": "How many r in strawberry?", "id": "r1", "expected": "3"}
    {"messages": [{"role": "user", "content": "..."}]}

Does not: compare answers with "expected" (it is passed on), or make prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qwq_mlx.errors import PromptError, SourceError
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.model.prompt import Messages, conversation

__all__ = ["Question", "read_questions"]

_FIELDS = frozenset(("question", "messages", "id", "expected"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line. index: from 0, counting questions. id: its own, else the index. sha256: of the line's values."""

    index: int
    id: str | int
    messages: Messages
    expected: Any
    sha256: str


def read_questions(path: Path, *, system_prompt: str | None = None) -> tuple[Question, ...]:
    """All questions of a file; empty lines are passed over. system_prompt: as it will be put first.

    Raises SourceError naming the line that is no question, or the two lines of one id.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}). Give a file of JSON lines.") from error
    questions: list[Question] = []
    lines_of: dict[str | int, int] = {}
    for place, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        question = _question(line, f"{path}: line {place:,}", len(questions), system_prompt)
        if question.id in lines_of:
            raise SourceError(
                f"{path}: line {place:,} has the id {question.id!r}, as has line {lines_of[question.id]:,}. "
                "Give each question an id of its own, or none."
            )
        lines_of[question.id] = place
        questions.append(question)
    if not questions:
        raise SourceError(f'{path}: holds no question. Write one a line: {{"question": "..."}}.')
    return tuple(questions)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _question(line: bytes, where: str, index: int, system_prompt: str | None) -> Question:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text that could be written again
    except (ValueError, RecursionError) as error:
        raise SourceError(f'{where} is not JSON ({error}), expected an object like {{"question": "..."}}.') from error
    if not isinstance(value, dict):
        raise SourceError(f'{where} holds a {type(value).__name__}, expected an object like {{"question": "..."}}.')
    unknown = sorted(value.keys() - _FIELDS)
    if unknown:
        raise SourceError(f"{where} has the field {unknown[0]!r}, expected only {', '.join(sorted(_FIELDS))}.")
    if ("question" in value) == ("messages" in value):
        raise SourceError(f'{where} has {"both" if "question" in value else "neither"} "question" and "messages".')
    question_id = value.get("id", index)
    if not isinstance(question_id, (str, int)) or isinstance(question_id, bool):
        raise SourceError(f"{where} has the id {question_id!r}, expected a text or a whole number.")
    messages = value["question"] if "question" in value else value["messages"]
    if not isinstance(messages, str if "question" in value else list):
        raise SourceError(
            f"{where}: {'question' if 'question' in value else 'messages'} is a {type(messages).__name__}, "
            'expected a text, or a list of {"role": "user", "content": "..."}.'
        )
    try:
        conversation(messages, system_prompt=system_prompt)
    except PromptError as error:
        raise SourceError(f"{where}: {error}") from error
    digest = sha256_json(value)
    return Question(index=index, id=question_id, messages=messages, expected=value.get("expected"), sha256=digest)
