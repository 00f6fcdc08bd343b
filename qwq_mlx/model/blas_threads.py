"""Threads for numpy's BLAS: one a processor, each with a BLAS of one thread.

OpenBLAS's own threads spin while they wait for each other, which on a loaded machine made a pass of 8 rows 8 times as
slow.

Does not: multiply (`blas` does).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController

__all__ = ["by_blocks", "n_processors", "one_blas_thread"]

_BLOCK_BYTES = 2 << 20
"""Of unpacked rows at a time: they stay in the processor's cache until they are multiplied. With smaller ones threads
wait more often for Python's lock, which each operation of numpy gives back and takes again."""
_SMALL_BYTES = 1 << 20  # of a matrix that is multiplied sooner than it is shared out to threads


def by_blocks(multiply: Callable[[slice], None], n_out: int, n_in: int, *, is_threaded: bool = True) -> None:
    """Call for each block of the rows of a matrix. is_threaded: side by side; MLX is to be used by one thread alone."""
    if 4 * n_out * n_in <= _SMALL_BYTES:
        with one_blas_thread():
            multiply(slice(0, n_out))
        return
    n_block = max(1, min(_BLOCK_BYTES // (4 * n_in), -(-n_out // n_processors())))
    blocks = iter([slice(first, min(first + n_block, n_out)) for first in range(0, n_out, n_block)])

    def work() -> None:
        for block in blocks:  # each worker takes the next one that nobody has: next() of a list's iterator is atomic
            multiply(block)

    with one_blas_thread():
        others = [_threads().submit(work) for _ in range(n_processors() - 1)] if is_threaded else []
        try:
            work()
        finally:
            begun = [other for other in others if not other.cancel()]  # one that did not begin has nothing left to do
            for other in begun:  # also when this thread failed: nobody is to multiply behind its caller's back
                other.exception()
        for other in begun:
            other.result()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS on the calling thread alone, so that workers do not wait for each other's threads. Of the whole process.

    The first of several that are open at once, nested or in other threads, sets it, and the last one puts it back.
    """
    _limit.enter()
    try:
        yield
    finally:
        _limit.leave()


class _Limit:
    """Counts the open blocks: if each saved what it met, one that overlaps another would put the other's 1 back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0
        self._before: list[int] = []  # threads of each BLAS before the first block

    def enter(self) -> None:
        with self._lock:
            if self._n_open == 0:  # to ask and set costs as much as a small product
                self._before = [each.num_threads for each in _blas().lib_controllers]
                _set_threads([1] * len(self._before))
            self._n_open += 1

    def leave(self) -> None:
        with self._lock:
            self._n_open -= 1
            if self._n_open == 0:
                _set_threads(self._before)


def _set_threads(numbers: Sequence[int]) -> None:
    for each, n_threads in zip(_blas().lib_controllers, numbers, strict=True):
        each.set_num_threads(n_threads)
        # From 3.8 on threadpoolctl ignores all threads but the one that was first, until that one says it is done.
        if hasattr(each, "clear_controlling_thread"):
            each.clear_controlling_thread()


_limit = _Limit()


@functools.cache
def n_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, n_processors() - 1), thread_name_prefix="blas")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
