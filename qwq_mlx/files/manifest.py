"""manifest.json: what a conversion was made of, how, and the digest of everything in it.

The file proves the folder, and itself: it holds a digest of its own content, and its bytes must be exactly those that
this module writes for that content, so an edit or a flipped bit anywhere is seen. At every load `check_sizes` compares
all sizes, the digests of small files and of the shards' headers (milliseconds); `verify_full` reads every byte.

Schema 4, the keys of the JSON object:
    schema      4
    digest      sha256 of the file's own bytes with this text empty
    source      repository and commit (null for a folder that names none), files: name -> size_bytes, sha256
    recipe      the recipe in full, as its TOML file parses
    fit         how scales were chosen ("min-max", "least-squares", "calibrated")
    calibration  of fit "calibrated" file, sha256, n_texts and n_ids of the text that it was fitted to; else null
    versions    program -> version (qwq_mlx, mlx, python ...)
    files       name -> size_bytes, sha256, header_sha256 (null unless a shard), for every file but the manifest
    tensors     name -> shard, dtype, shape, sha256, relative_error (null where nothing was rounded)
    quality     null, or what it lost against its source on a text: text and text_sha256, n_tokens, kl (mean, nats),
                top1_agreement, perplexity and reference_perplexity, drift by layer, worst tokens; all fields in
                qwq_mlx.quality.result.Quality
    gguf        null, or of a source that is a GGUF: label (what the user called it), name (the model's), scale_dtype,
                tensors: name of a source tensor -> its type in the file, and whether its codes were kept
    run         figures of the run: wall_s, n_workers, resumed_bytes (of the source, done by earlier runs),
                peak_memory_bytes; they differ between runs, everything above does not
Any change of a key or of its meaning gets another number; a manifest of an unknown number is refused. Schema 3 is
the same without gguf, 2 without calibration too (some builds before the first release wrote that key under 2; it is
read where it stands), and 1 without quality too; they are read as if these were null, and no longer written.

Does not: sign anything. Who can write the folder can write a manifest to match; compare its source digests with the
Hub's to know where the weights came from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.checkpoint import SUFFIX
from qwq_mlx.files.digest import ByteProgress, ShardDigest, sha256_file, sha256_header, sha256_shard
from qwq_mlx.files.header import read_header
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.json_object import read_json_object

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "FileRecord",
    "Manifest",
    "SourceRecord",
    "TensorRecord",
    "check_sizes",
    "differences",
    "files_by_size",
    "read_manifest",
    "record_file",
    "unlisted_files",
    "verify_full",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
SCHEMA = 4

_READABLE = (1, 2, 3, SCHEMA)
_ADDED_SINCE: dict[int, dict[str, None]] = {
    1: {"quality": None, "calibration": None, "gguf": None},
    2: {"calibration": None, "gguf": None},
    3: {"gguf": None},
    4: {},
}
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_NAMES = 10
_SMALL_BYTES = 64 << 20  # hashed at every load: a tokenizer.json has 7 MB, which takes 5 ms
_READ_AT_LOAD = (SUFFIX, ".json", ".jinja")  # an extra file of these kinds would change what a load gives
_ADVICE = "Convert the source again, or copy the folder again from where it was whole."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file: size, sha256 (hex) of its bytes, and for a shard the sha256 of its length and header."""

    size_bytes: int
    sha256: str
    header_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One tensor of the conversion.

    relative_error: ||dequantized - source|| / ||source|| of the matrix, on its codes; None where nothing was rounded.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    relative_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """Where the weights came from. repository, commit: None for a local folder that does not say."""

    repository: str | None
    commit: str | None
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that manifest.json says; see the module's text for each field."""

    source: SourceRecord
    recipe: Mapping[str, Any]
    fit: str
    calibration: Mapping[str, Any] | None = None
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    run: Mapping[str, float]
    quality: Mapping[str, Any] | None = None
    gguf: Mapping[str, Any] | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into a folder, whole and durable. The same manifest gives the same bytes. Raises OSError."""
    write_file(folder / MANIFEST_NAME, _encode(asdict(manifest), SCHEMA))


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against its own digest.

    Raises SourceError when it is missing, damaged, edited, or of another schema.
    """
    path = folder / MANIFEST_NAME
    value = read_json_object(path, limit_bytes=_MAX_MANIFEST_BYTES, advice=_ADVICE)
    schema = value.pop("schema", None)
    if type(schema) is not int or schema not in _READABLE:
        is_newer = type(schema) is int and schema > SCHEMA
        raise SourceError(
            f"{path}: schema is {schema!r}, expected one of {', '.join(map(str, _READABLE))}. "
            f"{'A newer qwq_mlx made it: update this one' if is_newer else 'Use the qwq_mlx that made it'}, "
            "or convert again."
        )
    digest = value.pop("digest", None)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Check the disk.')}") from error
    if _encode(value, schema) != raw:
        raise SourceError(f"{path}: its digest is {str(digest)[:80]!r}, which its content does not have. {_ADVICE}")
    try:
        return from_json_value({**_ADDED_SINCE[schema], **value}, Manifest)
    except FieldError as error:  # only a forged digest leads here
        raise SourceError(f"{path}: is not of schema {schema}: {error}. {_ADVICE}") from error


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of what lies in the folder besides the manifest's files, sorted; hidden files are not in it."""
    known = {*manifest.files, MANIFEST_NAME}
    return [
        name
        for name in sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted
        if name not in known and not name.startswith(".")
    ]


