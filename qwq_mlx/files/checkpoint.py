"""A checkpoint's folder becomes one checked value: its config, its shards in order, and where every tensor lies.

What is read is what the index names, and the index must agree with the shards' own headers: no shard missing, none
beside them that a glob would pick up, no tensor twice. Every file is a regular file inside the folder (or where
`files.links` lets a link lead: the Hub's cache). No tensor data is read, so 17 shards take milliseconds.

Does not: compare tensors with an architecture (`model.architecture` does), hash, or open any file of code.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.header import Header, TensorEntry, read_header
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.files.links import check_link
from qwq_mlx.files.reading import recognise
from qwq_mlx.files.tensor_names import with_usual_names
from qwq_mlx.files.unread_tensors import drop_unread_tensors

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_NAME",
    "SUFFIX",
    "Checkpoint",
    "GgufFacts",
    "assemble_checkpoint",
    "open_checkpoint",
    "read_weight_map",
]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 8 << 20
_MAX_NAMES = 10
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model", "")  # tokenizers, templates, LICENSE
_SHARD_PREFIX = "model"
_FETCH = "Fetch the checkpoint again, all files from one commit."


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What is known of a checkpoint that is a GGUF.

    path: its file, or the first of a split one.
    label: what the user called it.
    name: the model's, by its metadata and vocabulary.
    sha256: that the file has where whoever stored it says so (Ollama); it is compared once the file has been read.
    """

    path: Path
    label: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked folder: config, shards in the index's order of names, and each tensor's shard and place.

    extra_files: every other regular file directly in the folder, by name, sorted; hidden files and folders are not in
    it. Whether one is wanted (a tokenizer) or not (code, pickles) is the caller's to say.
    warnings: what was ignored or looks odd, in sentences.
    gguf: what is known of a GGUF, whose folder holds small files made of its metadata and whose tensors have GGUF's
      types; None for every other checkpoint.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Header, ...]
    tensors: Mapping[str, tuple[Header, TensorEntry]]
    extra_files: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    gguf: GgufFacts | None = None

    @property
    def where(self) -> Path:
        """What messages call it: its folder, or the GGUF file."""
        return self.folder if self.gguf is None else self.gguf.path

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(entry.end - entry.start for _, entry in self.tensors.values())


def open_checkpoint(folder: Path, *, follow_links: bool = False) -> Checkpoint:
    """Check a local folder (a checkpoint, a conversion, a snapshot of the Hub's cache) and read its headers.

    follow_links: read shards that links out of the folder lead to.
    Raises SourceError naming the file, what was found, what was expected and what to do.
    """
    names, link_warnings = _regular_files(folder, follow_links=follow_links)
    config = read_json_object(folder / CONFIG_NAME, limit_bytes=_MAX_CONFIG_BYTES, advice=_FETCH)
    present = [name for name in names if name.endswith(SUFFIX)]
    weight_map = read_weight_map(folder / INDEX_NAME) if INDEX_NAME in names else None
    wanted = _only_shard(folder, names, present) if weight_map is None else sorted(set(weight_map.values()))
    ignored = _check_shards_present(folder, wanted, present)
    extra = tuple(name for name in names if name not in {CONFIG_NAME, INDEX_NAME, *present})
    for name in extra:
        _check_extra(folder / name)
    return assemble_checkpoint(
        folder,
        config=config,
        weight_map=weight_map,
        shards=[read_header(folder / name) for name in wanted],
        extra_files=extra,
        warnings=[*link_warnings, *ignored],
    )


def assemble_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any],
    weight_map: Mapping[str, str] | None,
    shards: Sequence[Header],
    extra_files: Sequence[str],
    warnings: Sequence[str] = (),
) -> Checkpoint:
    """Join headers that were read already (from a folder, or over the network) into a checkpoint.

    weight_map: tensor -> shard name as the index has it, or None for a single shard without an index.
    Tensors that every program computes or ties instead of reading them are left out, with a warning.
    Raises SourceError for a tensor in two shards and for every disagreement between index and headers.
    """
    tensors: dict[str, tuple[Header, TensorEntry]] = {}
    for header in shards:
        for name, entry in header.tensors.items():
            if name in tensors:
                raise SourceError(
                    f"{header.path}: tensor {name} is also in {tensors[name][0].path.name}, expected it once. {_FETCH}"
                )
            tensors[name] = (header, entry)
    if not tensors:
        raise SourceError(f"{folder}: its shards hold no tensor. {_FETCH}")
    if weight_map is not None:
        _check_agreement(folder / INDEX_NAME, weight_map, tensors)
    shards, tensors, prefix_warnings = with_usual_names(folder, shards, tensors)
    ignored = [*prefix_warnings, *drop_unread_tensors(folder, config, tensors)]
    used = {header.path for header, _ in tensors.values()}
    return Checkpoint(
        folder=folder,
        config=config,
        shards=tuple(header for header in shards if header.path in used),
        tensors=tensors,
        extra_files=tuple(sorted(extra_files)),
        warnings=(*warnings, *ignored),
    )


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> shard name from an index file; every name is a plain file name.

    Raises SourceError for a damaged index and for a name that would leave the folder.
    """
    index = read_json_object(path, limit_bytes=_MAX_INDEX_BYTES, advice=_FETCH)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        actual = "empty" if weight_map == {} else type(weight_map).__name__
        raise SourceError(f"{path}: weight_map is {actual}, expected an object of tensor and shard names. {_FETCH}")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise SourceError(
                f"{path}: weight_map puts {tensor[:200]!r} in {str(shard)[:200]!r}, expected the name of a {SUFFIX} "
                f"file in the same folder. {_FETCH}"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """A shard's name that stays in its folder on every system, and is safe to print."""
    is_safe = name.isprintable() and not set(name) & set('/\\:<>"|?*')
    return is_safe and name.endswith(SUFFIX) and not name.startswith(".") and len(name) <= 200


