"""One rule for every file that a command writes, checked before anything slow starts, so that no input is overwritten.

A file to be written is a new name or a regular file, in a folder that is there and can be written in; it is none of the
command's inputs or other outputs, whatever links and case lead to it, and does not lie in a model's folder.

Does not: open or lock the file, or write anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwq_mlx.errors import OptionError

__all__ = ["check_name", "check_output_file", "check_output_files", "lies_in"]

_MAX_NAME_BYTES = 255  # of every file system in use
_DECORATION_BYTES = 32  # ".NAME.<process>.tmp", "NAME.lock", "NAME.<digest>.safetensors"


def check_output_files(
    outputs: Mapping[str, str | Path | None], *, inputs: Iterable[str | Path | None], folders: Iterable[Path] = ()
) -> None:
    """Check all files that a command writes. None stands for an option that was not given.

    outputs: by the name of the option, which begins the message.
    inputs: files that the command reads.
    folders: that nothing may be written in: of a model, of a source.
    Raises OptionError as `check_output_file` does, and where two outputs are one file.
    """
    named = {name: path for name, path in outputs.items() if path is not None}
    read = [Path(path) for path in inputs if path is not None]
    for name, path in named.items():
        check_output_file(path, name=name, inputs=read, folders=folders)
    for name, path in named.items():
        for other, same in named.items():
            if name < other and _is_same(Path(path), Path(same)):
                raise OptionError(f"{name} and {other} are both {str(path)!r}. Give each a file of its own.")


def check_output_file(
    path: str | Path, *, name: str, inputs: Iterable[Path] = (), folders: Iterable[Path] = ()
) -> None:
    """Check one file to be written.

    name: of the option or argument, which begins the message.
    Raises OptionError: an empty or too long name, a folder, device, FIFO or socket, a parent that is missing or cannot
    be written in, an input, or a place in one of the folders.
    """
    text, path = os.fspath(path), Path(path)
    if not text or not path.name or path.is_dir():
        what = "a folder" if text else "empty"
        raise OptionError(f"{name} is {text!r}, which is {what}, expected the name of a file.")
    check_name(path, name=name)
    if path.exists() and not path.is_file():
        raise OptionError(
            f"{name} is {text!r}, which is a device, a pipe or a socket, expected a new name or a regular file. "
            "To send the text elsewhere, redirect stdout."
        )
    if not path.parent.is_dir():
        raise OptionError(f"{name} is {text!r}, but there is no folder {str(path.parent)!r}. Make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OptionError(f"{name} is {text!r}, but {str(path.parent)!r} cannot be written in. Choose another folder.")
    for each in inputs:
        if _is_same(path, each):
            raise OptionError(f"{name} is {text!r}, which is read by the same command ({each}). Give another name.")
    for folder in folders:
        if lies_in(path, folder):
            raise OptionError(f"{name} is {text!r}, which lies in the model's folder {folder}. Give a place outside.")


def check_name(path: Path, *, name: str) -> None:
    """Raises OptionError for a name that, with what is put around it while it is written, is too long for a disk."""
    n_bytes = len(os.fsencode(path.name))
    if n_bytes > _MAX_NAME_BYTES - _DECORATION_BYTES:
        raise OptionError(
            f"{name} has a name of {n_bytes} bytes, expected at most {_MAX_NAME_BYTES - _DECORATION_BYTES}. "
            "Give a shorter one."
        )


def _is_same(one: Path, other: Path) -> bool:
    """By device and inode, so through links and on disks that fold case; of names that are not there, by their path."""
    try:
        return one.samefile(other)
    except OSError:
        return one.absolute() == other.absolute()


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file, there or not, is somewhere below a folder that is there."""
    return folder.is_dir() and any(_is_same(parent, folder) for parent in path.resolve().parents)
