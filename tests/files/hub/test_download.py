"""Fetching one file: what a kill, a cut, a wrong byte or a confused server leaves, and how often bytes come twice."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hub_server import Blob, Handler, HubServer, Repository, Request, Waits

from qwq_mlx.errors import SourceError
from qwq_mlx.files.hub import download as fetch_module
from qwq_mlx.files.hub.download import Fetcher, RemoteFile, part_path
from qwq_mlx.files.hub.retry import Attempts, RetryableError

CONTENT = random.Random(1).randbytes(3_000_000)
BLOB = Blob.of(CONTENT)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.repositories["a/b"] = Repository()
        server.repositories["a/b"].push({"s.safetensors": BLOB})
        yield server


@pytest.fixture
def file(server: HubServer) -> RemoteFile:
    commit = server.repositories["a/b"].branches["main"]
    url = f"{server.endpoint}/a/b/resolve/{commit}/s.safetensors"
    return RemoteFile(name="s.safetensors", url=url, size_bytes=len(CONTENT), sha256=BLOB.sha256, blob_id=None)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def fetcher(server: HubServer, waits: Waits) -> Iterator[Fetcher]:
    fetcher = Fetcher(server.endpoint, token="secret", retry=waits.policy())
    yield fetcher
    fetcher.close()


def first(times: int, answer: Any, *, what: str = "cdn") -> Any:
    """A fault that the first requests of a kind meet."""
    left = [times]

    def fault(handler: Handler, asked: Request) -> bool:
        if asked.what != what or not left[0]:
            return False
        left[0] -= 1
        answer(handler, asked)
        return True

    return fault


ALWAYS = 10**9


def test_a_file_arrives_whole_and_alone(fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path) -> None:
    done: list[int] = []
    fetcher.fetch_file(file, tmp_path / "s", done.append)
    assert (tmp_path / "s").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert sum(done) == server.n_bytes_sent == len(CONTENT)
    n_requests = len(server.requests)
    done.clear()
    fetcher.fetch_file(file, tmp_path / "s", done.append)
    assert len(server.requests) == n_requests, "a file that is there and proven is not fetched again"
    assert sum(done) == len(CONTENT)


@pytest.mark.parametrize("cut_after", [1, 999_999, 1_500_000, 2_999_999])
def test_a_cut_connection_goes_on_where_it_stopped(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path, cut_after: int
) -> None:
    server.faults.append(first(3, lambda handler, asked: handler.send_blob(BLOB, asked, stop_after=cut_after)))
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    starts = [request.start for request in server.requests if request.what == "cdn"]
    assert starts == sorted(starts)
    assert len(starts) >= 2
    assert server.n_bytes_sent - len(CONTENT) <= 3 * (1 << 20)


def test_a_part_of_an_earlier_run_is_kept_and_proven(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path
) -> None:
    part_path(tmp_path / "s").write_bytes(CONTENT[:2_345_678])
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    assert [request.start for request in server.requests] == [2_345_678] * 2
    assert server.n_bytes_sent == len(CONTENT) - 2_345_678


@pytest.mark.parametrize("part", [b"x" * 1000, CONTENT[:-1] + b"x", CONTENT + b"more", b"x" * 3_000_000])
def test_a_damaged_part_is_dropped_and_fetched_once_more(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path, part: bytes
) -> None:
    part_path(tmp_path / "s").write_bytes(part)
    done: list[int] = []
    fetcher.fetch_file(file, tmp_path / "s", done.append)
    assert (tmp_path / "s").read_bytes() == CONTENT
    assert sum(done) == len(CONTENT)
    assert server.n_bytes_sent <= 2 * len(CONTENT)
    (tmp_path / "s").write_bytes(b"\0" * len(CONTENT))  # a finished file that a power cut has zeroed
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT


def flipped(handler: Handler, asked: Request) -> None:
    wrong = Blob(
        BLOB.size_bytes, BLOB.sha256, lambda start, end: bytes([CONTENT[start] ^ 1]) + CONTENT[start + 1 : end]
    )
    handler.send_blob(wrong, asked)


def test_a_flipped_bit_on_the_way_is_fetched_again_and_the_second_time_refused(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path
) -> None:
    server.faults.append(first(1, flipped))
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    (tmp_path / "s").unlink()
    server.faults = [first(ALWAYS, flipped)]
    done: list[int] = []
    with pytest.raises(
        SourceError, match=rf"sha256 is [0-9a-f]{{64}}, its repository says {BLOB.sha256}, twice\. The server"
    ):
        fetcher.fetch_file(file, tmp_path / "s", done.append)
    assert list(tmp_path.iterdir()) == []
    assert sum(done) == 0


def test_a_small_files_git_digest_is_checked_too(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path
) -> None:
    good = RemoteFile(name=file.name, url=file.url, size_bytes=file.size_bytes, sha256=None, blob_id=BLOB.blob_id)
    fetcher.fetch_file(good, tmp_path / "s")
    bad = RemoteFile(name=file.name, url=file.url, size_bytes=file.size_bytes, sha256=None, blob_id="0" * 40)
    with pytest.raises(SourceError, match=rf"git blob id is {BLOB.blob_id}, its repository says 0{{40}}, twice"):
        fetcher.fetch_file(bad, tmp_path / "t")


def ended_early(handler: Handler, asked: Request) -> None:
    """No length is said, and the end of the connection comes in the middle of the file."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {asked.start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(CONTENT[asked.start : asked.start + 10])


