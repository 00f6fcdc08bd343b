"""One file over HTTP, by ranges: what a kill or a cut connection leaves is kept, and the end result is checked.

A part on disk is as long as what was fetched, so the next attempt asks for the rest; after a kill nothing is fetched
twice but what had not reached the file (one block of the network). The whole is compared with its digest before it
gets its name.
A failure that may pass (reset, timeout, 429, 5xx, an error page with code 200) is tried again as `retry` has it; one
that will not (401, 404) ends at once.

Does not: fetch one file over several connections, or survive a power cut without a second fetch of that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from qwq_mlx.errors import SourceError
from qwq_mlx.files.atomic import fsync_file, fsync_folder
from qwq_mlx.files.digest import ByteProgress
from qwq_mlx.files.hub.retry import LATER, Attempts, RetryableError, RetryPolicy, retry_after_s

__all__ = ["Fetcher", "RemoteFile", "part_path"]

_BLOCK_BYTES = 1 << 20
_MAX_REDIRECTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file to fetch: its size and one of two digests, sha256 (LFS files) or git's blob id (small files)."""

    name: str
    url: str
    size_bytes: int
    sha256: str | None
    blob_id: str | None

    def new_digest(self) -> Any:
        """A hashlib object that will come to `expected` over the file's bytes."""
        if self.sha256 is not None:
            return hashlib.sha256()
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % self.size_bytes)
        return digest

    @property
    def expected(self) -> str:
        """The digest that the file must have, hexadecimal."""
        return self.sha256 or self.blob_id or ""


def part_path(to: Path) -> Path:
    """Where an unfinished file grows, beside its final name."""
    return to.with_name(f".{to.name}.part")


