"""From the Hub: one commit, two shards on the disk at most, and the same bytes as from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint
from hub_server import Handler, HubServer, Repository, Request, Waits

from qwq_mlx.convert import ConvertProgress, convert_checkpoint
from qwq_mlx.errors import ConversionError, LoadError, OptionError, SourceError
from qwq_mlx.files.manifest import verify_full

NAME = "Qwen/QwQ-Tiny"
N_SHARDS = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "source", n_shards=N_SHARDS)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("qwq_mlx.files.hub.repository.RetryPolicy", Waits().policy)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.repositories[NAME] = Repository()
        push(server, source)
        yield server


def push(server: HubServer, source: Path, **changed: bytes) -> str:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    return server.repositories[NAME].push(
        {**files, **{name.replace("__", "."): data for name, data in changed.items()}}
    )


def same_model(ours: Path, theirs: Path) -> bool:
    names = {path.name for path in theirs.iterdir()} - {"manifest.json"}
    return names == {path.name for path in ours.iterdir()} - {"manifest.json"} and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names
    )


def test_a_repository_converts_to_the_bytes_of_its_folder_with_two_shards_on_the_disk(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(source, tmp_path / "local")
    most = [0]

    def look(progress: ConvertProgress) -> None:
        folder = tmp_path / "out.partial" / "source"
        most[0] = max(most[0], sum(1 for path in folder.glob("*model-*")))

    convert_checkpoint(NAME, tmp_path / "out", progress=look)
    assert same_model(tmp_path / "out", tmp_path / "local")
    assert 1 <= most[0] <= 2
    ours, local = verify_full(tmp_path / "out"), verify_full(tmp_path / "local")
    commit = server.repositories[NAME].branches["main"]
    assert (ours.source.repository, ours.source.commit) == (NAME, commit)
    assert ours.source.files == local.source.files and ours.tensors == local.tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "out"]
    assert not any(request.name.endswith(".py") for request in server.requests)


def test_a_dry_run_fetches_no_shard_and_writes_nothing(server: HubServer, tmp_path: Path) -> None:
    plans = []
    result = convert_checkpoint(NAME, tmp_path / "out", dry_run=True, on_plan=plans.append)
    assert not result.is_written and list(tmp_path.iterdir()) == []
    assert server.n_bytes_sent < result.source_bytes + 1 and {r.name for r in server.requests if r.what == "cdn"}
    sizes = sorted(shard.size_bytes for shard in plans[0].checkpoint.shards)
    assert plans[0].fetched_bytes == sum(sizes[-2:])


def test_an_address_converts_as_its_repository(server: HubServer, tmp_path: Path) -> None:
    plans = []
    for address in (f"https://huggingface.co/{NAME}", f"hf://{NAME}@main"):
        convert_checkpoint(address, tmp_path / "out", dry_run=True, on_plan=plans.append)
    assert {plan.origin.repository for plan in plans} == {NAME}
    with pytest.raises(OptionError, match=r"revision is 'main', but hf://.* names 'v1'"):
        convert_checkpoint(f"hf://{NAME}@v1", tmp_path / "out", revision="main", dry_run=True)


def test_kept_sources_are_a_checkpoint_that_converts_again(server: HubServer, tmp_path: Path) -> None:
    convert_checkpoint(NAME, tmp_path / "out", keep_source=True)
    convert_checkpoint(tmp_path / "out.source", tmp_path / "again")
    assert same_model(tmp_path / "again", tmp_path / "out")


def interrupt(output: Path, *, after: float) -> None:
    def press(progress: ConvertProgress) -> None:
        if progress.phase == "convert" and progress.done_bytes >= after * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(NAME, output, progress=press)


def test_a_resumed_run_takes_the_same_commit_though_the_branch_moved_and_no_finished_shard_again(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    commit = server.repositories[NAME].branches["main"]
    interrupt(tmp_path / "out", after=0.7)
    push(server, source, config__json=b"{}")
    before = len(server.requests)
    result = convert_checkpoint(NAME, tmp_path / "out")
    assert result.resumed_bytes > 0
    assert verify_full(tmp_path / "out").source.commit == commit
    shards = server.repositories[NAME].commits[commit]
    first = shards[f"model-00001-of-0000{N_SHARDS}.safetensors"].sha256
    again = [r for r in server.requests[before:] if r.what == "cdn" and r.name == first and (r.end or 0) > 1 << 18]
    assert again == []


def test_a_resumed_run_of_another_revision_is_refused(server: HubServer, source: Path, tmp_path: Path) -> None:
    interrupt(tmp_path / "out", after=0.3)
    other = push(server, source, README__md=b"new")
    with pytest.raises(ConversionError, match=rf"commit: was '[0-9a-f]{{40}}', is '{other}'"):
        convert_checkpoint(NAME, tmp_path / "out", revision=other)


def test_a_connection_that_breaks_is_continued_and_a_shard_of_other_bytes_is_never_converted(
    server: HubServer, tmp_path: Path
) -> None:
    cuts = [3]

    def cut(handler: Handler, asked: Request) -> bool:
        if asked.what == "cdn" and cuts[0]:
            cuts[0] -= 1
            return handler.cut()
        return False

    server.faults.append(cut)
    assert convert_checkpoint(NAME, tmp_path / "out").is_written
    commit = server.repositories[NAME].commits[server.repositories[NAME].branches["main"]]
    victim = commit["model-00004-of-00005.safetensors"]
    server.faults[:] = [
        lambda handler, asked: (
            asked.what == "cdn"
            and asked.name == victim.sha256
            and handler.answer(200, victim.read(0, victim.size_bytes)[:-1] + b"\x01")
        )
    ]
    with pytest.raises(
        SourceError, match=r"model-00004-of-00005\.safetensors: sha256 is [0-9a-f]+, its repository says"
    ):
        convert_checkpoint(NAME, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    server.faults.clear()
    assert convert_checkpoint(NAME, tmp_path / "second").resumed_bytes > 0


def test_a_repository_that_cannot_be_converted_leaves_nothing(server: HubServer, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    push(server, source, config__json=json.dumps({**config, "num_hidden_layers": 3}).encode())
    with pytest.raises(LoadError, match=r"Qwen--QwQ-Tiny@[0-9a-f]{12}: .*\n12 missing: model\.layers\.2\."):
        convert_checkpoint(NAME, tmp_path / "out")
    with pytest.raises(SourceError, match="no such repository, or it is private"):
        convert_checkpoint("Qwen/Nothing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_goes_before_a_repository_and_takes_no_revision(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Qwen").mkdir()
    Path(NAME).symlink_to(source)
    assert verify_full(convert_checkpoint(NAME, "out").output).source.repository is None
    assert server.requests == []
    with pytest.raises(OptionError, match=f"revision is 'v1', .* but {NAME} is a folder"):
        convert_checkpoint(NAME, "second", revision="v1")


def cache(source: Path, root: Path, commit: str) -> Path:
    """The layout of huggingface_hub's cache, links into blobs included."""
    home = root / f"models--{NAME.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (home / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_offline_a_cached_snapshot_is_converted_and_without_one_the_way_out_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        SourceError, match=r"Qwen/QwQ-Tiny at v2: HF_HUB_OFFLINE is set and the Hub's cache has no such"
    ):
        convert_checkpoint(NAME, tmp_path / "out", revision="v2")
    cache(source, tmp_path / "cache", "1" * 40)
    convert_checkpoint(NAME, tmp_path / "out")
    record = verify_full(tmp_path / "out").source
    assert (record.repository, record.commit) == (NAME, "1" * 40)


def test_online_a_whole_cached_snapshot_of_the_commit_saves_the_fetch_and_a_broken_one_does_not_hurt(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = cache(source, tmp_path / "cache", server.repositories[NAME].branches["main"])
    convert_checkpoint(NAME, tmp_path / "out")
    assert server.n_bytes_sent == 0
    (snapshot / "model-00002-of-00005.safetensors").unlink()
    convert_checkpoint(NAME, tmp_path / "second")
    assert server.n_bytes_sent > 0
    assert same_model(tmp_path / "second", tmp_path / "out")


def test_progress_counts_what_is_fetched_and_never_goes_back(server: HubServer, tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    result = convert_checkpoint(NAME, tmp_path / "out", progress=seen.append)
    packing = [each for each in seen if each.phase == "convert"]
    fetched = [each.fetched_bytes for each in packing]
    assert None not in fetched and fetched == sorted(fetched) and fetched[-1] == result.source_bytes
    assert packing[-1].done_bytes == packing[-1].total_bytes
