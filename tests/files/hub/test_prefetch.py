"""Shards one after another: two on the disk at most, the next fetched meanwhile, faults told to who waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint
from hub_server import Blob, Handler, HubServer, Repository, Request, Waits

from qwq_mlx.errors import SourceError
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.hub.prefetch import ShardsAhead
from qwq_mlx.files.hub.repository import Hub, Snapshot

NAME = "Qwen/QwQ-Tiny"
N_SHARDS = 5


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    source = write_tiny_checkpoint(tmp_path / "source", n_shards=N_SHARDS)
    with HubServer() as server:
        server.repositories[NAME] = Repository()
        server.repositories[NAME].push({path.name: path.read_bytes() for path in source.iterdir()})
        yield server


@pytest.fixture
def opened(server: HubServer, tmp_path: Path) -> Iterator[tuple[Hub, Snapshot, Checkpoint]]:
    folder = tmp_path / "fetched"
    folder.mkdir()
    with Hub(endpoint=server.endpoint, retry=Waits().policy()) as hub:
        snapshot = hub.resolve(NAME)
        yield hub, snapshot, hub.open_checkpoint(snapshot, folder)


def on_disk(checkpoint: Checkpoint) -> set[str]:
    return {path.name for path in checkpoint.folder.iterdir() if path.name.strip(".").startswith("model-")}


@pytest.mark.parametrize("keep", [False, True])
def test_shards_come_whole_in_order_and_two_at_a_time(
    opened: tuple[Hub, Snapshot, Checkpoint], tmp_path: Path, keep: bool
) -> None:
    hub, snapshot, checkpoint = opened
    done: list[int] = []
    with ShardsAhead(hub, snapshot, checkpoint.shards, keep=keep, progress=done.append) as shards:
        for header in checkpoint.shards:
            path = shards.wait(header.path.name)
            assert path.read_bytes() == (tmp_path / "source" / path.name).read_bytes()
            assert keep or len(on_disk(checkpoint)) <= 2
            shards.drop(path.name)
    assert on_disk(checkpoint) == ({header.path.name for header in checkpoint.shards} if keep else set())
    assert sum(done) == sum(header.size_bytes for header in checkpoint.shards)


def test_the_next_shard_is_fetched_while_one_is_in_hand_and_the_third_waits(
    opened: tuple[Hub, Snapshot, Checkpoint], server: HubServer
) -> None:
    hub, snapshot, checkpoint = opened
    names = [header.path.name for header in checkpoint.shards]
    server.requests.clear()
    second = threading.Event()

    def see(handler: Handler, asked: Request) -> bool:
        if asked.what == "cdn" and asked.name == snapshot.files[names[1]].sha256:
            second.set()
        return False

    server.faults.append(see)
    with ShardsAhead(hub, snapshot, checkpoint.shards) as shards:
        shards.wait(names[0])
        assert second.wait(10), "fetched although the first is still in hand"
        shards.wait(names[1])
        assert {request.name for request in server.requests if request.what == "resolve"} == set(names[:2])
        shards.drop(names[0])
        shards.wait(names[2])


def test_a_fault_reaches_who_waits(opened: tuple[Hub, Snapshot, Checkpoint], server: HubServer) -> None:
    hub, snapshot, checkpoint = opened
    names = [header.path.name for header in checkpoint.shards]
    server.faults.append(lambda handler, asked: asked.name == names[1] and handler.answer(404))
    with ShardsAhead(hub, snapshot, checkpoint.shards) as shards:
        shards.wait(names[0])
        with pytest.raises(SourceError, match=f"{names[1]}: the server answers 404"):
            shards.wait(names[1])


def test_what_no_one_expects_reaches_who_waits_too(
    opened: tuple[Hub, Snapshot, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, snapshot, checkpoint = opened

    def fail(_: Path, to: Path) -> None:
        raise OSError(30, "Read-only file system", str(to))

    monkeypatch.setattr(Path, "replace", fail)
    with ShardsAhead(hub, snapshot, checkpoint.shards) as shards, pytest.raises(OSError, match="Read-only file system"):
        shards.wait(checkpoint.shards[0].path.name)


def test_a_header_other_than_planned_is_refused(opened: tuple[Hub, Snapshot, Checkpoint]) -> None:
    hub, snapshot, checkpoint = opened
    planned = replace(checkpoint.shards[0], metadata={"format": "other"})
    with (
        ShardsAhead(hub, snapshot, [planned]) as shards,
        pytest.raises(SourceError, match="its header is not the one that was read before the fetch, though the digest"),
    ):
        shards.wait(planned.path.name)


def test_leaving_stops_the_fetch_keeps_the_part_and_the_next_run_goes_on(
    opened: tuple[Hub, Snapshot, Checkpoint], server: HubServer
) -> None:
    hub, snapshot, checkpoint = opened
    first = checkpoint.shards[0]
    blob = Blob.of((checkpoint.folder.parent / "source" / first.path.name).read_bytes())
    under_way, left = threading.Event(), threading.Event()

    def slow(handler: Handler, asked: Request) -> bool:
        if asked.what != "cdn" or left.is_set():
            return False

        def read(start: int, end: int) -> bytes:
            under_way.set()
            left.wait(10)
            return blob.read(start, end)

        handler.send_blob(Blob(blob.size_bytes, blob.sha256, read), asked)
        return True

    server.faults.append(slow)
    with ShardsAhead(hub, snapshot, checkpoint.shards) as shards:
        assert under_way.wait(10)
        shards.stop()
        with pytest.raises(
            SourceError, match=r"model-00001-of-00005\.safetensors: fetching was stopped\. Run the same"
        ):
            shards.wait(first.path.name)
        left.set()
    assert on_disk(checkpoint) <= {f".{first.path.name}.part"}
    with ShardsAhead(hub, snapshot, checkpoint.shards[:1], keep=True) as shards:
        shards.wait(first.path.name)
    assert on_disk(checkpoint) == {first.path.name}
