"""Whatever stops a conversion, the same call again finishes it, with the same bytes, and repeats at most one tensor."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint
from faulty_disk import CrashError, FaultyDisk

from qwq_mlx.convert import convert_checkpoint, job
from qwq_mlx.convert.write import ShardWriter
from qwq_mlx.errors import ConversionError
from qwq_mlx.files.atomic import exchange
from qwq_mlx.files.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_full

pytestmark = pytest.mark.tiny
N_POINTS = 16  # of about 250 operations; scripts/break_conversion.py takes them all


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per matrix, so that a crash can fall between them."""
    monkeypatch.setattr("qwq_mlx.convert.plan.BLOCK_BYTES", 8192)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("crash") / "source", n_layers=1)


@pytest.fixture
def undisturbed(source: Path, tmp_path: Path) -> dict[str, object]:
    convert_checkpoint(source, tmp_path / "undisturbed")
    return content(tmp_path / "undisturbed")


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; the manifest without the figures of the run."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST_NAME}
    manifest: Manifest = read_manifest(folder)
    return {**found, MANIFEST_NAME: replace(manifest, run={})}


def count_operations(source: Path, folder: Path) -> int:
    folder.mkdir()
    with FaultyDisk(folder) as disk:
        convert_checkpoint(source, folder / "out", n_workers=2)
    return disk.n_operations


class Watch:
    """Which tensors have had bytes written since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        write = ShardWriter.write

        def noted(writer: ShardWriter, packed: object) -> None:
            if packed.block.first_row == 0:
                self.started.append(packed.block.tensor.source.name)
            write(writer, packed)

        monkeypatch.setattr(ShardWriter, "write", noted)


def points(n_operations: int, seed: int) -> list[int]:
    """The first and last operations, which are of every kind, and a sample of those between."""
    lot = random.Random(seed)
    ends = [*range(0, 8, 2), *range(n_operations - 6, n_operations)]
    return ends + sorted(lot.sample(range(8, n_operations - 6), N_POINTS - len(ends)))


def check_whole_or_absent(output: Path) -> None:
    if output.exists():
        verify_full(output)


@pytest.mark.parametrize("kind", ["kill", "torn"])
def test_a_kill_at_any_operation_leaves_nothing_or_all_and_a_rerun_finishes_with_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: dict[str, object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_operations = count_operations(source, tmp_path / "count")
    watch = Watch(monkeypatch)
    for at in points(n_operations, seed=len(kind)):
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        watch.started.clear()
        with FaultyDisk(folder, at=at, kind=kind) as disk:
            convert_checkpoint(source, folder / "out", n_workers=2)
        assert disk.crashed
        check_whole_or_absent(folder / "out")
        first = list(watch.started)
        watch.started.clear()
        if not (folder / "out").exists():
            convert_checkpoint(source, folder / "out", n_workers=2)
            assert len(set(first) & set(watch.started)) <= 1, "more than one tensor was repeated"
        assert content(folder / "out") == undisturbed
        assert not (folder / "out.partial" / "model").exists()


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_at_any_operation_loses_at_most_the_tensor_being_written(
    source: Path, tmp_path: Path, undisturbed: dict[str, object], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even seeds lose everything that was not synced; odd ones lose a random part of it."""
    n_operations = count_operations(source, tmp_path / "count")
    watch, lot = Watch(monkeypatch), random.Random(seed)
    at, folder = lot.randrange(n_operations), tmp_path / "cut"
    folder.mkdir()
    with FaultyDisk(folder, at=at, kind="torn") as disk:
        convert_checkpoint(source, folder / "out", n_workers=2)
    disk.lose_power(lot if seed % 2 else None)
    check_whole_or_absent(folder / "out")
    first = list(watch.started)
    watch.started.clear()
    if not (folder / "out").exists():
        convert_checkpoint(source, folder / "out", n_workers=2)
        assert len(set(first) & set(watch.started)) <= 1, "more than one tensor was repeated"
    assert content(folder / "out") == undisturbed


@pytest.mark.parametrize(("kind", "message"), [("full", "the disk is full"), ("broken", "writing failed|Input/output")])
def test_a_full_or_broken_disk_is_one_message_and_a_rerun_finishes(
    source: Path, tmp_path: Path, undisturbed: dict[str, object], kind: str, message: str
) -> None:
    n_operations = count_operations(source, tmp_path / "count")
    for at in points(n_operations, seed=7)[::3]:
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        with FaultyDisk(folder, at=at, kind=kind) as disk:
            try:
                convert_checkpoint(source, folder / "out", n_workers=2)
            except ConversionError as error:
                assert str(folder) in str(error)
                assert message.split("|")[0] in str(error) or message.split("|")[-1] in str(error)
            else:
                assert not set(disk.operations[at:]) & {"pwrite", "write", "ftruncate", "fsync", "mkdir"}
        check_whole_or_absent(folder / "out")
        if not (folder / "out").exists():
            convert_checkpoint(source, folder / "out", n_workers=2)
        assert content(folder / "out") == undisturbed


def test_replacing_by_force_leaves_the_old_or_the_new_folder_at_every_crash(
    source: Path, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    n_operations = count_operations(source, tmp_path / "count")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    can_exchange = exchange(tmp_path / "a", tmp_path / "b")
    for at in range(n_operations - 8, n_operations + 8):
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        (folder / "out").mkdir()
        (folder / "out" / "config.json").write_text("old")
        with FaultyDisk(folder, at=at, kind="kill"):
            convert_checkpoint(source, folder / "out", n_workers=2, force=True)
        assert not can_exchange or (folder / "out" / "config.json").is_file(), "the name leads to the old or the new"
        if (folder / "out" / "config.json").exists() and (folder / "out" / "config.json").read_text() != "old":
            assert content(folder / "out") == undisturbed
        convert_checkpoint(source, folder / "out", n_workers=2, force=True)
        assert content(folder / "out") == undisturbed
        assert [path.name for path in folder.iterdir()] == ["out"]


def stop_after_publishing(source: Path, output: Path) -> int:
    """Leaves the published output beside its partial folder; returns the output's inode."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "remove_partial", lambda output: (_ for _ in ()).throw(KeyboardInterrupt))
        convert_checkpoint(source, output, n_workers=2)
    assert (output.parent / "out.partial" / "journal.jsonl").exists()
    return output.stat().st_ino


@pytest.mark.parametrize("force", [False, True])
def test_an_output_published_right_before_the_stop_is_left_alone_by_the_same_call(
    source: Path, tmp_path: Path, undisturbed: dict[str, object], force: bool
) -> None:
    inode = stop_after_publishing(source, tmp_path / "out")
    conversion = convert_checkpoint(source, tmp_path / "out", n_workers=2, force=force)
    assert (tmp_path / "out").stat().st_ino == inode and not (tmp_path / "out.partial").exists()
    assert conversion.resumed_bytes > 0.99 * conversion.source_bytes
    assert content(tmp_path / "out") == undisturbed


def test_a_published_output_counts_only_for_the_conversion_that_made_it(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop_after_publishing(source, output)
    with pytest.raises(ConversionError, match="out: exists already"):
        convert_checkpoint(source, output, recipe="8bit")
    with pytest.raises(ConversionError, match="out: exists already"):
        convert_checkpoint(source, output, restart=True)
    (output / "config.json").write_text("{}")  # no longer whole: not taken for ours
    with pytest.raises(ConversionError, match="out: exists already"):
        convert_checkpoint(source, output)
    convert_checkpoint(source, output, force=True)
    verify_full(output)


def test_a_crash_is_no_error_that_our_code_could_swallow() -> None:
    assert not issubclass(CrashError, Exception)
