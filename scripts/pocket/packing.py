"""Conversations become rows of token ids, packed by worker processes in an order that a seed determines.

A row holds ROW_TOKENS + 1 ids as uint16, so that inputs and next-token targets are both ROW_TOKENS long. The high bit
marks an id that the model should learn to produce (the assistant's text and its end); documents are never cut, and the
rest of a row is padding. Workers each draw from a seed of their own and are read in turn, so the stream of rows does
not depend on how fast any of them is.

Does not: import PyTorch (workers start quickly and stay small) or decide how often a row is used.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pocket import data
from pocket.vocabulary import END_OF_TEXT, IM_END, IM_START

__all__ = ["LEARN", "ROWS_PER_BLOCK", "ROW_TOKENS", "Encoder", "blocks", "rows"]

ROW_TOKENS = 4096
ROWS_PER_BLOCK = 48
LEARN = 0x8000
"""Added to an id that is a target."""

_OPEN_ROWS = 16
_BLOCKS_AHEAD = 4


class Encoder:
    """Messages to ids, as the chat template and the tokenizer would write them."""

    def __init__(self, folder: Path, system_prompt: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._system_prompt = system_prompt
        self._start, self._end = (self._tokenizer.token_to_id(token) for token in (IM_START, IM_END))
        self.end_id = self._end
        self.padding_id = self._tokenizer.token_to_id(END_OF_TEXT)

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def document(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The whole conversation; what the assistant wrote is marked with LEARN."""
        ids = [] if messages[0]["role"] == "system" else self._message("system", self._system_prompt)
        for message in messages:
            ids += self._message(message["role"], message["content"])
        return ids

    def _message(self, role: str, content: str) -> list[int]:
        if role != "assistant":
            return [self._start, *self._text(f"{role}\n{content}"), self._end, *self._text("\n")]
        learned = [token | LEARN for token in (*self._text(content), self._end)]
        return [self._start, *self._text("assistant\n"), *learned, *self._text("\n")]

    def prompt(self, question: str) -> list[int]:
        """Ids up to where the assistant starts."""
        ids = self._message("system", self._system_prompt) + self._message("user", question)
        return [*ids, self._start, *self._text("assistant\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without control tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def rows(encoder: Encoder, seed: int) -> Iterator[NDArray[np.uint16]]:
    """An endless stream of rows (ROW_TOKENS + 1,). Each new document goes into the fullest open row that has room."""
    open_rows: list[list[int]] = [[] for _ in range(_OPEN_ROWS)]
    for messages in data.conversations(seed):
        document = encoder.document(messages)
        if len(document) > ROW_TOKENS + 1:
            continue  # a long conversation of several exchanges; single traces stay far below
        fitting = [row for row in open_rows if len(row) + len(document) <= ROW_TOKENS + 1]
        if not fitting:
            full = max(open_rows, key=len)
            padding = [encoder.padding_id] * (ROW_TOKENS + 1 - len(full))
            yield np.array([*full, *padding], dtype=np.uint16)
            full.clear()
            fitting = [full]
        max(fitting, key=len).extend(document)


def _work(queue: multiprocessing.Queue[NDArray[np.uint16]], folder: Path, system_prompt: str, seed: int) -> None:
    stream = rows(Encoder(folder, system_prompt), seed)
    while True:
        queue.put(np.stack([next(stream) for _ in range(ROWS_PER_BLOCK)]))


def blocks(folder: Path, system_prompt: str, *, seed: int, n_workers: int) -> Iterator[NDArray[np.uint16]]:
    """Blocks of rows (ROWS_PER_BLOCK, ROW_TOKENS + 1), from `n_workers` processes in turn; they end with this one."""
    context = multiprocessing.get_context("spawn")
    queues = []
    for worker in range(n_workers):
        queue: multiprocessing.Queue[NDArray[np.uint16]] = context.Queue(_BLOCKS_AHEAD)
        arguments = (queue, folder, system_prompt, seed * 1000 + worker)
        context.Process(target=_work, args=arguments, daemon=True).start()
        queues.append(queue)
    for queue in cycle(queues):
        yield queue.get()
