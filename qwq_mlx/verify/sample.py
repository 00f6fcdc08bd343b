"""A part of a conversion's tensors, drawn by lot and compared with the manifest: a look that costs a second.

What is drawn is read and hashed whole. One altered tensor is met with about the drawn share of the bytes; a folder that
is damaged throughout (another model's shard, a copy that went wrong) is met at once. Drawn anew each time, many short
looks see everything in the end.

Does not: prove the folder (`files.manifest.verify_full` does).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwq_mlx.errors import OptionError, SourceError, system_said
from qwq_mlx.files.header import Header, TensorEntry, read_header
from qwq_mlx.files.manifest import Manifest

__all__ = ["check_share", "verify_sample"]

_READ_BYTES = 4 << 20
_MAX_NAMES = 10
_N_THREADS = 4


def check_share(percent: float) -> None:
    """Raises OptionError for what is no part of a folder."""
    if type(percent) not in (int, float) or not 0 < percent <= 100:
        raise OptionError(f"sample is {percent!r}, expected a number above 0, at most 100, in percent of the bytes.")


def verify_sample(
    folder: Path, manifest: Manifest, percent: float, seed: int | None, progress: Callable[[int], object] | None
) -> tuple[str, ...]:
    """Names of the tensors drawn, at least `percent` of the tensors' bytes, all as the manifest says.

    folder: its sizes and headers have been checked. seed: of the draw; None: another each time. progress: called with
    bytes read, from several threads. Raises SourceError naming every tensor that has other bytes.
    """
    headers = {name: read_header(folder / name) for name in {record.shard for record in manifest.tensors.values()}}
    places = {
        name: (headers[record.shard], _entry(headers[record.shard], name)) for name, record in manifest.tensors.items()
    }
    wanted = percent / 100 * sum(entry.end - entry.start for _, entry in places.values())
    drawn: list[str] = []
    for name in random.Random(seed).sample(sorted(places), len(places)):
        if wanted <= 0:
            break
        drawn.append(name)
        wanted -= places[name][1].end - places[name][1].start
    drawn.sort(key=lambda name: places[name][1].start - places[name][1].end)  # large ones first: threads end together

    def is_right(name: str) -> bool:
        return _sha256(*places[name], progress) == manifest.tensors[name].sha256

    with ThreadPoolExecutor(_N_THREADS) as pool:
        wrong = [name for name, right in zip(drawn, pool.map(is_right, drawn), strict=True) if not right]
    if wrong:
        raise SourceError(
            f"{folder}: {len(wrong):,} of {len(drawn):,} tensors drawn have other bytes than its manifest says: "
            f"{', '.join(sorted(wrong)[:_MAX_NAMES])}. Read all with `full=True` to see which are "
            "wrong; then convert the source again, or copy the folder again from where it was whole."
        )
    return tuple(sorted(drawn))


def _entry(header: Header, name: str) -> TensorEntry:
    try:
        return header.tensors[name]
    except KeyError:
        raise SourceError(
            f"{header.path}: has no tensor {name}, which the manifest has there. Convert the source again."
        ) from None


def _sha256(header: Header, entry: TensorEntry, progress: Callable[[int], object] | None) -> str:
    digest = hashlib.sha256()
    try:
        fd = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(entry.start, entry.end, _READ_BYTES):
                data = os.pread(fd, min(_READ_BYTES, entry.end - start), start)
                digest.update(data)
                if progress is not None:
                    progress(len(data))
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceError(f"{header.path}: cannot be read {system_said(error, 'Check the disk.')}") from error
    return digest.hexdigest()