PASSING = {
    "end without a length": ended_early,
    "503": lambda handler, asked: handler.answer(503),
    "429": lambda handler, asked: handler.answer(429, Retry_After="0"),
    "408": lambda handler, asked: handler.answer(408),
    "reset at once": lambda handler, asked: handler.cut(),
    "HTML page with code 200": lambda handler, asked: handler.answer(
        200, b"<html>oops", Content_Type="text/html; charset=utf-8"
    ),
    "HTML page with code 206": lambda handler, asked: handler.answer(
        206, b"<html>", Content_Type="text/html", Content_Range=f"bytes {asked.start}-5/{len(CONTENT)}"
    ),
    "git-lfs pointer with code 200": lambda handler, asked: handler.answer(
        200, b"version https://git-lfs.github.com/spec/v1"
    ),
    "another range": lambda handler, asked: handler.answer(206, b"abc", Content_Range=f"bytes 7-9/{len(CONTENT)}"),
    "range of another file": lambda handler, asked: handler.answer(206, b"a", Content_Range="bytes 0-0/1"),
    "no range said": lambda handler, asked: handler.answer(206, b"a"),
    "compressed": lambda handler, asked: handler.answer(200, b"\x1f\x8b", Content_Encoding="gzip"),
    "expired link": lambda handler, asked: handler.answer(403, b"Request has expired"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path, fault: str
) -> None:
    server.faults.append(first(2, PASSING[fault]))
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    assert len(server.requests) == 6


STAYING = {
    "503": r"the server answers 503; gave up after 63 s without a byte\. What was fetched is kept; run the same",
    "429": "the server answers 429; gave up after",
    "reset at once": "; gave up after 63 s without a byte",
    "HTML page with code 200": "sends text/html; charset=utf-8 of 10 bytes with code 200, expected the file of",
    "git-lfs pointer with code 200": "sends something of 42 bytes with code 200, expected the file of 3,000,000 bytes",
    "another range": "the server sends 'bytes 7-9', asked was from byte 0, 3 times\\. What",
    "no range said": "the server sends '', asked was from byte 0",
    "compressed": "with code 200, expected the file of",
    "expired link": "the link that the server gave answers 403, 3 times",
}


@pytest.mark.parametrize("fault", STAYING)
def test_what_does_not_pass_ends_in_one_message(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path, fault: str
) -> None:
    server.faults.append(first(ALWAYS, PASSING[fault]))
    with pytest.raises(SourceError, match=STAYING[fault]):
        fetcher.fetch_file(file, tmp_path / "s")
    assert not (tmp_path / "s").exists()


REFUSED = {
    "gone": (
        404,
        {"X_Error_Message": "Entry not found"},
        r"the server answers 404 \(Entry not found\)\. Check the repository",
    ),
    "gated": (
        401,
        {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model a/b is restricted."},
        r"answers 401 \(Access to model a/b is restricted\.\)\. If the model is gated.*`hf auth login`",
    ),
    "forbidden": (403, {}, r"the server answers 403\. If the model is gated or private"),
    "unprintable": (404, {"X_Error_Message": "\x1b[2J"}, r"the server answers 404\. Check"),
    "teapot": (418, {}, "the server answers 418"),
    "redirect to nowhere": (302, {"Location": "https://a:999999/"}, r"redirects to 'https://a:999999/', which is no"),
    "redirect to a file": (
        302,
        {"Location": "file:///etc/passwd"},
        "redirects to 'file:/etc/passwd', expected https",
    ),
    "redirect without an address": (302, {}, r"answers 302 \(a redirect\) without saying where to\. Check the endp"),
    "redirect without end": (302, {"Location": "#again"}, r"more than 5 redirects\. Check the endpoint or the network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_will_stay_ends_at_once(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path, case: str
) -> None:
    code, headers, expected = REFUSED[case]
    server.faults.append(first(ALWAYS, lambda handler, asked: handler.answer(code, **headers), what="resolve"))
    with pytest.raises(SourceError, match=expected):
        fetcher.fetch_file(file, tmp_path / "s")
    assert len(server.requests) == (6 if "without end" in case else 1)


def test_a_secure_address_never_redirects_to_an_insecure_one(tmp_path: Path, file: RemoteFile) -> None:
    fetcher = Fetcher("https://hub.example", token="secret", retry=Waits().policy())
    asked: list[httpx2.Request] = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(302, headers={"location": "http://hub.example/s"})

    fetcher._client = httpx2.Client(transport=httpx2.MockTransport(respond))
    secure = RemoteFile(name="s", url="https://hub.example/s", size_bytes=1, sha256="0" * 64, blob_id=None)
    with pytest.raises(
        SourceError, match=r"https://hub\.example/s: redirects to 'http://hub\.example/s', expected https"
    ):
        fetcher.fetch_file(secure, tmp_path / "s")
    fetcher.close()
    assert [request.headers["authorization"] for request in asked] == ["Bearer secret"]


def test_a_silent_server_is_given_up(file: RemoteFile, server: HubServer, waits: Waits, tmp_path: Path) -> None:
    released = threading.Event()
    server.faults.append(first(ALWAYS, lambda handler, asked: released.wait(20) and handler.cut()))
    fetcher = Fetcher(server.endpoint, token=None, retry=waits.policy(timeout_s=0.1))
    with pytest.raises(SourceError, match=r"; gave up after 63 s without a byte"):
        fetcher.fetch_file(file, tmp_path / "s")
    fetcher.close()
    released.set()


def test_a_link_that_breaks_after_each_kilobyte_still_brings_the_file(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, waits: Waits
) -> None:
    server.faults.append(first(ALWAYS, lambda handler, asked: handler.send_blob(BLOB, asked, stop_after=1000)))
    assert fetcher.fetch_range(file, 0, 20_000) == CONTENT[:20_000]
    assert waits.seconds == [1.0] * 19  # the twentieth brings the last byte


@pytest.mark.parametrize(("n_bytes", "is_refused"), [(1, True), (1999, True), (2001, False)])
def test_a_trickle_is_refused_after_a_minute(n_bytes: int, is_refused: bool, waits: Waits) -> None:
    attempts = Attempts("http://hub/s", waits.policy())
    attempts.failed(RetryableError("the server answers 429", wait_s=300.0))  # asked for, so it is not counted
    outcome = ""
    try:
        for _ in range(100):
            waits.seconds.append(2.0)
            attempts.succeeded(n_bytes)
    except SourceError as error:
        outcome = str(error)
    assert bool(outcome) == is_refused
    assert not is_refused or f"only {30 * n_bytes:,} bytes came in 60 s, expected at least 1,000 a second" in outcome


def test_a_server_that_asks_for_ever_more_time_is_given_up(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, waits: Waits, tmp_path: Path
) -> None:
    server.faults.append(first(ALWAYS, lambda handler, asked: handler.answer(429, Retry_After="250")))
    with pytest.raises(SourceError, match=r"429 and asks to wait 250 s more; at most 600 s are waited\. Run the same"):
        fetcher.fetch_file(file, tmp_path / "s")
    assert waits.seconds == [250.0, 250.0]


def test_a_server_without_ranges_is_read_past_what_is_there(
    fetcher: Fetcher, file: RemoteFile, server: HubServer, tmp_path: Path
) -> None:
    server.has_ranges = False
    part_path(tmp_path / "s").write_bytes(CONTENT[:1_999_999])
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    assert fetcher.fetch_range(file, 5, 1_048_600) == CONTENT[5:1_048_600]


def test_progress_can_stop_a_fetch_and_the_part_stays(fetcher: Fetcher, file: RemoteFile, tmp_path: Path) -> None:
    def stop(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetcher.fetch_file(file, tmp_path / "s", stop)
    part = part_path(tmp_path / "s").read_bytes()
    assert 0 < len(part) <= 1 << 20
    assert CONTENT.startswith(part)


def test_a_full_disk_is_said_with_what_is_needed(
    fetcher: Fetcher, file: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fetch_module, "fsync_file", full)
        expected = (
            r"\.s\.part: cannot be .*written \(No space left on device\); the whole needs 3,000,000 bytes, [\d,]+ are"
        )
        with pytest.raises(SourceError, match=expected):
            fetcher.fetch_file(file, tmp_path / "s")
    with pytest.raises(SourceError, match=r"cannot be read and written \(No such file or directory\).* 0 are free"):
        fetcher.fetch_file(file, tmp_path / "missing" / "s")
    fetcher.fetch_file(file, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT


CHILD = """
import sys
from pathlib import Path
from qwq_mlx.files.hub.download import Fetcher, RemoteFile
from qwq_mlx.files.hub.retry import RetryPolicy
endpoint, url, size, sha256, to = sys.argv[1:]
file = RemoteFile(name="s.safetensors", url=url, size_bytes=int(size), sha256=sha256, blob_id=None)
Fetcher(endpoint, token=None, retry=RetryPolicy()).fetch_file(file, Path(to))
"""


def test_after_kill_9_at_random_bytes_few_are_fetched_twice(
    server: HubServer, tmp_path: Path, repository: Path
) -> None:
    """Three kills on one file of 24 MB. The bar is 16 MB fetched twice a kill; here it is what the sockets hold."""
    content = random.Random(2).randbytes(24_000_000)
    blob = Blob.of(content)
    commit = server.repositories["a/b"].push({"s.safetensors": blob})
    url = f"{server.endpoint}/a/b/resolve/{commit}/s.safetensors"
    command = [sys.executable, "-c", CHILD, server.endpoint, url, str(len(content)), blob.sha256, str(tmp_path / "s")]
    part = part_path(tmp_path / "s")
    chosen = random.Random(3)
    for _ in range(3):
        stalled, killed = threading.Event(), threading.Event()
        stop_at = (part.stat().st_size if part.exists() else 0) + chosen.randrange(2_000_000, 7_000_000)
        server.faults = [first(1, _stalling(blob, stop_at, stalled, killed))]
        with subprocess.Popen(command, cwd=repository) as child:
            assert stalled.wait(20)
            child.kill()
        killed.set()
    server.faults = []
    subprocess.run(command, cwd=repository, check=True)
    assert (tmp_path / "s").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert server.n_bytes_sent - len(content) <= 3 * 16_000_000
    starts = [request.start for request in server.requests if request.what == "cdn"]
    assert starts == sorted(starts)
    assert len(starts) == 4


def _stalling(blob: Blob, stop_at: int, stalled: threading.Event, killed: threading.Event) -> Any:
    """Send the file up to a byte, say so, and wait until the client is dead."""

    def read(start: int, end: int) -> bytes:
        if end > stop_at:
            stalled.set()
            killed.wait(20)
            raise ConnectionResetError
        return blob.read(start, end)

    return lambda handler, asked: handler.send_blob(Blob(blob.size_bytes, blob.sha256, read), asked)
