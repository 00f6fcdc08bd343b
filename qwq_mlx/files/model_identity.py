"""Whether two machines have the same model and the same versions, in an instant and without MLX.

Does not: prove bytes (`background_verification` does).
"""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qwq_mlx import __version__
from qwq_mlx.files.manifest import MANIFEST_NAME

__all__ = [
    "MACHINE_VARIABLE",
    "found_folder",
    "how_to_copy",
    "machine_name",
    "model_identity",
    "other_versions",
    "possible_folders",
    "versions",
]

MACHINE_VARIABLE = "QWQ_MLX_MACHINE"
"""Tells containers apart that take themselves for one machine."""

_END_BYTES = 64 << 10


def model_identity(folder: Path) -> str:
    """The digest of a conversion's manifest, which has those of all bytes; else of names, sizes and last bytes of all
    files. Models that were trained from one have the same sizes; what a desktop leaves behind (.DS_Store) is no part.
    """
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return hashlib.sha256(repr([(path.name, path.stat().st_size, _end(path)) for path in paths]).encode()).hexdigest()


def _end(path: Path) -> bytes:
    """The last bytes of a file; all of a small one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return file.read()


def possible_folders(folder: Path) -> list[str]:
    """Where another machine may have a folder: at the same path, or at the same place below its user's home."""
    path, home = folder.resolve(), Path.home()
    below = [f"~/{path.relative_to(home)}"] if path.is_relative_to(home) else []
    return [str(path), *below]


def how_to_copy(folder: Path) -> str:
    """What to do on a machine that lacks a folder: a process reads its part of the weights from a folder of its own
    machine, never over a network. One of huggingface_hub's cache is named by repository and commit.

    >>> how_to_copy(Path("/home/me/.cache/huggingface/hub/models--Qwen--QwQ-32B/snapshots/abc"))
    'Fetch it there (hf download Qwen/QwQ-32B --revision abc), or copy it.'
    """
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return "Copy it there."
    name = repository.removeprefix("models--").replace("--", "/", 1)
    return f"Fetch it there (hf download {name} --revision {folder.name}), or copy it."


def found_folder(places: Sequence[str]) -> Path | None:
    """The first of `possible_folders` of another machine that is there on this one."""
    return next((path for each in places if (path := Path(each).expanduser()).is_dir()), None)


def machine_name() -> str:
    """The same in all processes of this machine, and in no other machine."""
    return os.environ.get(MACHINE_VARIABLE) or f"{platform.node()} {uuid.getnode():x}"


def versions() -> dict[str, str]:
    """Of what has to be the same on all machines; "" for what is not installed."""
    return {"qwq_mlx": __version__, **{name: _version(name) for name in ("mlx", "mlx-lm")}}


def other_versions(theirs: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> str:
    """Which versions of another machine are not those of this one, in words; "" where all are. where: ours are.

    >>> other_versions({"mlx": "0.32.1"}, {"mlx": "0.32.4"}, where="here")
    'mlx 0.32.1, here 0.32.4'
    """
    differing = {name: version for name, version in ours.items() if theirs.get(name) != version}
    return "; ".join(f"{name} {theirs.get(name)}, {where} {version}" for name, version in differing.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
