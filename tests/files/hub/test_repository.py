"""The Hub through the real huggingface_hub client: names, commits, listings, small files and headers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Blob, Handler, HubServer, Repository, Request, Waits

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.hub.repository import Hub, cached_snapshot, is_repository_name, parse_repository
from qwq_mlx.files.hub.retry import RetryPolicy

NAME = "Qwen/QwQ-Tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def files_of(folder: Path) -> dict[str, bytes | Blob]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer() as server:
        server.repositories[NAME] = Repository()
        server.repositories[NAME].push(
            {
                **files_of(tiny_checkpoint),
                "README.md": b"# Tiny\n",
                "evil.py": b"raise",
                "x.bin": b"PK",
                "figures/a.png": b"x",
            }
        )
        yield server


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def hub(server: HubServer, waits: Waits) -> Iterator[Hub]:
    with Hub(endpoint=server.endpoint, token="hf_secret", retry=waits.policy()) as hub:
        yield hub


def test_a_repository_opens_as_the_same_checkpoint_as_its_folder(
    server: HubServer, hub: Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    snapshot = hub.resolve(NAME)
    assert snapshot.commit == server.repositories[NAME].branches["main"]
    assert snapshot.shard_names == SHARDS
    opened = hub.open_checkpoint(snapshot, tmp_path)
    assert server.n_bytes_sent < sum((tiny_checkpoint / name).stat().st_size for name in SHARDS)
    for name in SHARDS:
        hub.fetch_shard(snapshot, name, to=tmp_path / name)
    local = open_checkpoint(tmp_path)
    assert opened == local
    assert {name: e for name, (_, e) in opened.tensors.items()} == {
        name: e for name, (_, e) in open_checkpoint(tiny_checkpoint).tensors.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(p.name for p in tiny_checkpoint.iterdir()), "README.md"]
    )
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in tiny_checkpoint.iterdir())


def test_a_header_longer_than_the_first_request_is_read_whole(
    hub: Hub, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwq_mlx.files.hub import repository as hub_module

    monkeypatch.setattr(hub_module, "_FIRST_BYTES", 700)
    found = hub.open_checkpoint(hub.resolve(NAME), tmp_path)
    assert found.tensors.keys() == open_checkpoint(tiny_checkpoint).tensors.keys()


def test_a_commit_that_moves_during_the_run_changes_nothing(
    server: HubServer, hub: Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    snapshot = hub.resolve(NAME, "main")
    changed = dict.fromkeys(files_of(tiny_checkpoint), b"moved")
    server.repositories[NAME].push(changed)
    hub.open_checkpoint(snapshot, tmp_path)
    hub.fetch_shard(snapshot, SHARDS[0], to=tmp_path / SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == (tiny_checkpoint / SHARDS[0]).read_bytes()
    assert hub.resolve(NAME, snapshot.commit) == snapshot
    assert hub.resolve(NAME).commit != snapshot.commit


def test_the_token_goes_to_the_endpoint_and_never_to_where_it_redirects(
    server: HubServer, hub: Hub, tmp_path: Path
) -> None:
    snapshot = hub.resolve(NAME)
    hub.open_checkpoint(snapshot, tmp_path)
    hub.fetch_shard(snapshot, SHARDS[0], to=tmp_path / SHARDS[0])
    sent = {(request.host.split(":")[0], request.authorization) for request in server.requests}
    assert sent == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_it_finds_endpoint_and_token_where_huggingface_hub_does(
    server: HubServer, repository: Path, tmp_path: Path
) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom qwq_mlx.files.hub.repository import Hub\n"
        f"with Hub() as hub:\n    print(len(hub.open_checkpoint(hub.resolve({NAME!r}), Path(sys.argv[1])).tensors))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_environment", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        env=environment, cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "27\n"), done.stderr
    assert {r.authorization for r in server.requests if r.name == NAME} == {"Bearer hf_environment"}


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("Qwen/QwQ-32B-Preview", True),
        ("a/b_c.d", True),
        ("Qwen", False),
        ("a/b/c", False),
        ("../b", False),
        ("a/..", False),
        ("a--b/c", False),
        ("/etc/passwd", False),
        ("a/b ", False),
        ("a/b?c", False),
        ("a/" + "b" * 97, False),
    ],
)
def test_repository_names_are_told_from_paths(text: str, is_name: bool) -> None:
    assert is_repository_name(text) is is_name


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("a/b", ("a/b", None)),
        ("https://huggingface.co/a/b", ("a/b", None)),
        ("https://huggingface.co/a/b/", ("a/b", None)),
        ("https://huggingface.co/a/b/tree/v1", ("a/b", "v1")),
        ("http://hf.co/a/b", ("a/b", None)),
        ("hf://a/b", ("a/b", None)),
        ("hf://a/b@v1", ("a/b", "v1")),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://huggingface.co/a", None),
        ("https://example.com/a/b", None),
        ("https://huggingface.co/../b", None),
        ("https://huggingface.co/a/b?c", None),
        ("./a/b", None),
    ],
)
def test_an_address_means_its_repository(text: str, repository: tuple[str, str | None] | None) -> None:
    assert parse_repository(text) == repository


def fault(code: int, body: bytes = b"", *, what: str = "api", times: int = 10**9, **headers: str) -> Any:
    """Answer the first requests of a kind with this."""
    left = [times]

    def answer(handler: Handler, asked: Request) -> bool:
        if asked.what != what or not left[0]:
            return False
        left[0] -= 1
        return handler.answer(code, body, **headers)

    return answer


REFUSALS = {
    "gated": (403, {"X_Error_Code": "GatedRepo"}, r"Tiny: is gated\. Accept its terms on http://127.*hf auth login"),
    "private or absent": (
        401,
        {"X_Error_Code": "RepoNotFound"},
        r"Tiny: http://127\S+ has no such repository, or it is",
    ),
    "no such revision": (
        404,
        {"X_Error_Code": "RevisionNotFound"},
        r"Tiny: the repository has no such revision\. Give a",
    ),
    "teapot": (418, {}, r"Tiny: the server answers 418\. Check the repository and HF_TOKEN"),
    "server error": (
        500,
        {},
        r"QwQ-Tiny: the server answers 500; gave up after 63 s without a byte\. What",
    ),
    "not JSON": (200, {"Content_Type": "text/html"}, r"the server's answer is no listing of files \(.*\), 3 times\. "),
    "deep JSON": (200, {"Content_Type": "application/json"}, r"the server's answer is no listing of files \(.*\), 3 "),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_to_list_is_said_in_one_message(server: HubServer, hub: Hub, refusal: str) -> None:
    code, headers, expected = REFUSALS[refusal]
    server.faults.append(fault(code, b"[" * 100_000 if refusal == "deep JSON" else b"<html>login</html>", **headers))
    with pytest.raises(SourceError, match=expected):
        hub.resolve(NAME)


def test_a_listing_that_trickles_for_ever_is_given_up(server: HubServer) -> None:
    """One byte every 2 s kept every pause short, and the whole was never there."""
    ended = threading.Event()

    def trickle(handler: Handler, asked: Request) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not ended.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        return handler.cut()

    server.faults.append(trickle)
    policy = RetryPolicy(give_up_s=0.3)
    message = r"Tiny: the list of its files was not whole after 0.3 s\. Try another network or a mirror"
    with Hub(endpoint=server.endpoint, retry=policy) as hub, pytest.raises(SourceError, match=message):
        hub.resolve(NAME)
    ended.set()


def test_the_hub_busy_or_unreachable_for_a_moment_is_waited_for(server: HubServer, hub: Hub, waits: Waits) -> None:
    server.faults.append(fault(429, times=2, Retry_After="7"))
    server.faults.append(fault(503, times=1))
    hub.resolve(NAME)
    assert waits.seconds == [7.0, 7.0, 4.0]


def test_a_server_that_is_not_there_is_said(server: HubServer, waits: Waits) -> None:
    with (
        Hub(endpoint="http://127.0.0.1:9", retry=waits.policy()) as hub,
        pytest.raises(SourceError, match=r"no connection to http://127\S+:9 \(.*\)\. Check the network.*local folder"),
    ):
        hub.resolve(NAME)


def test_offline_mode_and_wrong_names_are_refused_before_any_request(
    server: HubServer, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in ("QwQ", "../x", "a/b/c"):
        with pytest.raises(OptionError, match=r"is no repository name, expected OWNER/NAME as in Qwen/QwQ-32B-Preview"):
            hub.resolve(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=r"Tiny: HF_HUB_OFFLINE is set, so the Hub cannot be asked\. Unset it, or give"
    ):
        hub.resolve(NAME)
    assert server.requests == []


def edit(**changes: Any) -> Any:
    """Change the listing: its own fields, or those of the first shard (names with an underscore in front)."""

    def change(listing: dict[str, Any]) -> None:
        shard = next(s for s in listing["siblings"] if s["rfilename"] == SHARDS[0])
        for key, value in changes.items():
            if key.startswith("lfs_"):
                shard["lfs"][key.removeprefix("lfs_")] = value
            elif key in shard:
                shard[key] = value
            else:
                listing[key] = value

    return change


LISTINGS = {
    "path up": (
        edit(rfilename="../../../evil.json"),
        r"lists a file '\.\./\.\./\.\./evil\.json', expected names without",
    ),
    "absolute path": (edit(rfilename="/etc/evil.json"), "lists a file '/etc/evil.json'"),
    "backslashes": (edit(rfilename="..\\evil.json"), "lists a file .*evil.json', expected names without a path"),
    "terminal escape": (edit(rfilename="\x1b[2J.json"), r"lists a file '\\x1b\[2J\.json'"),
    "dots": (edit(rfilename=".."), r"lists a file '\.\.'"),
    "endless name": (edit(rfilename="x" * 5_000), "lists a file 'x{200}', expected names"),
    "commit is a branch": (edit(sha="main"), "names the commit 'main', expected 40 hexadecimal digits"),
    "no commit": (edit(sha=None), "names the commit 'None'"),
    "negative size": (edit(lfs_size=-1), r"lists model-00001-of-00002\.safetensors with -1 bytes, expected 0 to"),
    "size of 2^60": (edit(lfs_size=2**60), "with 1152921504606846976 bytes, expected 0 to 1,099,511,627,776"),
    "size a text": (edit(lfs_size="7"), "with '7' bytes"),
    "sha256 short": (edit(lfs_sha256="abc"), "with the digest 'abc', expected hexadecimal digits"),
    "sha256 missing": (edit(lfs_sha256=None), "with the digest 'None'"),
    "blob id missing": (edit(lfs=None, blobId=None), "with the digest 'None'"),
    "not a listing": (lambda listing: listing.clear(), r"answer is no listing of files \('id'\), 3 times"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_that_cannot_be_trusted_is_refused(server: HubServer, hub: Hub, case: str) -> None:
    server.listing, expected = LISTINGS[case]
    with pytest.raises(SourceError, match=expected):
        hub.resolve(NAME)


def push(server: HubServer, tiny_checkpoint: Path, **changes: bytes | None) -> None:
    """A commit without some files (None) or with others; names are given with underscores for dots and dashes."""
    files = files_of(tiny_checkpoint)
    for name, content in changes.items():
        path = next(path for path in files if path.replace(".", "_").replace("-", "_") == name)
        if content is None:
            del files[path]
        else:
            files[path] = content
    server.repositories[NAME].push(files)


def test_shards_that_the_repository_lacks_are_named(
    server: HubServer, hub: Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    push(server, tiny_checkpoint, model_00002_of_00002_safetensors=None)
    with pytest.raises(SourceError, match=r"its shards are model-00002-of-00002\.safetensors missing; expected"):
        hub.open_checkpoint(hub.resolve(NAME), tmp_path)
    push(server, tiny_checkpoint, model_safetensors_index_json=None)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=r"its shards are 2 without model\.safetensors\.index\.json; expected"):
        hub.open_checkpoint(hub.resolve(NAME), tmp_path)


def test_a_pointer_or_a_page_in_a_repository_is_called_by_its_name(
    server: HubServer, hub: Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3900000000\n"
    push(server, tiny_checkpoint, model_00001_of_00002_safetensors=pointer)
    with pytest.raises(SourceError, match=r"model-00001-of-00002\.safetensors: is a git-lfs pointer"):
        hub.open_checkpoint(hub.resolve(NAME), tmp_path)
    push(server, tiny_checkpoint, config_json=b"<!DOCTYPE html>")
    with pytest.raises(SourceError, match=r"config\.json: is an HTML page"):
        hub.open_checkpoint(hub.resolve(NAME), tmp_path)


def test_small_files_are_bounded_and_proven(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwq_mlx.files.hub import repository as hub_module

    snapshot = hub.resolve(NAME)
    size = snapshot.files["config.json"].size_bytes
    server.faults.append(fault(200, bytes(size), what="resolve"))
    with pytest.raises(
        SourceError, match=r"README\.md: the server sends something of \d+ bytes with code 200, expected"
    ):
        hub.fetch_small_files(snapshot, tmp_path)
    server.faults.append(lambda handler, asked: asked.name == "README.md" and handler.answer(200, b"# Tinx\n"))
    server.faults.reverse()
    with pytest.raises(
        SourceError, match=r"README\.md: its digest is [0-9a-f]{40}, its repository says [0-9a-f]{40}\. Run"
    ):
        hub.fetch_small_files(snapshot, tmp_path)
    monkeypatch.setattr(hub_module, "_MAX_SMALL_BYTES", 6)
    with pytest.raises(SourceError, match=r"README\.md: has 7 bytes, expected at most 6 of such a file"):
        hub.fetch_small_files(snapshot, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_in_huggingface_hubs_cache_is_found_without_the_network(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--Qwen--QwQ-Tiny" / "snapshots" / commit
    shutil.copytree(tiny_checkpoint, folder)
    (tmp_path / "models--Qwen--QwQ-Tiny" / "refs").mkdir()
    (tmp_path / "models--Qwen--QwQ-Tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_snapshot(NAME) == (folder, commit)
    assert cached_snapshot(NAME, commit) == (folder, commit)
    assert cached_snapshot("Qwen/Other") is None
    assert open_checkpoint(folder).config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["timeout_s", "give_up_s", "wait_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_policy_is_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name} is .*, expected a positive number of seconds"):
        RetryPolicy(**{name: value})