def check_sizes(folder: Path) -> Manifest:
    """The cheap check of every load: every size, the digests of small files and of shard headers.

    Raises SourceError listing what is missing, has another size or other bytes, and files beside the listed ones that a
    load would read.
    """
    return _check(folder, is_extra=lambda name: name.endswith(_READ_AT_LOAD))


def verify_full(folder: Path, progress: ByteProgress | None = None, *, n_threads: int = 4) -> Manifest:
    """Read every byte of the folder and compare it with the manifest; any file not listed is refused.

    progress: called with bytes done, from several threads. Hidden files (.DS_Store) do not count.
    Raises SourceError naming every file, and in shards every tensor, whose bytes are others.
    """
    manifest = _check(folder, is_extra=lambda name: True)
    wrong: list[str] = []
    with ThreadPoolExecutor(n_threads) as pool:
        jobs = [
            pool.submit(differences, folder / name, record, manifest, progress)
            for name, record in files_by_size(manifest)
        ]
        for job in jobs:
            wrong += job.result()
    if wrong:
        raise SourceError(_report(folder, {"of other bytes than the manifest's": wrong}))
    return manifest


def record_file(path: Path, progress: ByteProgress | None = None) -> tuple[FileRecord, ShardDigest | None]:
    """Size and digests of one file as the manifest has them; for a shard also the digest of each tensor, in one pass.

    Raises SourceError when it cannot be read or is no shard though its name says so.
    """
    if path.suffix != SUFFIX:
        return FileRecord(size_bytes=_size(path), sha256=sha256_file(path, progress)), None
    header = read_header(path)
    digest = sha256_shard(header, progress)
    return FileRecord(size_bytes=header.size_bytes, sha256=digest.file, header_sha256=digest.header), digest


def files_by_size(manifest: Manifest) -> list[tuple[str, FileRecord]]:
    """Every file that the manifest lists with its record, largest first, so that threads end together."""
    return sorted(manifest.files.items(), key=lambda item: -item[1].size_bytes)


def _check(folder: Path, *, is_extra: Callable[[str], bool]) -> Manifest:
    manifest = read_manifest(folder)
    missing, sizes, changed = [], [], []
    for name, record in sorted(manifest.files.items()):
        path = folder / name
        if not _is_plain_name(name) or not path.is_file():
            missing.append(name)
        elif (size_bytes := _size(path)) != record.size_bytes:
            sizes.append(f"{name} ({size_bytes:,} bytes, expected {record.size_bytes:,})")
        elif not _has_cheap_digest(path, record):
            changed.append(name)
    extra = [name for name in unlisted_files(folder, manifest) if is_extra(name)]
    faults = {
        "missing": missing,
        "of another size": sizes,
        "of other bytes than the manifest's": changed,
        "that the manifest does not list": extra,
    }
    if any(faults.values()):
        raise SourceError(_report(folder, faults))
    return manifest


def _has_cheap_digest(path: Path, record: FileRecord) -> bool:
    """Whether a small file, or a shard's header, has the bytes that the manifest says."""
    if record.header_sha256 is not None:
        return sha256_header(read_header(path)) == record.header_sha256
    return record.size_bytes > _SMALL_BYTES or sha256_file(path) == record.sha256


def differences(path: Path, record: FileRecord, manifest: Manifest, progress: ByteProgress | None) -> list[str]:
    """What of a file has other bytes than the manifest says: "FILE: TENSOR (sha256 1a2b…, expected 3c4d…)", or none.

    The whole file's digest alone is taken as long as all is right; which tensors are wrong is then worth a second look.
    Raises SourceError for a file that cannot be read.
    """
    sha256 = sha256_file(path, progress)
    if sha256 == record.sha256:
        return []
    tensors = sha256_shard(read_header(path), progress).tensors if path.suffix == SUFFIX else {}
    wrong = {
        name: (tensors[name], expected.sha256)
        for name, expected in manifest.tensors.items()
        if name in tensors and tensors[name] != expected.sha256
    }
    return [f"{path.name}: {name} {_compared(*pair)}" for name, pair in wrong.items()] or [
        f"{path.name} {_compared(sha256, record.sha256)}"
    ]


def _compared(actual: str, expected: str) -> str:
    return f"(sha256 {actual[:12]}…, expected {expected[:12]}…)"


def _report(folder: Path, faults: Mapping[str, list[str]]) -> str:
    lines = [f"{folder}: is not the folder that its {MANIFEST_NAME} describes."]
    for what, names in faults.items():
        if names:
            more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
            shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_MAX_NAMES])
            lines.append(f"{len(names):,} {what}: {shown}{more}.")
    return "\n".join([*lines, _ADVICE])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Check the folder.')}") from error


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _encode(content: Mapping[str, Any], schema: int) -> bytes:
    """The bytes of manifest.json: keys sorted, the digest over these bytes with an empty digest."""

    def spoken(digest: str) -> bytes:
        value = {"schema": schema, "digest": digest, **content}
        return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()

    return spoken(hashlib.sha256(spoken("")).hexdigest())
