"""A run that is kept on disk while it goes on, so that little is lost whatever ends it.

One process at a time keeps a file: a second one is refused before it loads a model. A checkpoint that cannot be written
(the disk is full, say) costs a warning, not the run; the file is then the one before, whole.

Does not: decide what a checkpoint holds (`stream.Stream.save` does), or print.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.generate.stream import Stream
from qwq_mlx.trace.trace import Step, Trace

__all__ = ["Autosave", "keep_unasked", "way_on"]


class Autosave:
    """`with Autosave(path, every=N, warn=...) as autosave:` holds the file; iterate over `autosave.steps(run)`.

    path: the file. every: tokens between two checkpoints, None for none before the end. warn: called with one line.
    Raises OptionError for every below 1, ConversionError naming the process that holds the file.
    """

    def __init__(self, path: Path, *, every: int | None, warn: Callable[[str], None]) -> None:
        if every is not None and every < 1:
            raise OptionError(f"save_every is {every}, expected a number of tokens of at least 1.")
        self.path = path
        self._every = every
        self._warn = warn
        self._lock = FolderLock(path.resolve())

    def __enter__(self) -> Autosave:
        self._lock.__enter__()
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            left.unlink()  # of a process that was killed while it wrote; nobody else writes, the lock is ours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def steps(self, run: Stream) -> Iterator[Step]:
        """The run's steps; after every N of them a checkpoint is written."""
        for step in run:
            yield step
            if self._every is not None and (step.index + 1) % self._every == 0 and not run.is_finished:
                self.save(run)

    def save(self, run: Stream) -> bool:
        """Write a checkpoint; a failure is a warning. Returns whether the file holds the run as it is."""
        try:
            run.save(self.path)
        except (GenerationError, RuntimeError, MemoryError) as error:
            self._warn(f"warning: not saved, the run goes on: {error}")
            return False
        return True


def keep_unasked(run: Stream, note: Callable[[str], None]) -> None:
    """Save a run under a name of its own; note is told which, or why it is not saved.

    A run that MLX failed in is left without its cache, so that its file is small.
    """
    path = f"{time.strftime('qwq-run-%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        run.save(path)
    except (GenerationError, RuntimeError, MemoryError) as error:
        note(f"warning: not saved: {error}")
    else:
        note(way_on(run.trace(), path))


def way_on(trace: Trace, path: str) -> str:
    """What people are told of a run that was saved there."""
    return f"saved: go on with `resume` {path}{'' if trace.is_resumable else ' `answer_now`'}"
