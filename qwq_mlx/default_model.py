"""Which model runs: the one that is named, or a default.

In order: the folder that is named, $QWQ_MLX_MODEL, the first finished conversion of a QwQ-32B under conversions/ (of
the current folder, then of the checkout this package lies in), else the pocket model that ships with the package. The
pocket's 4-bit conversion is made once in the user's cache folder, by whoever comes first; its folder is named after the
digest of checkpoint and recipe, so another one of these gets another conversion. A GGUF that is named is converted once
in the same way, by the recipe that keeps its codes.

Does not: load, or download.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_mlx.errors import ConversionError, LoadError, SourceError, system_said
from qwq_mlx.facts import MODELS
from qwq_mlx.files.gguf.checkpoint import files_of_model
from qwq_mlx.files.gguf.stores import GgufFile, find_gguf
from qwq_mlx.files.user_folders import user_cache_folder
from qwq_mlx.quant.recipe import load_recipe

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan

__all__ = [
    "Choice",
    "choose_model",
    "pocket_checkpoint",
    "pocket_model",
    "ready_model",
]

_RECIPE = "pocket-4bit"
_PACKAGE = Path(__file__).resolve().parent
_VARIABLE = "QWQ_MLX_MODEL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """folder: the model to load. note: one line for a person, "" where they named the model themselves.

    source: what `folder` must be converted from first, None if it is there. recipe: by which; None is the source's own.
    """

    folder: Path
    note: str = ""
    source: str | Path | None = None
    recipe: str | None = None


def choose_model(named: str | Path | None, environment: Mapping[str, str] | None = None) -> Choice:
    """The folder of the model to run.

    named: what the user named: a folder, a GGUF (see files.gguf.stores), which is converted once into the user's cache,
      or a repository (by name or address) in the Hub's cache; or None.
    Raises SourceError for a GGUF that is not there; LoadError for a repository that the cache does not have, and where
    nothing is named and the package has no pocket checkpoint.
    """
    environment = os.environ if environment is None else environment
    if named is not None:
        if (gguf := find_gguf(named)) is not None:
            return _gguf_model(named, gguf, environment)
        return Choice(folder=_named_folder(named))
    from_environment = environment.get(_VARIABLE)
    if from_environment:
        return Choice(folder=Path(from_environment), note=f"model: {from_environment} (from ${_VARIABLE})")
    for folder in _conversions((Path.cwd() / "conversions", _PACKAGE.parent / "conversions")):
        return Choice(folder=folder, note=f"model: {folder}")
    return pocket_model(environment)


def ready_model(named: str | Path | Choice | None, note: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the model to run, there and whole; the pocket model is converted first where that is needed.

    named: as `choose_model` takes it, or what that returned.
    note: shows a line that says which model it is where none was named, and one before a conversion.
    Two processes at once: the one that comes second uses what the first made.
    Raises LoadError where there is no model or the cache folder cannot be written, and what a conversion raises.
    """
    choice = named if isinstance(named, Choice) else choose_model(named)
    if choice.note:
        note(choice.note)
    if choice.source is not None:
        what = "the pocket model to 4 bits" if choice.recipe == _RECIPE else str(choice.source)
        note(f"converting {what}, once: {choice.folder}")
        _convert(choice, note)
    return choice.folder


def _gguf_model(named: str | Path, gguf: GgufFile, environment: Mapping[str, str]) -> Choice:
    """The conversion of a GGUF in the user's cache: called what the user called it, and after the file's digest, or the
    place, size and time of change of each of its files."""
    files = files_of_model(gguf.path)
    identity = gguf.sha256 or "\0".join(map(_identity, files))
    label = files[0].name if gguf.label == gguf.path.name else gguf.label  # whichever part of a split one was named
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", label.removesuffix(".gguf"))[:80]
    folder = user_cache_folder(environment) / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    return Choice(folder=folder, source=None if (folder / "config.json").is_file() else named)


def _identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        said = system_said(error, "Check that it exists and is readable.")
        raise SourceError(f"{path}: cannot be opened {said}") from error
    return f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"


def _named_folder(named: str | Path) -> Path:
    """A folder as it is; a repository's name or address becomes its snapshot in the Hub's cache."""
    if not isinstance(named, str) or os.path.lexists(named):
        return Path(named)
    from qwq_mlx.files.hub.repository import cached_snapshot, parse_repository  # here: it takes a third of a second

    repository = parse_repository(named)
    if repository is None:
        return Path(named)
    if cached := cached_snapshot(*repository):
        return cached[0]
    raise LoadError(
        f"{named}: there is no such folder, and the Hub's cache has no such model. Give the folder of a model, or "
        f"fetch a finished conversion first: hf download {repository[0]}"
    )


def _convert(choice: Choice, note: Callable[[str], None]) -> None:
    from qwq_mlx.convert import convert_checkpoint  # here, because it comes with heavy imports
    from qwq_mlx.convert.plan_text import plan_text

    folder, source = choice.folder, choice.source
    assert source is not None  # or there is nothing to convert
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder.parent).free

        def show(plan: Plan) -> None:
            if choice.recipe is None:
                note(plan_text(plan, str(folder), free_bytes))

        convert_checkpoint(source, folder, recipe=choice.recipe, quality=False, on_plan=show)
    except OSError as error:
        raise LoadError(
            f"{folder}: the conversion of {source} has no place, for this folder cannot be written "
            + system_said(error, "Set XDG_CACHE_HOME to a folder that can be written, or name the folder of a model.")
        ) from error
    except ConversionError:
        if not (folder / "config.json").is_file():
            raise


def pocket_model(environment: Mapping[str, str] | None = None) -> Choice:
    """The bundled pocket model at 4 bits. Raises LoadError where the package has no pocket checkpoint."""
    environment = os.environ if environment is None else environment
    source = pocket_checkpoint()
    if not (source / "config.json").is_file():
        raise LoadError(
            f"{source}: the pocket model is not there, and no other model is named. "
            f"Name the folder of one or set {_VARIABLE}; python -m qwq_mlx.convert makes a folder from a checkpoint."
        )
    folder = user_cache_folder(environment) / f"{_RECIPE}-{_digest(source)[:16]}"
    note = (
        "model: the bundled pocket model, which knows only small puzzles. For QwQ-32B-Preview: "
        "python -m qwq_mlx.convert, then give its folder as `model`"
    )
    missing = None if (folder / "config.json").is_file() else source
    return Choice(folder=folder, note=note, source=missing, recipe=_RECIPE)


def pocket_checkpoint() -> Path:
    """Where the bundled bfloat16 checkpoint lies."""
    return _PACKAGE / "pocket" / "checkpoint"


def _conversions(places: Iterable[Path]) -> Iterable[Path]:
    """Finished conversions of a QwQ-32B, by name. A folder under its final name is finished: it came by one rename."""
    for place in places:
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if folder.suffix != ".partial" and _is_big(folder / "config.json"):
                yield folder


def _is_big(config: Path) -> bool:
    try:
        value = json.loads(config.read_bytes())
    except (OSError, ValueError):  # no model folder, or a damaged one: not a candidate
        return False
    if not isinstance(value, dict) or "quantization" not in value:
        return False
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    return any(
        model.repository is not None and all(value.get(name) == getattr(model, name) for name in names)
        for model in MODELS
    )


def _digest(folder: Path) -> str:
    """sha256 over the recipe and the names and bytes of the pocket checkpoint's files (24 MB at most, 20 ms)."""
    total = hashlib.sha256(load_recipe(_RECIPE).text.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
