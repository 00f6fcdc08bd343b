"""The file that a batch writes: one JSON line a question, in order, each on the disk before the next is begun.

    {"index": 0, "id": "r1", "expected": "3", "question_sha256": "...", "run": {...}, "trace": {...}, "measured": {...}}
    {"index": 1, "id": 1, "expected": null, "question_sha256": "...", "run": {...}, "error": "The prompt is ...",
     "error_type": "PromptError"}

A line counts once it ends in its newline. A process that is killed leaves at most one torn line, the last, which the
next process cuts off; a line before it that cannot be read is damage and refused. A line is written again only where
its question was tried again, by one rename of the whole file. "run" says what the line depends on besides its question;
"measured" (times, memory) is the only part that two runs of the same need not share.

Does not: run anything (`batch` does).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SavingError, SourceError, system_said
from qwq_mlx.files.atomic import fsync_file, fsync_folder
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.trace.trace import Trace

__all__ = ["Results", "read_traces", "result_line"]

_MEASURED = ("timings", "peak_bytes")
_BEGINNING = b'{"index": '  # of every line


class Results:
    """`with Results(path) as results:` holds the file for this process alone. lines: what is there, without the traces.

    Raises ConversionError where another process writes it; SourceError naming a line that is damaged or out of order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._lock = FolderLock(path)
        self._fd = -1
        self._ends: list[int] = []

    @property
    def _size(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}.again")

    def __enter__(self) -> Results:
        if not self.path.parent.is_dir():
            raise SourceError(f"{self.path}: there is no folder {self.path.parent}. Make it first.")
        self._lock.__enter__()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")  # a device or pipe would be read without end
            for line, end in _lines(self.path):
                self.lines.append(self._kept(line))
                self._ends.append(end)
            self._temporary.unlink(missing_ok=True)  # of a process that was killed
            _check_torn(self.path, os.pread(self._fd, len(_BEGINNING), self._size))
            os.ftruncate(self._fd, self._size)
            fsync_folder(self.path.parent)
        except OSError as error:
            self.__exit__()
            raise SourceError(
                f"{self.path}: cannot be written {system_said(error, 'Choose an output where you may write.')}"
            ) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.__exit__(None, None, None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line, the next or one that is there already; on return it is on the disk.

        Raises SavingError where the disk does not take it; the file is then as it was before.
        """
        index, data = line["index"], (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            if index == len(self.lines):
                self._append(data)
                self.lines.append(self._kept(line))
            else:
                self._replace(data, index)
                self.lines[index] = self._kept(line)
        except OSError as error:
            raise SavingError(
                f"{self.path}: line {index + 1:,} cannot be written "
                f"{system_said(error, 'Make room and run the same command again.')} The lines before it are whole.",
                error,
            ) from error

    def _kept(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The line without the trace; lines of one run share "run", which is most of the rest."""
        slim = _slim(line)
        if self.lines and self.lines[-1]["run"] == slim["run"]:
            slim["run"] = self.lines[-1]["run"]
        return slim

    def _append(self, data: bytes) -> None:
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], self._size + done)
            fsync_file(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._ends.append(self._size + len(data))

    def _replace(self, data: bytes, index: int) -> None:
        """A copy of the file with another line takes its name, so at every moment there is one whole file."""
        start, end = ([0, *self._ends][index], self._ends[index])
        fd = -1
        try:
            with self.path.open("rb") as old, self._temporary.open("wb") as new:
                new.write(old.read(start))
                new.write(data)
                old.seek(end)
                shutil.copyfileobj(old, new)
                new.flush()
                fsync_file(new.fileno())
            fd = os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC)
            self._temporary.replace(self.path)
        except OSError:
            if fd >= 0:
                os.close(fd)
            self._temporary.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        fsync_folder(self.path.parent)
        self._ends = self._ends[:index] + [each + start + len(data) - end for each in self._ends[index:]]


def result_line(head: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
    """One line: head, the trace, and what was measured apart from it."""
    values = trace.to_json()
    measured = {name: values.pop(name) for name in _MEASURED}
    return {**head, "trace": values, "measured": measured}


def read_traces(path: str | Path) -> Iterator[tuple[dict[str, Any], Trace | None]]:
    """Each whole line of a batch's file, without "trace" and "measured", and its Trace; None where there was an error.

    Raises SourceError naming the line that is damaged.
    """
    for line, _ in _lines(Path(path)):
        trace = None
        if "trace" in line:
            where = f"{path}: line {line['index'] + 1:,}"
            trace = Trace.from_json({**line["trace"], **line.get("measured", {})}, where=where)
        yield _slim(line), trace


def _slim(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("trace", "measured")}


def _check_torn(path: Path, torn: bytes) -> None:
    """Refuse to cut off what is no torn line of ours. torn: the first bytes behind the last newline."""
    if not _BEGINNING.startswith(torn):
        raise SourceError(
            f"{path}: ends in a line that is no result and has no newline. The file holds something else; choose "
            "another output."
        )


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line, and the place behind it; what follows the last newline is a torn line."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Give a file of results.')}") from error
    end = 0
    with file:
        for index, text in enumerate(file):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SourceError(
                    f"{path}: line {index + 1:,} is not JSON ({error}). The file is damaged; move it away, or cut it "
                    "before that line to answer again from there."
                ) from error
            if not isinstance(line, dict) or line.get("index") != index or not isinstance(line.get("run"), dict):
                raise SourceError(
                    f"{path}: line {index + 1:,} is not the result of question {index:,}. The file holds something "
                    "else, or it was edited; choose another output."
                )
            for name in ("trace", "measured"):
                if not isinstance(line.get(name, {}), dict):
                    raise SourceError(
                        f"{path}: line {index + 1:,}: {name} is a {type(line[name]).__name__}, expected an object. The "
                        "file was edited; choose another output."
                    )
            end += len(text)
            yield line, end
