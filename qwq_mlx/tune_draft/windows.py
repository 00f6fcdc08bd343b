"""Examples of any length become windows of a bounded one, and windows batches of bounded memory.

The first window of an example begins with its prompt. Each further one begins half a window later, and what is trained
on or measured in it is its second half, so every id is a target just once, behind at least half a window of its text.

Does not: know a model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwq_mlx.tune_draft.examples import Example

__all__ = ["Batch", "Window", "batches", "cut", "shuffled"]


_FILLED = 32  # windows are filled to a multiple, so that few shapes come up: on CUDA each new one takes a plan


class Window(NamedTuple):
    """Some ids of an example in order.

    example: its place in the list. start: where in the example's ids it begins. targets: places in the window whose id
    is to be named, rising, none of them 0.
    """

    example: int
    start: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]


class Batch(NamedTuple):
    """Windows side by side.

    ids: (windows, n) int32, n a multiple of 32 that holds the longest, behind the end of a window 0.
    places: (targets,) int32, of the ids before the targets
    in the flattened `ids`. targets: (targets,) int32, the ids to be named.
    """

    windows: Sequence[Window]
    ids: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def cut(examples: Sequence[Example], max_length: int) -> list[Window]:
    """The windows of all examples that have a target. max_length: ids of a window, even."""
    windows: list[Window] = []
    for number, example in enumerate(examples):
        ids = (*example.prompt_ids, *example.ids)
        n_prompt = len(example.prompt_ids)
        for start in range(0, max(1, len(ids) - max_length // 2), max_length // 2):
            first = max(n_prompt, 1 if start == 0 else start + max_length // 2)
            end = min(len(ids), start + max_length)
            targets = tuple(place - start for place in range(first, end) if example.is_written[place - n_prompt])
            if targets:
                windows.append(Window(number, start, ids[start : start + targets[-1] + 1], targets))
    return windows


def batches(windows: Iterable[Window], n_ids: int) -> list[Batch]:
    """Windows of about one length together, at most n_ids a batch with what fills the shorter ones; at least one."""
    grouped: list[list[Window]] = []
    for window in sorted(windows, key=lambda each: len(each.ids)):
        if not grouped or (len(grouped[-1]) + 1) * _filled_length(window) > n_ids:
            grouped.append([])
        grouped[-1].append(window)
    return [_side_by_side(each) for each in grouped]


def shuffled(n_batches: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes the batches."""
    order = list(range(n_batches))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def _filled_length(window: Window) -> int:
    return -(-len(window.ids) // _FILLED) * _FILLED


def _side_by_side(windows: Sequence[Window]) -> Batch:
    ids = np.zeros((len(windows), max(map(_filled_length, windows))), np.int32)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
    at = np.array([row * ids.shape[1] + place for row, each in enumerate(windows) for place in each.targets], np.int32)
    return Batch(windows, ids, at - 1, ids.reshape(-1)[at])
