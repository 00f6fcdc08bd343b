"""The folder beside an output that an unfinished tuning lives in: begun, gone on with, and gone when it is published.

    output.partial/  tuning.json               what decides the result; a tuning of something else does not go on here
                     before.json               tokens a pass of the drafter as it was
                     step-N.safetensors        all that the steps behind N depend on
                     model/                    the tuned drafter; renamed to the output in the end
                     result.json               what is printed, once model/ is whole

Every file appears whole or not at all, so a kill at any moment loses the steps since the last one at most.

Does not: train, or decide what is published.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.errors import ConversionError, DiskFullError, OutOfMemoryError, SourceError, system_said
from qwq_mlx.files.atomic import fsync_file, fsync_folder, publish, write_file
from qwq_mlx.files.json_object import read_json_object

__all__ = ["Staging"]

_DESCRIPTION, _BEFORE, _RESULT, _MODEL = "tuning.json", "before.json", "result.json", "model"
_STEP = "step-{}.safetensors"
_MAX_BYTES = 16 << 20
_FULL_BYTES = 1 << 20  # with less room than this a disk counts as full
_MARGIN = 1.05  # file systems need a little more than the bytes


class Staging:
    """An unfinished tuning of one output. description: of what decides the result, as JSON values."""

    def __init__(self, output: Path, description: Mapping[str, Any]) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.partial")
        self.model = self.folder / _MODEL
        self._description = dict(description)

    @property
    def is_ours(self) -> bool:
        """Whether the folder holds this very tuning."""
        path = self.folder / _DESCRIPTION
        return path.is_file() and self._read(path) == self._description

    def published_result(self) -> dict[str, Any] | None:
        """The result of this very tuning where it was published, and stopped right after; else None."""
        path = self.folder / _RESULT
        if not (self.output.is_dir() and self.is_ours and path.is_file()) or self.model.exists():
            return None
        return self._read(path)

    def open(self, *, restart: bool) -> None:
        """Go on with the folder, or begin it. Raises ConversionError for a folder of something else; OSError."""
        if os.path.lexists(self.folder):
            path = self.folder / _DESCRIPTION
            if not path.is_file() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
                raise ConversionError(
                    f"{self.folder}: is no unfinished tuning, but has the name of one. Move it away, or choose another "
                    "output."
                )
            if path.is_file() and not restart and not self.is_ours:
                raise ConversionError(
                    f"{self.folder}: holds an unfinished tuning with other {self._differences(path)}. Repeat its "
                    "command, or pass `restart=True` to begin anew."
                )
            if restart:
                self._remove()
        if not self.folder.exists():
            self.folder.mkdir()
        if not self.is_ours:
            self._write(_DESCRIPTION, self._description)

    def check_disk(self, needed_bytes: int) -> None:
        """Raises DiskFullError where the disk has less room, beside what the folder holds of it already."""
        needed_bytes -= sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes * _MARGIN:
            raise DiskFullError(
                f"{self.folder}: the tuning needs {needed_bytes * _MARGIN / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB "
                "are free. Make room, or choose another output."
            )

    def once(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before the first step: now, or when this tuning began."""
        path = self.folder / _BEFORE
        if not path.is_file():
            self._write(_BEFORE, measure())
        return self._read(path)

    def save_step(self, n_taken: int, arrays: Mapping[str, Any]) -> None:
        """Keep all that the next steps depend on, in place of what was kept before."""
        path = self.folder / _STEP.format(n_taken)
        if path.exists():
            return
        self._save(path, arrays)
        for other in self.folder.glob(_STEP.format("*")):
            if other != path:
                other.unlink()

    def last_step(self) -> tuple[int, dict[str, Any]] | None:
        """The last step that was kept, and what `save_step` got there. Raises SourceError where it is damaged."""
        names = (path.stem.removeprefix("step-") for path in self.folder.glob(_STEP.format("*")))
        last = max((int(name) for name in names if name.isdecimal()), default=None)
        if last is None:
            return None
        path = self.folder / _STEP.format(last)
        try:
            arrays: Any = mx.load(str(path), format="safetensors")
        except RuntimeError as error:  # MLX's word for every fault of a file
            raise SourceError(f"{path}: cannot be read ({error}). Pass `restart=True` to begin anew.") from error
        return last, arrays

    def write_model(self, weights: Mapping[str, Any], small_files: Mapping[str, bytes]) -> None:
        """Make the folder of the tuned drafter anew."""
        if self.model.exists():
            shutil.rmtree(self.model)
        self.model.mkdir()
        for name, data in small_files.items():
            with _written(self.model / name):
                write_file(self.model / name, data)
        self._save(self.model / "model.safetensors", weights)

    def publish(self, result: Mapping[str, Any]) -> None:
        """Give the drafter its name, and remove what is not needed any more."""
        self._write(_RESULT, result)
        publish(self.model, self.output, replace=False)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        self._remove()
        fsync_folder(self.output.parent)

    def _remove(self) -> None:
        """What says whose the folder is goes last, for a kill meanwhile would leave what no command goes on with."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".safetensors":
                path.unlink()
        shutil.rmtree(self.folder)

    def _differences(self, path: Path) -> str:
        begun = self._read(path)
        names = sorted(begun.keys() | self._description.keys())
        return ", ".join(f"`{name}`" for name in names if begun.get(name) != self._description.get(name))

    def _read(self, path: Path) -> dict[str, Any]:
        return read_json_object(path, limit_bytes=_MAX_BYTES, advice="Pass `restart=True` to begin anew.")

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        path = self.folder / name
        with _written(path):
            write_file(path, (json.dumps(value, ensure_ascii=False) + "\n").encode())

    def _save(self, path: Path, arrays: Mapping[str, Any]) -> None:
        """As safetensors. Raises ConversionError where the disk does not take it."""
        temporary = path.with_name("unfinished.safetensors")
        try:
            with _written(path):
                mx.save_safetensors(str(temporary), dict(arrays), metadata={"format": "mlx"})
                fd = os.open(temporary, os.O_RDWR)
                fsync_file(fd)
                os.close(fd)
                temporary.replace(path)
                fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # what is there of it would fill the disk


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises DiskFullError or ConversionError where the block cannot write the file."""
    advice = "Make room, or see to the folder, and run the same command again."
    try:
        yield
    except OSError as error:
        kind = DiskFullError if DiskFullError.is_meant_by(error) else ConversionError
        raise kind(f"{path}: cannot be written {system_said(error, advice)}") from error
    except RuntimeError as error:  # MLX's word for every fault of a file, and of the arrays that are computed now
        if OutOfMemoryError.is_meant_by(error):
            raise
        kind = DiskFullError if shutil.disk_usage(path.parent).free < _FULL_BYTES else ConversionError
        raise kind(f"{path}: cannot be written ({error}). {advice}") from error