def _regular_files(folder: Path, *, follow_links: bool) -> tuple[list[str], list[str]]:
    """Names of the folder's regular files, sorted, and warnings of links; FIFOs and devices are refused."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder}: there is no such folder. Give a checkpoint's folder ({CONFIG_NAME}, *{SUFFIX}, tokenizer.json)."
        ) from error
    except NotADirectoryError as error:
        advice = "Convert it first" if folder.suffix == ".gguf" else "Give the folder it lies in"
        raise SourceError(f"{folder}: is a file, expected the folder of a checkpoint. {advice}.") from error
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed {system_said(error, 'Check its permissions.')}") from error
    names, warnings = [], []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and (warning := check_link(Path(entry.path), folder, follow=follow_links)):
            warnings.append(warning)
        if entry.is_file():
            names.append(entry.name)
        elif not entry.is_dir() or entry.name.endswith(SUFFIX):
            kind = "a folder" if entry.is_dir() else _special(Path(entry.path))
            raise SourceError(f"{entry.path}: is {kind}, expected a regular file. Replace it with the file itself.")
    return names, warnings


def _special(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken link"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket or device"


def _only_shard(folder: Path, names: Sequence[str], present: Sequence[str]) -> list[str]:
    """Without an index a checkpoint is one shard that does not claim to be one of several."""
    if not present:
        other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".npz"))]
        if gguf := [name for name in names if name.endswith(".gguf")]:
            raise SourceError(f"{folder}: holds {gguf[0]}. Give that file itself: {folder / gguf[0]}")
        has = f"only {', '.join(other[:_MAX_NAMES])}, which qwq_mlx does not open" if other else "none"
        raise SourceError(f"{folder}: expected {SUFFIX} files, found {has}. Fetch the safetensors of the model.")
    candidates = [name for name in present if name.startswith(_SHARD_PREFIX)] or list(present)
    if len(candidates) == 1 and ("-of-" not in candidates[0] or "-00001-of-00001" in candidates[0]):
        return candidates
    raise SourceError(
        f"{folder}: {_count_files(present)} ({_names(present)}) and no {INDEX_NAME}, which says how the shards belong "
        f"together. {_FETCH}"
    )


def _check_shards_present(folder: Path, wanted: Sequence[str], present: Sequence[str]) -> list[str]:
    """Refuse missing and stale shards; returns warnings for files that are no shards of this model.

    Those are what mlx-lm's glob model*.safetensors leaves out (adapters), and the whole model in one file beside its
    shards: the index says which of the two is meant.
    """
    if missing := sorted(set(wanted) - set(present)):
        raise SourceError(
            f"{folder}: {len(missing):,} of {len(wanted):,} shards missing: {_names(missing)}. "
            "Fetch them from the same commit as the others."
        )
    others = sorted(set(present) - set(wanted))
    if stale := [name for name in others if name.startswith(_SHARD_PREFIX) and name != SINGLE_NAME]:
        raise SourceError(
            f"{folder}: {_count_files(stale)} that {INDEX_NAME} does not name: {_names(stale)}. "
            "Remove what is left of an older version, or fetch the index again."
        )
    return [f"{folder}: ignored {_names(others)}, read {_names(wanted)}."] if others else []


def _check_agreement(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, tuple[Header, TensorEntry]]
) -> None:
    lines = []
    if absent := sorted(weight_map.keys() - tensors.keys()):
        lines.append(f"{len(absent):,} in the index alone: {_names(absent)}.")
    if unnamed := sorted(tensors.keys() - weight_map.keys()):
        lines.append(f"{len(unnamed):,} in the shards alone: {_names(unnamed)}.")
    elsewhere = [
        f"{name} (in {tensors[name][0].path.name}, not {weight_map[name]})"
        for name in sorted(weight_map.keys() & tensors.keys())
        if tensors[name][0].path.name != weight_map[name]
    ]
    if elsewhere:
        lines.append(f"{len(elsewhere):,} in another shard: {_names(elsewhere)}.")
    if lines:
        raise SourceError(f"{index}: does not agree with the shards on their tensors. {' '.join(lines)} {_FETCH}")


def _check_extra(path: Path) -> None:
    """A pointer or an error page in place of a tokenizer file would be copied as it is; call it by its name.

    Code, pickles and whatever else no one here reads are not even opened.
    """
    if path.suffix not in _TEXT_SUFFIXES:
        return
    try:
        with path.open("rb") as file:
            wrong = recognise(file.read(512))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Check its permissions.')}") from error
    if wrong and (wrong.startswith("a git-lfs") or path.suffix == ".json"):
        raise SourceError(f"{path}: is {wrong}. {_FETCH}")


def _count_files(names: Sequence[str]) -> str:
    return f"{len(names):,} {SUFFIX} file{'s' if len(names) != 1 else ''}"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES:,} more"
