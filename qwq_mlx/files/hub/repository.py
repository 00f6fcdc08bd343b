"""A repository of the Hugging Face Hub as a checkpoint: one commit, its small files at once, its shards when asked.

huggingface_hub resolves the revision to a commit and lists names, sizes and digests in one answer; every later request
names that commit, so a branch that moves changes nothing. Files come through `download`, because huggingface_hub's own
download neither resumes after a kill nor compares the digest.

Does not: fetch code, pickles or folders of a repository, upload, or use the Hub's cache (`cached_snapshot` finds one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx2

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    SUFFIX,
    Checkpoint,
    assemble_checkpoint,
    read_weight_map,
)
from qwq_mlx.files.digest import ByteProgress
from qwq_mlx.files.header import Header, read_header_by
from qwq_mlx.files.hub.download import Fetcher, RemoteFile
from qwq_mlx.files.hub.retry import Attempts, RetryableError, RetryPolicy, retry_after_s, within
from qwq_mlx.files.hub.settings import check_network_settings, check_token, connection_advice
from qwq_mlx.files.json_object import read_json_object

__all__ = ["Hub", "Snapshot", "cached_snapshot", "is_repository_name", "parse_repository"]

_SMALL_SUFFIXES = (".json", ".txt", ".jinja", ".md")
_SMALL_NAMES = ("LICENSE", "NOTICE")
_MAX_SMALL_BYTES = 64 << 20
_MAX_FILE_BYTES = 1 << 40
_MAX_UNCONNECTED = 3  # attempts, 3 s in all: what is refused or unknown before anything was fetched rarely passes
_FIRST_BYTES = 256 << 10  # a shard's header in one request: QwQ's largest has 6 KB
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_URL = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([^/]+/[^/@]+)(?:(?:/tree/|@)([^/@]+))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A repository at one commit. files: every file directly in it, by name; those in folders are left out."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Names of all safetensors files, sorted."""
        return tuple(sorted(name for name in self.files if name.endswith(SUFFIX)))

    @property
    def small_names(self) -> tuple[str, ...]:
        """Names of config, index, tokenizer, template, licence and the like, sorted; no code, no weights."""
        return tuple(sorted(name for name in self.files if name.endswith(_SMALL_SUFFIXES) or name in _SMALL_NAMES))


def is_repository_name(text: str) -> bool:
    """Whether a text has the form "owner/name" of a repository; a local folder of that name should go first."""
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def parse_repository(text: str) -> tuple[str, str | None] | None:
    """Repository and revision that a name or an address means, or None for a text that is neither.

    >>> parse_repository("https://huggingface.co/Qwen/QwQ-32B-Preview/tree/main")
    ('Qwen/QwQ-32B-Preview', 'main')
    """
    address = _URL.fullmatch(text)
    name, revision = (address[1], address[2]) if address else (text, None)
    return (name, revision) if is_repository_name(name) else None


