"""A run on disk: everything that the next token depends on, in one safetensors file that proves itself.

The tensors are the KV cache and, last, the bytes of the state as JSON: ids, settings, place in the stream of random
numbers, what was noticed. (As a text of the header it would be cut short: `read_header` takes no text above 65,536
bytes, some 1,300 tokens.) A sha256 in the header covers all. The file gets its name by a rename once its bytes are on
the disk, so a kill or a full disk leaves the old file, or none. A digest of the model folder decides whether weights
and tokenizer are the same.

Does not: know what a run is (`run` does), or compress the cache: it is 256 KiB a token for QwQ-32B.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from qwq_mlx.engine.ranks.whole_cache import NO_CACHE, WholeCache, type_name
from qwq_mlx.errors import SavingError, SourceError, system_said
from qwq_mlx.files.atomic import fsync_file, fsync_folder
from qwq_mlx.files.header import Header, place_tensors, read_header
from qwq_mlx.files.manifest import MANIFEST_NAME

__all__ = ["SCHEMA_VERSION", "model_digest", "read_checkpoint", "read_state_value", "write_checkpoint"]

SCHEMA_VERSION = 4  # 3: the noise of a draw was tied to a place, not to an id
_FORMAT = "qwq_mlx run"
_STATE = "state"
_DTYPES = {"uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint32": "U32"}
_CHUNK_BYTES = 8 << 20


def write_checkpoint(
    path: Path, state: Mapping[str, Any], arrays: Mapping[str, mx.array], cache: WholeCache = NO_CACHE
) -> None:
    """Write state and arrays; the file appears whole or not at all.

    cache: behind the arrays, an array at a time.
    Raises SavingError where the disk does not take it; the run itself is not touched by that.
    """
    text = mx.array(np.frombuffer(json.dumps(state, ensure_ascii=True, separators=(",", ":")).encode(), np.uint8))
    forms = [(name, tuple(array.shape), type_name(array)) for name, array in arrays.items()]
    forms += [*cache.forms, (_STATE, tuple(text.shape), type_name(text))]
    layout = [(name, _DTYPES[kind], shape) for name, shape, kind in forms]
    n_bytes = place_tensors(layout)[1][-1].end
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is there and no regular file", str(path))
        with temporary.open("wb") as file, closing(cache.arrays):
            _write(file, layout, chain(arrays.values(), cache.arrays, [text]))
            file.flush()
            fsync_file(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise SavingError(
            f"{path}: the run cannot be saved {system_said(error, 'Make room, or give another place.')} "
            f"The run needs {n_bytes:,} bytes.",
            error,
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, layout: Sequence[tuple[str, str, tuple[int, ...]]], arrays: Iterable[mx.array]) -> None:
    """Header and arrays; the digest, which is known at the end, takes the place of zeros."""
    total = hashlib.sha256()
    file.write(_head(layout, "0" * len(total.hexdigest())))
    for array in arrays:
        data = _bytes_of(array)
        total.update(data)
        file.write(data)
    total.update(repr(layout).encode())
    file.seek(0)
    file.write(_head(layout, total.hexdigest()))


def _head(layout: Sequence[tuple[str, str, tuple[int, ...]]], digest: str) -> bytes:
    return place_tensors(layout, {"format": _FORMAT, "schema": str(SCHEMA_VERSION), "sha256": digest})[0]


def read_checkpoint(path: Path) -> tuple[Any, dict[str, mx.array]]:
    """State and arrays of a file that `write_checkpoint` wrote, every byte checked; `state` and `resume` check the
    rest.

    Raises SourceError: no such file, another format or schema, a digest that does not fit, or no state.
    """
    header = _checked_header(path)
    total = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.data_start)
        for chunk in _chunks(file):
            total.update(chunk)
    entries = sorted(header.tensors.values(), key=lambda entry: entry.start)
    total.update(repr([(entry.name, entry.dtype, tuple(entry.shape)) for entry in entries]).encode())
    if total.hexdigest() != header.metadata.get("sha256"):
        raise SourceError(f"{path}: the sha256 does not fit, so the file is damaged or edited. It cannot be resumed.")
    return _loaded(path, header)


def read_state_value(path: Path) -> Any:
    """The state of a saved run as JSON values, without its arrays and without MLX; only `read_checkpoint` proves it.

    Raises SourceError: no such file, another format or schema, or no state.
    """
    header = _checked_header(path)
    entry = header.tensors.get(_STATE)
    if entry is None:
        raise SourceError(f"{path}: the array {_STATE!r} is missing. The file is edited; it cannot be resumed.")
    with path.open("rb") as file:
        file.seek(entry.start)
        return _state_value(path, file.read(entry.end - entry.start))


def _checked_header(path: Path) -> Header:
    header = read_header(path)
    file_format, schema = (header.metadata.get("format"), header.metadata.get("schema"))
    if file_format != _FORMAT:
        raise SourceError(f"{path}: is no saved run of qwq_mlx. Give the file of a saved run.")
    if schema != str(SCHEMA_VERSION):
        raise SourceError(
            f"{path}: is a saved run of schema {schema}, expected {SCHEMA_VERSION}. "
            "Resume it with the version of qwq_mlx that wrote it."
        )
    return header


def _loaded(path: Path, header: Header) -> tuple[Any, dict[str, mx.array]]:
    """State and arrays of a file whose digest fits, which everybody can work out."""
    known, entry = set(_DTYPES.values()), header.tensors.get(_STATE)
    for each in header.tensors.values():
        if each.dtype not in known:
            raise SourceError(
                f"{path}: the array {each.name} is {each.dtype}, expected one of {', '.join(sorted(known))}. "
                "The file is edited; it cannot be resumed."
            )
    if entry is None or entry.dtype != _DTYPES["uint8"] or len(entry.shape) != 1:
        actual = "is missing" if entry is None else f"is {entry.dtype} {tuple(entry.shape)}"
        raise SourceError(
            f"{path}: the array {_STATE!r} {actual}, expected U8 with one axis, the run's state as JSON. "
            "The file is edited; it cannot be resumed."
        )
    arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
    return _state_value(path, _bytes_of(arrays.pop(_STATE))), arrays


def _state_value(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: the run's state is no JSON ({error}). The file is edited; it cannot be resumed."
        ) from error


def model_digest(folder: Path) -> str:
    """sha256 of what makes the model: its manifest where there is one (it holds all digests), else all files' bytes."""
    manifest = folder / MANIFEST_NAME
    files = [manifest] if manifest.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for chunk in _chunks(file):
                total.update(chunk)
    return total.hexdigest()


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _bytes_of(array: mx.array) -> bytes:
    raw: Any = mx.contiguous(array).view(mx.uint8)  # an mx.array is a buffer, which its type does not say
    return bytes(memoryview(raw))