class Fetcher:
    """Fetches files of one server. token: sent to the server's own origin alone, never to where it redirects."""

    def __init__(self, endpoint: str, *, token: str | None, retry: RetryPolicy) -> None:
        self._origin = _origin(endpoint)
        self._token = token
        self._retry = retry
        self._client = httpx2.Client(timeout=retry.timeout_s, follow_redirects=False)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def fetch_file(self, file: RemoteFile, to: Path, progress: ByteProgress | None = None) -> None:
        """Bring a file to a path; goes on where an earlier call stopped, and returns at once if it is there already.

        progress: called with bytes as they count: those on disk first, a negative number when a damaged part is
        dropped. What it raises ends the fetch and keeps the part.
        Raises SourceError when the server refuses, stays silent, or twice sends bytes of another digest; when the disk
        is full.
        """
        report = progress or (lambda _: None)
        if to.exists() and to.stat().st_size == file.size_bytes:
            to.replace(part_path(to))  # proven below like any other part
        sha256 = ""
        for _ in range(2):
            sha256 = self._complete_part(file, part_path(to), report)
            if sha256 == file.expected:
                part_path(to).replace(to)
                fsync_folder(to.parent)
                return
            part_path(to).unlink()
            report(-file.size_bytes)
        kind = "sha256" if file.sha256 else "git blob id"
        raise SourceError(
            f"{file.url}: {kind} is {sha256}, its repository says {file.expected}, twice. "
            "The server or something on the way to it damages the file; try another network or a mirror."
        )

    def fetch_bytes(self, file: RemoteFile) -> bytes:
        """A small file in memory, its digest checked. Raises SourceError as fetch_file does."""
        content = self.fetch_range(file, 0, file.size_bytes)
        digest = file.new_digest()
        digest.update(content)
        if digest.hexdigest() != file.expected:
            raise SourceError(
                f"{file.url}: its digest is {digest.hexdigest()}, its repository says {file.expected}. "
                "Run the same command again; if it stays, try another network or a mirror."
            )
        return content

    def fetch_range(self, file: RemoteFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, not yet proven by any digest. Raises SourceError."""
        content = bytearray()
        self._pull(file, start, end, content.extend)
        return bytes(content)

    def _complete_part(self, file: RemoteFile, part: Path, report: ByteProgress) -> str:
        """Bring the part to full size; the digest of what is there then."""
        digest = file.new_digest()
        try:
            with part.open("ab+") as stream:
                if stream.tell() > file.size_bytes:
                    stream.truncate(0)
                stream.seek(0)
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    report(len(block))

                def keep(block: bytes) -> None:
                    stream.write(block)
                    stream.flush()
                    digest.update(block)
                    report(len(block))

                self._pull(file, stream.tell(), file.size_bytes, keep)
                fsync_file(stream.fileno())
        except OSError as error:
            free_bytes = shutil.disk_usage(part.parent).free if part.parent.is_dir() else 0
            raise SourceError(
                f"{part}: cannot be read and written ({os.strerror(error.errno or 0)}); the whole needs "
                f"{file.size_bytes:,} bytes, {free_bytes:,} are free. {LATER}"
            ) from error
        return str(digest.hexdigest())

    def _pull(self, file: RemoteFile, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand bytes [start, end) to sink, over as many attempts as the policy allows."""
        attempts = Attempts(file.url, self._retry)
        while start < end:
            try:
                with contextlib.closing(self._blocks(file, start, end)) as blocks:
                    for block in blocks:
                        sink(block)
                        start += len(block)
                        attempts.succeeded(len(block))
                if start < end:
                    raise RetryableError(f"the connection ended {end - start:,} bytes early")
            except (RetryableError, httpx2.TransportError) as error:
                attempts.failed(error)

    def _blocks(self, file: RemoteFile, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes of one answer from start on, never beyond end."""
        with self._answer(file.url, start, end) as response:
            skip = _bytes_before(response, file, start)
            n_left = end - start
            for block in response.iter_raw():  # as they come: blocks of one size would drop what a cut leaves of one
                if skip:
                    block, skip = block[skip:], max(0, skip - len(block))  # noqa: PLW2901
                if block:
                    yield block[:n_left]
                    n_left -= len(block)
                if n_left <= 0:
                    return

    @contextlib.contextmanager
    def _answer(self, url: str, start: int, end: int) -> Iterator[httpx2.Response]:
        """An answer with code 200 or 206, after redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "qwq_mlx"}
            is_own = _origin(url) == self._origin
            if is_own and self._token:
                headers["Authorization"] = f"Bearer {self._token}"
            with self._client.stream("GET", url, headers=headers) as response:
                if response.status_code not in (301, 302, 303, 307, 308):
                    _check_status(response, url, is_own=is_own)
                    yield response
                    return
                target = _target(response)
            if not target.startswith("https://") and (urlsplit(url).scheme == "https" or _origin(target)[0] != "http"):
                raise SourceError(
                    f"{url}: redirects to {target[:200]!r}, expected https. Check the endpoint or the network."
                )
            url = target
        raise SourceError(f"{url}: more than {_MAX_REDIRECTS} redirects. Check the endpoint or the network.")


def _target(response: httpx2.Response) -> str:
    """Where an answer redirects to."""
    location = response.headers.get("location", "")
    if not location:
        raise SourceError(
            f"{response.url}: the server answers {response.status_code} (a redirect) without saying where to. "
            "Check the endpoint or the network."
        )
    try:
        target = str(response.url.join(location))
        _origin(target)
    except (httpx2.InvalidURL, ValueError) as error:
        raise SourceError(
            f"{response.url}: redirects to {location[:200]!r}, which is no address. Check the endpoint or the network."
        ) from error
    return target


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def _check_status(response: httpx2.Response, url: str, *, is_own: bool) -> None:
    """Raise for every code but 200 and 206: SourceError if it will stay, RetryableError if it may pass."""
    code = response.status_code
    if code in (200, 206):
        return
    said = response.headers.get("x-error-message", "")[:300]
    if code in (408, 429) or code >= 500:
        raise RetryableError(f"the server answers {code}", wait_s=retry_after_s(response.headers))
    if not is_own and code in (401, 403, 404, 410):
        raise RetryableError(
            f"the link that the server gave answers {code}", is_wrong_answer=True
        )  # signed links expire
    if code in (401, 403):
        raise SourceError(
            f"{url}: the server answers {code}{_said(said)}. If the model is gated or private, accept its terms on its "
            "page and log in with `hf auth login`, or set HF_TOKEN."
        )
    raise SourceError(f"{url}: the server answers {code}{_said(said)}. Check the repository and the revision.")


def _said(message: str) -> str:
    return f" ({message})" if message.isprintable() and message else ""


def _bytes_before(response: httpx2.Response, file: RemoteFile, start: int) -> int:
    """How many bytes to skip: a server without ranges sends the file from its start. Checks what it says it sends."""
    total: str | None = response.headers.get("content-length")
    if response.status_code == 206:
        unit, _, total = response.headers.get("content-range", "").rpartition("/")
        if not unit.startswith(f"bytes {start}-"):
            raise RetryableError(f"the server sends {unit[:80]!r}, asked was from byte {start:,}", is_wrong_answer=True)
        skip = 0
    else:
        skip = start
    kind = response.headers.get("content-type", "")
    is_page = kind.startswith("text/html") and not file.name.endswith(".html")
    is_encoded = response.headers.get("content-encoding", "identity") != "identity"
    if is_page or is_encoded or total not in (None, "*", str(file.size_bytes)):
        raise RetryableError(
            f"the server sends {kind[:40] or 'something'} of {total} bytes with code {response.status_code}, expected "
            f"the file of {file.size_bytes:,} bytes (is a proxy or a login page in between?)",
            is_wrong_answer=True,
        )
    return skip