def cached_snapshot(repository: str, revision: str | None = None) -> tuple[Path, str] | None:
    """Folder and commit of a snapshot in huggingface_hub's own cache, or None; never touches the network.

    The folder may be incomplete: `open_checkpoint` says what is missing.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, CONFIG_NAME, revision=revision)
    if not isinstance(cached, str):
        return None
    folder = Path(cached).parent
    return folder, folder.name


class Hub:
    """`with Hub() as hub:` the Hub, or its mirror in HF_ENDPOINT, with the token that huggingface_hub finds.

    Raises SourceError for a variable of the environment that cannot be honoured.
    """

    def __init__(
        self, *, endpoint: str | None = None, token: str | None = None, retry: RetryPolicy | None = None
    ) -> None:
        check_network_settings()
        from huggingface_hub import constants, get_token

        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token or get_token()
        check_token(self._token, where="The token of huggingface_hub")
        self._retry = retry or RetryPolicy()
        self._fetcher = Fetcher(self._endpoint, token=self._token, retry=self._retry)

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fetcher.close()

    def resolve(self, repository: str, revision: str | None = None) -> Snapshot:
        """The commit that a revision (branch, tag, commit; None: main) is now, and its files with sizes and digests.

        Raises OptionError for a name that is none; SourceError when the Hub does not know it, refuses it, cannot be
        reached, or lists something that cannot be trusted.
        """
        if not is_repository_name(repository):
            raise OptionError(f"{repository!r} is no repository name, expected OWNER/NAME as in Qwen/QwQ-32B-Preview.")
        info = self._model_info(repository, revision)
        commit = str(info.sha)
        if _COMMIT.fullmatch(commit) is None:
            raise SourceError(
                f"{repository}: the server names the commit {commit[:80]!r}, expected 40 hexadecimal digits."
            )
        files = {}
        for sibling in info.siblings or ():
            name = sibling.rfilename
            if "/" in name and ".." not in name.split("/") and not name.startswith("/"):
                continue  # in a folder of the repository: never a part of the checkpoint
            files[name] = self._remote_file(repository, commit, name, sibling)
        return Snapshot(repository=repository, commit=commit, files=files)

    def fetch_small_files(self, snapshot: Snapshot, folder: Path) -> tuple[str, ...]:
        """Write config, index, tokenizer and the like into a folder, each proven by its digest; their names, sorted."""
        for name in snapshot.small_names:
            file = snapshot.files[name]
            if file.size_bytes > _MAX_SMALL_BYTES:
                raise SourceError(
                    f"{file.url}: has {file.size_bytes:,} bytes, expected at most {_MAX_SMALL_BYTES:,} of such a file. "
                    "This is no checkpoint that qwq_mlx knows."
                )
            write_file(folder / name, self._fetcher.fetch_bytes(file))
        return snapshot.small_names

    def open_checkpoint(self, snapshot: Snapshot, folder: Path) -> Checkpoint:
        """Fetch the small files into a folder and the shards' headers over the network, and check all of it.

        The headers' paths are where `fetch_shard` should put the shards: folder / name. No tensor data is fetched; a
        shard's header is proven only with the shard, so read it again then and compare.
        Raises SourceError as `qwq_mlx.files.checkpoint.open_checkpoint` does for a folder.
        """
        names = self.fetch_small_files(snapshot, folder)
        config = read_json_object(folder / CONFIG_NAME, limit_bytes=1 << 20, advice="Choose another repository.")
        weight_map = read_weight_map(folder / INDEX_NAME) if INDEX_NAME in names else None
        wanted = sorted(set(weight_map.values())) if weight_map is not None else list(snapshot.shard_names)
        if weight_map is None and SINGLE_NAME in wanted and not any("-of-" in name for name in wanted):
            wanted = [SINGLE_NAME]  # beside it, say, an adapter
        missing = [name for name in wanted if name not in snapshot.files]
        if missing or not wanted or (weight_map is None and len(wanted) > 1):
            fault = f"{', '.join(missing[:10])} missing" if missing else f"{len(wanted)} without {INDEX_NAME}"
            raise SourceError(
                f"{snapshot.repository} at {snapshot.commit[:12]}: its shards are {fault}; expected {SUFFIX} files "
                "and their index. Choose a repository that has them."
            )
        return assemble_checkpoint(
            folder,
            config=config,
            weight_map=weight_map,
            shards=[self._header(snapshot.files[name], folder / name) for name in wanted],
            extra_files=[name for name in names if name not in (CONFIG_NAME, INDEX_NAME)],
        )

    def fetch_shard(self, snapshot: Snapshot, name: str, *, to: Path, progress: ByteProgress | None = None) -> None:
        """Bring a shard to a path, its sha256 checked; resumes after a kill, and does nothing if it is there already.

        progress: see `download.Fetcher.fetch_file`. Raises SourceError.
        """
        self._fetcher.fetch_file(snapshot.files[name], to, progress)

    def _header(self, file: RemoteFile, path: Path) -> Header:
        first = self._fetcher.fetch_range(file, 0, min(_FIRST_BYTES, file.size_bytes))

        def read(start: int, n_bytes: int) -> bytes:
            if start + n_bytes <= len(first):
                return first[start : start + n_bytes]
            return self._fetcher.fetch_range(file, start, start + n_bytes)

        return read_header_by(read, path, file.size_bytes)

    def _remote_file(self, repository: str, commit: str, name: str, sibling: Any) -> RemoteFile:
        where = f"{repository} at {commit[:12]}"
        if not name.isprintable() or name in ("", ".", "..") or set(name) & set('/\\:<>"|?*') or len(name) > 200:
            raise SourceError(f"{where}: lists a file {name[:200]!r}, expected names without a path. Do not use it.")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        size_bytes = sibling.lfs.size if sibling.lfs else sibling.size
        if type(size_bytes) is not int or not 0 <= size_bytes <= _MAX_FILE_BYTES:
            raise SourceError(f"{where}: lists {name} with {size_bytes!r} bytes, expected 0 to {_MAX_FILE_BYTES:,}.")
        blob_id = sibling.blob_id
        digest, form = (sha256, _SHA256) if sibling.lfs else (blob_id, _COMMIT)
        if not isinstance(digest, str) or form.fullmatch(digest) is None:
            raise SourceError(
                f"{where}: lists {name} with the digest {str(digest)[:80]!r}, expected hexadecimal digits."
            )
        return RemoteFile(
            name=name,
            url=f"{self._endpoint}/{repository}/resolve/{commit}/{quote(name)}",
            size_bytes=size_bytes,
            sha256=sha256,
            blob_id=blob_id,
        )

    def _model_info(self, repository: str, revision: str | None) -> Any:
        """huggingface_hub's answer, its errors in our words."""
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub

        api = HfApi(endpoint=self._endpoint, token=self._token)
        label = repository if revision is None else f"{repository} at {revision}"
        ask = partial(api.model_info, repository, revision=revision, files_metadata=True, timeout=self._retry.timeout_s)
        attempts = Attempts(f"{self._endpoint}/{repository}", self._retry)
        n_unconnected = 0
        while True:
            try:
                return within(self._retry.give_up_s, ask)
            except TimeoutError as error:
                raise SourceError(
                    f"{label}: the list of its files was not whole after {self._retry.give_up_s:g} s. Try another "
                    "network or a mirror (HF_ENDPOINT)."
                ) from error
            except hub.GatedRepoError as error:
                raise SourceError(
                    f"{label}: is gated. Accept its terms on {self._endpoint}/{repository}, then log in with "
                    "`hf auth login`, or set HF_TOKEN."
                ) from error
            except hub.RepositoryNotFoundError as error:
                raise SourceError(
                    f"{label}: {self._endpoint} has no such repository, or it is private. Check the name; for a "
                    "private one log in with `hf auth login`, or set HF_TOKEN. For a local folder give its path."
                ) from error
            except hub.RevisionNotFoundError as error:
                raise SourceError(
                    f"{label}: the repository has no such revision. Give a branch, a tag or a commit as `revision`."
                ) from error
            except hub.OfflineModeIsEnabled as error:
                raise SourceError(
                    f"{label}: HF_HUB_OFFLINE is set, so the Hub cannot be asked. Unset it, or give a local folder."
                ) from error
            except hub.HfHubHTTPError as error:
                code = error.response.status_code
                if code not in (408, 429) and code < 500:
                    raise SourceError(
                        f"{label}: the server answers {code}. Check the repository and HF_TOKEN."
                    ) from error
                attempts.failed(
                    RetryableError(f"the server answers {code}", wait_s=retry_after_s(error.response.headers))
                )
            except (httpx2.ConnectError, httpx2.ProxyError) as error:
                n_unconnected += 1
                if n_unconnected == _MAX_UNCONNECTED:
                    raise SourceError(
                        f"{label}: no connection to {self._endpoint} ({error}). {connection_advice(self._endpoint)}"
                    ) from error
                attempts.failed(error)
            except httpx2.TransportError as error:
                attempts.failed(error)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                # an HTML page, JSON of something else, or 100,000 brackets
                attempts.failed(
                    RetryableError(f"the server's answer is no listing of files ({error})", is_wrong_answer=True)
                )
