"""A run that another process would have to save: its state without the KV cache, in a file that is always whole.

Of the processes that hold a model together any may die, and the rest then wait for ever inside MLX, where nothing can
be saved any more. So rank 0 writes what its run is about once a second, and whoever ends all makes a saved run of it.

Does not: keep what `Inspect` showed, or the cache, which is worked out again from the ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qwq_mlx.generate.checkpoint.file import model_digest, write_checkpoint
from qwq_mlx.generate.checkpoint.state import state_json
from qwq_mlx.generate.stream import Stream
from qwq_mlx.trace.trace import Step

__all__ = ["kept_steps", "save_snapshot"]

_EVERY_S = 1.0
_SHARE = 50  # of the time at most a 50th goes into snapshots, however long the run


def kept_steps(run: Stream, steps: Iterable[Step], path: Path | None, *, warn: Callable[[str], None]) -> Iterator[Step]:
    """The steps; meanwhile the file holds the run, at most a second older than it is. path: None keeps nothing.

    warn: takes a line where the file cannot be written, which ends no run.
    """
    due = 0.0
    for step in steps:
        yield step
        now = time.monotonic()
        if path is not None and now >= due:
            try:
                _write(run, path)
            except OSError as error:
                warn(f"warning: {path}: cannot be written ({error.strerror}), so the run is lost if a process fails.")
                path = None
            due = now + max(_EVERY_S, _SHARE * (time.monotonic() - now))


def _write(run: Stream, path: Path) -> None:
    value = {"folder": str(run.request.model.folder), "state": state_json(run.run.dump())}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def save_snapshot(snapshot: Path, path: Path) -> int:
    """Make a saved run of a snapshot; returns its tokens. Raises SavingError."""
    value = json.loads(snapshot.read_text(encoding="utf-8"))
    state = {**value["state"], "model_sha256": model_digest(Path(value["folder"]))}
    write_checkpoint(path, state, {})
    return len(state["steps"])
