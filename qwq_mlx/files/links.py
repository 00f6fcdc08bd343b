"""Where a link in a checkpoint's folder may lead: within the folder, into the Hub's cache, or elsewhere when told.

huggingface_hub 2 links a snapshot's file to models--OWNER--NAME/blobs/ETAG, and that to CACHE/blobs/XX/HASH, a store
that all repositories share; its older `--local-dir` linked a folder's files into the cache. All of that is sound. Any
other link out of the folder could bring a private file into a conversion, so it is followed only for shards, which are
never copied, and only where the caller says so.

Does not: open a file.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwq_mlx.errors import SourceError

__all__ = ["check_link"]

_BLOB = re.compile(r"models--[^/]+/blobs/[^/]+|blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def check_link(path: Path, folder: Path, *, follow: bool) -> str | None:
    """Refuse a link that leads where it should not; a warning for one that is followed because the user said so.

    follow: read shards that links lead to.

    Raises SourceError.
    """
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.10 to 3.12 raise RuntimeError for a loop of links
        raise SourceError(f"{path}: is a link that leads nowhere. Replace it with the file itself.") from error
    if target.is_relative_to(home) or _is_blob(target, home):
        return None
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path}: is a link to {target}, outside the folder. Replace it with the file itself if you trust it."
        )
    if not target.exists():
        raise SourceError(
            f"{path}: is a link to {target}, where there is no file. Mount the disk that it is on, or fetch the shard."
        )
    if follow and target.is_file():
        return f"{path}: is a link out of the folder; {target} is read."
    raise SourceError(
        f"{path}: is a link to {target}, outside the folder. If you made it, pass `follow_links=True` to "
        "read the shard where it is; otherwise do not use this folder."
    )


def _is_blob(target: Path, home: Path) -> bool:
    """Whether a link leads to a blob of the cache that the folder is a snapshot of, or of this user's cache."""
    caches = []
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        caches.append(home.parent.parent.parent)
    if _BLOB.search(target.as_posix()):
        from huggingface_hub import constants  # here, because it takes a tenth of a second

        caches.append(Path(constants.HF_HUB_CACHE).resolve())
    return any(
        target.is_relative_to(cache) and _BLOB.fullmatch(target.relative_to(cache).as_posix()) is not None
        for cache in caches
    )
