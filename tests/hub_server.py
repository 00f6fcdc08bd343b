"""A small Hub on loopback: the endpoints that the huggingface_hub client and our fetch use, with faults on demand.

    GET /api/models/OWNER/NAME[/revision/REV]?blobs=True    commit and files with sizes and digests
    GET /OWNER/NAME/resolve/COMMIT/FILE                     a small file, or for an LFS file a redirect to
    GET /cdn/SHA256                                         its bytes, on another host name (localhost), with ranges

Does not: git, uploads, pagination, authentication beyond recording what was sent.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from qwq_mlx.files.hub.retry import RetryPolicy


@dataclass(frozen=True)
class Blob:
    """A file's bytes, which need not all exist at once: read(start, end) makes them."""

    size_bytes: int
    sha256: str
    read: Callable[[int, int], bytes]
    blob_id: str = ""

    @classmethod
    def of(cls, content: bytes) -> Blob:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return cls(len(content), hashlib.sha256(content).hexdigest(), lambda start, end: content[start:end], git)


@dataclass
class Request:
    """What a client asked. what: "api", "resolve" or "cdn"; name: repository, file or sha256."""

    what: str
    name: str
    start: int
    end: int | None
    host: str
    authorization: str | None
    n_sent: int = 0


@dataclass
class Repository:
    """commits: commit -> file name -> content. branches: name -> commit. Files named in lfs are redirected."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def push(self, files: Mapping[str, bytes | Blob], *, branch: str = "main") -> str:
        """Make a commit of these files and move a branch to it."""
        blobs = {name: Blob.of(blob) if isinstance(blob, bytes) else blob for name, blob in files.items()}
        commit = hashlib.sha1(repr(sorted((n, b.sha256) for n, b in blobs.items())).encode()).hexdigest()
        self.commits[commit] = blobs
        self.branches[branch] = commit
        return commit


Fault = Callable[["Handler", Request], bool]  # True: it has answered


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:`; hub.endpoint is its address, hub.faults are asked before each answer."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}/cdn"
        self.listing: Callable[[dict[str, Any]], object] = lambda listing: None
        self.has_ranges = True
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is part of the tests."""

    @property
    def n_bytes_sent(self) -> int:
        """Bytes of LFS files sent so far."""
        return sum(request.n_sent for request in self.requests if request.what == "cdn")


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        span = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(span[0] or 0), int(span[2]) + 1 if span[2] else None
        what = {"api": "api", "cdn": "cdn"}.get(parts[0], "resolve")
        name = {"api": "/".join(parts[2:4]), "cdn": parts[-1], "resolve": parts[-1]}[what]
        asked = Request(what, name, start, end, self.headers["Host"], self.headers.get("Authorization"))
        self.server.requests.append(asked)
        if any(fault(self, asked) for fault in list(self.server.faults)):
            return
        if what == "api":
            self._list(name, parts[5] if len(parts) > 5 else "main")
        elif what == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], asked)
        else:
            blobs = (b for r in self.server.repositories.values() for c in r.commits.values() for b in c.values())
            self.send_blob(next(blob for blob in blobs if blob.sha256 == name), asked)

    def answer(self, code: int, body: bytes = b"", **headers: str) -> bool:
        """Answer with headers given as name_with_underscores; True, so that a fault can return it."""
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def cut(self) -> bool:
        """End the connection now."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)
        return True

    def send_blob(self, blob: Blob, asked: Request, *, stop_after: int | None = None) -> None:
        """The bytes asked for, in pieces; after stop_after bytes the connection is cut."""
        is_range = self.server.has_ranges and "Range" in self.headers
        start, end = (
            (asked.start, min(asked.end or blob.size_bytes, blob.size_bytes)) if is_range else (0, blob.size_bytes)
        )
        self.send_response(206 if is_range else 200)
        if is_range:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{blob.size_bytes}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Type", "binary/octet-stream")
        self.end_headers()
        while start < end:
            n_bytes = min(1 << 16, end - start)
            if stop_after is not None and asked.n_sent + n_bytes > stop_after:
                n_bytes = stop_after - asked.n_sent
                end = start + n_bytes
            self.wfile.write(blob.read(start, start + n_bytes))
            asked.n_sent += n_bytes
            start += n_bytes
        if stop_after is not None and asked.n_sent >= stop_after:
            self.cut()

    def _list(self, name: str, revision: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer(401, b'{"error":"Invalid username or password."}', X_Error_Code="RepoNotFound")
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self.answer(404, b'{"error":"Invalid rev id"}', X_Error_Code="RevisionNotFound")
            return
        siblings = []
        for file, blob in sorted(repository.commits[commit].items()):
            sibling: dict[str, Any] = {"rfilename": file, "size": blob.size_bytes, "blobId": blob.blob_id}
            if file.endswith(".safetensors"):
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size_bytes, "pointerSize": 135}
            siblings.append(sibling)
        listing = {"_id": "0", "id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self.server.listing(listing)
        self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    def _resolve(self, name: str, commit: str, asked: Request) -> None:
        blob = self.server.repositories[name].commits.get(commit, {}).get(asked.name)
        if blob is None:
            self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif asked.name.endswith(".safetensors"):
            self.answer(302, Location=f"{self.server.cdn}/{blob.sha256}?signature=1")
        else:
            self.send_blob(blob, asked)


class Waits:
    """A clock that moves only by what a client waits, and how long that was each time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def policy(self, *, timeout_s: float = 60.0) -> RetryPolicy:
        """The usual policy by this clock. timeout_s: of connections; those are real."""
        return RetryPolicy(timeout_s=timeout_s, clock=lambda: sum(self.seconds), sleep=self.seconds.append)
