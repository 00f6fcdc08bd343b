"""Watched runs in an SQLite file, so that they outlive the process, however it ends.

A run is written once a second while it goes on and, before anybody is told, at its end. The file belongs to one process
at a time. Runs that were going on when their process ended are "interrupted" for the next one. It is for the user
alone: mode 600, and what is deleted is overwritten.

Does not: hold requests of other interfaces, whose clients keep their own conversations; or more than `max_bytes` of
ended runs and `MAX_RUNS` of them (the oldest go first).
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import ConversionError, OptionError, SourceError, system_said
from qwq_mlx.files.lock import FolderLock

__all__ = ["MAX_RUNS", "History", "KeptRun"]

MAX_RUNS = 1_000
_SCHEMA = 1
_BUSY_S = 5.0  # somebody may look into the file with another program
_TABLES = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, parent TEXT, model TEXT NOT NULL,
    info TEXT NOT NULL, request TEXT NOT NULL, progress TEXT, n_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX runs_by_age ON runs (created);
CREATE INDEX runs_by_parent ON runs (parent);
CREATE TABLE steps (
    run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, start INTEGER NOT NULL, lines BLOB NOT NULL,
    PRIMARY KEY (run, start)
);
"""

_UPSERT = """
INSERT INTO runs (id, created, state, parent, model, info, request, progress)
VALUES (:id, :created, :state, :parent, :model, :info, :request, :progress)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, model = excluded.model, info = excluded.info,
    request = excluded.request, progress = excluded.progress
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRun:
    """A run as it is kept.

    info: what clients read of it (`Run.to_json`). model: which one wrote it, None while none has.
    request, progress: as `run_state` makes them; progress is None where the run had not begun.
    """

    info: Mapping[str, Any]
    model: str
    request: Mapping[str, Any]
    progress: Mapping[str, Any] | None = None


class History:
    """`History(path, max_bytes=...)`, then `write`, `find` and the rest from one thread at a time; `close` at the end.

    max_bytes: of all runs that have ended, compressed.
    Raises OptionError where the file cannot be made, is no history or of another schema, or belongs to another process.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        path = Path(os.path.realpath(path))  # one lock for one file, by whatever link
        self._lock = FolderLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.__enter__()
        except OSError as error:
            said = system_said(error, "Give another `history`, or `no_history`.")
            raise OptionError(f"history: {path.parent} cannot be made {said}") from error
        except ConversionError as error:
            raise OptionError(f"history: {error} Give another `history`, or `no_history`.") from error
        with ExitStack() as undoing:
            undoing.callback(self._lock.__exit__, None, None, None)
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
                undoing.callback(self._connection.close)
                self._open()
            except (OSError, sqlite3.Error) as error:
                said = f"cannot be used ({error}). Give another `history`, or `no_history`."
                raise OptionError(f"history: {path} {said}") from error
            undoing.pop_all()

    def _open(self) -> None:
        do = self._connection.execute
        do("PRAGMA journal_mode = WAL")
        do("PRAGMA synchronous = FULL")
        do("PRAGMA foreign_keys = ON")
        do("PRAGMA secure_delete = ON")
        do("PRAGMA journal_size_limit = 4194304")
        do("PRAGMA cache_size = -256")  # KiB; with SQLite's 2 MB a server's memory grows for its first 500 runs
        (schema,) = do("PRAGMA user_version").fetchone()
        if not schema and not do("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            self._connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_SCHEMA}; COMMIT")
        elif schema != _SCHEMA:
            raise OptionError(
                f"history: the file has schema {schema}, expected {_SCHEMA}. It is another program's or another "
                "version's; give another `history`, or `no_history`."
            )
        do("UPDATE runs SET state = 'interrupted' WHERE state = 'running'")

    def write(self, run: KeptRun, *, start: int, lines: Sequence[bytes]) -> None:
        """Keep a run as it is. start, lines: its steps from a place on; those that were kept from there on are gone."""
        info, do = run.info, self._connection.execute
        values = {
            "id": info["id"],
            "created": info["created"],
            "state": info["state"],
            "parent": None if info["parent"] is None else info["parent"]["id"],
            "model": run.model,
            "info": json.dumps(info),
            "request": json.dumps(run.request),
            "progress": None if run.progress is None else json.dumps(run.progress),
        }
        with self._connection:  # all of it, or nothing
            do("BEGIN IMMEDIATE")
            do(_UPSERT, values)
            do("DELETE FROM steps WHERE run = ? AND start >= ?", (info["id"], start))
            if lines:
                packed = zlib.compress(b"".join(lines), 1)
                do("INSERT INTO steps (run, start, lines) VALUES (?, ?, ?)", (info["id"], start, packed))
            n_bytes = (
                "(SELECT coalesce(sum(length(lines)), 0) FROM steps WHERE run = :id) + length(info) + length(request)"
            )
            do(f"UPDATE runs SET n_bytes = {n_bytes} WHERE id = :id", {"id": info["id"]})
            if info["state"] != "running" or not start:
                self._make_room()

    def _make_room(self) -> None:
        do = self._connection.execute
        n_runs, n_bytes = do("SELECT count(*), coalesce(sum(n_bytes), 0) FROM runs").fetchone()
        oldest = do("SELECT id, n_bytes FROM runs WHERE state != 'running' ORDER BY created, id")
        for run_id, size in oldest.fetchall():
            if n_runs <= MAX_RUNS and n_bytes <= self._max_bytes:
                return
            do("DELETE FROM runs WHERE id = ?", (run_id,))
            n_runs, n_bytes = n_runs - 1, n_bytes - size

    def find(self, run_id: str) -> tuple[KeptRun, list[bytes]] | None:
        """A run and the lines of its steps; None where it is not kept. Raises SourceError where it is damaged."""
        do = self._connection.execute
        row = do("SELECT state, model, info, request, progress FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            return None
        pieces = do("SELECT start, lines FROM steps WHERE run = ? ORDER BY start", (run_id,)).fetchall()
        try:
            return _kept_run(*row), _joined(pieces)
        except (ValueError, TypeError, zlib.error) as error:
            raise SourceError(f"The history's entry of {run_id} is damaged ({error}). Delete it.") from error

    def infos(self, *, limit: int, offset: int = 0, parent: str | None = None) -> list[dict[str, Any]]:
        """What clients read of the runs, the newest first. parent: of those that were forked from that run alone."""
        where = "WHERE parent = ?" if parent is not None else ""
        rows = self._connection.execute(
            f"SELECT state, info FROM runs {where} ORDER BY created DESC, id LIMIT ? OFFSET ?",
            (*(() if parent is None else (parent,)), limit, offset),
        )
        infos = []
        for state, info in rows:
            try:
                infos.append({**json.loads(info), "state": state})
            except (ValueError, TypeError):  # a damaged entry, of which `find` tells, hides no other
                continue
        return infos

    def remove(self, run_id: str) -> bool:
        """Delete a run, also from the write-ahead log. Returns whether it was there."""
        n_deleted = self._connection.execute("DELETE FROM runs WHERE id = ?", (run_id,)).rowcount
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return n_deleted > 0

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()
        self._lock.__exit__(None, None, None)


def _kept_run(state: str, model: str, info: str, request: str, progress: str | None) -> KeptRun:
    return KeptRun(
        info={**json.loads(info), "state": state},
        model=model,
        request={**json.loads(request)},
        progress=None if progress is None else {**json.loads(progress)},
    )


def _joined(pieces: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """The lines of all pieces; a piece replaces what others say from its start on."""
    lines: list[bytes] = []
    for start, packed in pieces:
        if start > len(lines):
            raise ValueError(f"the steps from {len(lines)} to {start} are missing")
        lines[start:] = zlib.decompress(packed).splitlines(keepends=True)
    return lines
