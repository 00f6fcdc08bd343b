"""Where a source comes from: a local folder, a GGUF, a snapshot in the Hub's cache, or the Hub itself, shard by shard.

Every form ends in the same checked Checkpoint, whose shards the reader asks for by name before it opens them and lets
go when their last tensor is durable. From the Hub that fetches and deletes them; one commit holds for everything.

Does not: read weights, or fetch a shard before the plan was accepted.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.checkpoint import Checkpoint, open_checkpoint
from qwq_mlx.files.gguf.checkpoint import opened_gguf
from qwq_mlx.files.gguf.stores import find_gguf
from qwq_mlx.files.header import Header
from qwq_mlx.files.hub.settings import check_network_settings

if TYPE_CHECKING:
    from qwq_mlx.files.digest import ByteProgress
    from qwq_mlx.files.hub.repository import Hub, Snapshot

__all__ = ["LocalShards", "Origin", "Shards", "open_origin"]

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")


class Shards(Protocol):
    """How the reader gets at shards, by name and in order."""

    def wait(self, name: str) -> Path:
        """Block until the shard lies at its header's path."""
        ...

    def drop(self, name: str) -> None:
        """The shard is done."""
        ...

    def stop(self) -> None:
        """Make a `wait` under way end."""
        ...


class LocalShards:
    """Shards that are there already and stay."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._paths = {header.path.name: header.path for header in headers}

    def wait(self, name: str) -> Path:
        """The shard's path, at once."""
        return self._paths[name]

    def drop(self, name: str) -> None:
        """Nothing: the source is not ours."""

    def stop(self) -> None:
        """Nothing: nobody waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """An opened source. repository, commit: None for a folder that does not say. hub, snapshot: None for local ones."""

    checkpoint: Checkpoint
    repository: str | None
    commit: str | None
    hub: Hub | None = None
    snapshot: Snapshot | None = None

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be fetched."""
        return self.hub is not None

    def placed_in(self, folder: Path) -> Origin:
        """The same, its shards at `folder`/name; the small files stay where they are."""
        old = self.checkpoint
        headers = {header.path.name: replace(header, path=folder / header.path.name) for header in old.shards}
        checkpoint = replace(
            old,
            shards=tuple(headers.values()),
            tensors={name: (headers[header.path.name], entry) for name, (header, entry) in old.tensors.items()},
        )
        return replace(self, checkpoint=checkpoint)

    @contextmanager
    def shards(self, wanted: Sequence[Header], *, keep: bool, progress: ByteProgress | None) -> Iterator[Shards]:
        """Serve the `wanted` shards in their order; others are never asked for."""
        if self.hub is None or self.snapshot is None:
            yield LocalShards(self.checkpoint.shards)
            return
        from qwq_mlx.files.hub.prefetch import ShardsAhead

        with ShardsAhead(self.hub, self.snapshot, wanted, keep=keep, progress=progress) as shards:
            yield shards


@contextmanager
def open_origin(
    source: str | Path, *, revision: str | None, unfinished: tuple[str, str] | None, follow_links: bool = False
) -> Iterator[Origin]:
    """Open a folder or a GGUF, or a repository by its name or address where no folder has it.

    source: a path, ollama:NAME[:TAG], lmstudio:PUBLISHER/REPO (see files.gguf.stores), or a repository.
    revision: branch, tag or commit of a repository. unfinished: repository and commit of a conversion to go on with;
    without a revision its commit is taken again, though the branch may have moved meanwhile.
    follow_links: read shards that links out of a folder lead to.
    Raises OptionError, SourceError.
    """
    from qwq_mlx.files.hub.repository import Hub, cached_snapshot, parse_repository

    if (gguf := find_gguf(source)) is not None:
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, which only a repository of the Hub has, but {source} is a GGUF. Leave "
                "`revision` out."
            )
        with opened_gguf(gguf) as checkpoint:
            yield Origin(checkpoint=checkpoint, repository=None, commit=None)
        return
    named = parse_repository(source) if isinstance(source, str) and not os.path.lexists(source) else None
    if named is None:
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, which only a repository of the Hub has, but {source} is a folder."
            )
        yield _local(Path(source), follow_links=follow_links)
        return
    repository, named_revision = named
    if named_revision is not None and revision not in (None, named_revision):
        raise OptionError(f"revision is {revision!r}, but {source} names {named_revision!r}. Give one of the two.")
    revision = revision or named_revision
    if revision is None and unfinished is not None and unfinished[0] == repository:
        revision = unfinished[1]
    if _is_offline():
        yield _cached(repository, revision)
        return
    with Hub() as hub, tempfile.TemporaryDirectory(prefix="qwq-mlx-") as temporary:
        snapshot = hub.resolve(repository, revision)
        cached = cached_snapshot(repository, snapshot.commit)
        if cached is not None and (whole := _complete(cached[0])) is not None:
            yield Origin(checkpoint=whole, repository=repository, commit=snapshot.commit)
            return
        folder = Path(temporary) / f"{repository.replace('/', '--')}@{snapshot.commit[:12]}"
        folder.mkdir()
        checkpoint = hub.open_checkpoint(snapshot, folder)
        yield Origin(checkpoint=checkpoint, repository=repository, commit=snapshot.commit, hub=hub, snapshot=snapshot)


def _local(folder: Path, *, follow_links: bool) -> Origin:
    match = _SNAPSHOT.search(folder.resolve().as_posix())
    return Origin(
        checkpoint=open_checkpoint(folder, follow_links=follow_links),
        repository=f"{match[1]}/{match[2]}" if match else None,
        commit=match[3] if match else None,
    )


def _is_offline() -> bool:
    check_network_settings()  # before huggingface_hub reads them
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cached(repository: str, revision: str | None) -> Origin:
    from qwq_mlx.files.hub.repository import cached_snapshot

    cached = cached_snapshot(repository, revision)
    if cached is None:
        at = "" if revision is None else f" at {revision}"
        raise SourceError(
            f"{repository}{at}: HF_HUB_OFFLINE is set and the Hub's cache has no such snapshot; there is no folder of "
            "that name either. Unset HF_HUB_OFFLINE, or give a local folder."
        )
    return Origin(checkpoint=open_checkpoint(cached[0]), repository=repository, commit=cached[1])


def _complete(folder: Path) -> Checkpoint | None:
    """The cached snapshot, or None where a file of it is missing or damaged: then it is fetched."""
    try:
        return open_checkpoint(folder)
    except SourceError:
        return None
