"""The text that two models are compared on: ids in windows, and which of them count.

A .jsonl file holds conversations, one a line: {"question": ..., "reply": ...}. The question goes through the model's
chat template, and only the reply's tokens are measured, each after all before it. Any other file is plain UTF-8 text,
cut into windows, and every token but a window's first is measured. Control texts such as <|im_end|> are characters
in both. Without a file one of the bundled texts is taken, both made by this project: traces of held-out problems for
the pocket model, short written reasoning for all others.

Does not: choose a text by a folder's name, or measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, PromptError, SourceError
from qwq_mlx.facts import POCKET
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer

__all__ = ["DEFAULT_POSITIONS", "MIN_TOKENS", "QualityText", "Window", "bundled_text", "read_text"]

DEFAULT_POSITIONS = 2048
"""Positions run at most, prompts included: 42 MB of hidden states a model for the 32B."""
MIN_TOKENS = 32
"""Measured tokens at least: a mean over fewer says nothing, and percentiles do not exist."""

_WINDOW = 512
_MAX_BYTES = 64 << 20
_TEXTS = Path(__file__).resolve().parent / "texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Ids that are run together from position 0. first: the first id that is measured, by what predicts it."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityText:
    """A text as windows. name: of the file. sha256: of its bytes. n_left_out: ids of windows reached, without room."""

    name: str
    sha256: str
    windows: tuple[Window, ...]
    n_left_out: int

    @property
    def n_positions(self) -> int:
        """Ids that are run."""
        return sum(len(window.ids) for window in self.windows)

    @property
    def n_tokens(self) -> int:
        """Ids that are measured."""
        return sum(len(window.ids) - window.first for window in self.windows)


def bundled_text(config: Qwen2Config) -> Path:
    """The file of the text that is bundled for a model of this shape."""
    is_pocket = all(
        getattr(config, name) == getattr(POCKET, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    return _TEXTS / ("pocket.jsonl" if is_pocket else "reasoning.jsonl")


def read_text(
    path: str | Path,
    tokenizer: LoadedTokenizer,
    config: Qwen2Config,
    *,
    n_positions: int = DEFAULT_POSITIONS,
) -> QualityText:
    """Read a text file and encode it with the model's tokenizer.

    n_positions: run at most; the rest of the text is left out.
    Raises OptionError: no such file, not UTF-8, a line that is no conversation, too short.
    """
    path = Path(path)
    if type(n_positions) is not int or n_positions < MIN_TOKENS:
        raise OptionError(f"{n_positions!r} tokens of text are asked for, expected at least {MIN_TOKENS}.")
    raw = _read(path)
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 (byte {error.start:,}), expected a text. Give a text file.") from error
    length = min(_WINDOW, config.max_position_embeddings)
    whole = _conversations(path, text, tokenizer) if path.suffix == ".jsonl" else _plain(text, tokenizer, length)
    windows, n_left_out, room = [], 0, n_positions
    for window in whole:
        if room == 0:  # a conversation beyond would be rendered, by a process of its own, for nothing
            break
        n = min(len(window.ids), length, room)
        n = n if n > window.first else 0
        n_left_out += len(window.ids) - n
        room -= n
        if n:
            windows.append(Window(ids=window.ids[:n], first=window.first))
    quality_text = QualityText(
        name=path.name, sha256=hashlib.sha256(raw).hexdigest(), windows=tuple(windows), n_left_out=n_left_out
    )
    if quality_text.n_tokens < MIN_TOKENS:
        raise OptionError(
            f"{path}: gives {quality_text.n_tokens:,} tokens to measure, expected at least {MIN_TOKENS}, better "
            f"thousands. Give a longer text{', or let more tokens be run' if n_left_out else ''}."
        )
    return quality_text


def _read(path: Path) -> bytes:
    try:
        return read_regular_file(
            path,
            limit_bytes=_MAX_BYTES,
            expected="a text",
            advice="Give a text (.txt, or .jsonl of questions and replies).",
        )
    except SourceError as error:
        raise OptionError(str(error)) from error


def _plain(text: str, tokenizer: LoadedTokenizer, length: int) -> Iterator[Window]:
    ids = encode_text(tokenizer, text)
    for start in range(0, len(ids), length):
        yield Window(ids=tuple(ids[start : start + length]), first=1)


def _conversations(path: Path, text: str, tokenizer: LoadedTokenizer) -> Iterator[Window]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question, reply = _parsed(path, number, line)
        try:
            prompt = _prompt(tokenizer, question)
            end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            ids = (*prompt, *encode_text(tokenizer, reply), *end)
        except PromptError as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
        yield Window(ids=ids, first=len(prompt))


def _parsed(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        value = parse_json_object(
            line.encode(), what=f"{path}, line {number}:", advice="Write one conversation a line."
        )
    except SourceError as error:
        raise OptionError(str(error)) from error
    pair = [str(value[key]) for key in ("question", "reply") if _is_text(value.get(key))]
    if len(pair) != 2:
        raise OptionError(
            f'{path}, line {number}: is {line[:60]!r}, expected {{"question": "...", "reply": "..."}} with two texts.'
        )
    return pair[0], pair[1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _prompt(tokenizer: LoadedTokenizer, question: str) -> list[int]:
    """The prompt's ids; a checkpoint without a chat template (a base model) gets the question and an empty line."""
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, f"{question}\n\n")
    return prompt_ids(tokenizer, question, context=_MAX_BYTES)
