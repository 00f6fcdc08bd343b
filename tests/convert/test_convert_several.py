"""Several recipes in one pass: each output is what its own conversion makes, and the source is read once."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from faulty_disk import FaultyDisk
from hub_server import HubServer, Repository

from qwq_mlx.convert import Conversion, ConvertOptions, Progress, convert_checkpoint, convert_recipes, job, read
from qwq_mlx.convert.calibration import importance as calibrating
from qwq_mlx.convert.write import ShardWriter
from qwq_mlx.errors import ConversionError, OptionError
from qwq_mlx.files.header import Header
from qwq_mlx.files.hub.prefetch import ShardsAhead
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.manifest import MANIFEST_NAME, read_manifest, verify_full

pytestmark = pytest.mark.tiny
RECIPES = {"four": "4bit", "six": "6bit", "mx": "mxfp4"}
NAME = "Qwen/QwQ-Tiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("several") / "source", n_layers=1, n_shards=3)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Several blocks per matrix, so that something can happen between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwq_mlx.convert.plan.BLOCK_BYTES", 8192)
        yield


@pytest.fixture(scope="module")
def singles(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What each recipe's own conversion makes."""
    folder = tmp_path_factory.mktemp("singles")
    for name, recipe in RECIPES.items():
        convert_checkpoint(source, folder / name, recipe=recipe, n_workers=2)
    return {name: content(folder / name) for name in RECIPES}


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; the manifest without the figures of the run."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST_NAME}
    return {**found, MANIFEST_NAME: replace(read_manifest(folder), run={})}


def together(source: Path | str, folder: Path, names: list[str] | None = None, **options: object) -> list[Conversion]:
    outputs = {folder / name: RECIPES[name] for name in names or RECIPES}
    progress = options.pop("progress", None)
    return list(convert_recipes(source, outputs, ConvertOptions(n_workers=2, **options), progress=progress))


def press_ctrl_c(
    source: Path | str, folder: Path, names: list[str], *, after: float, calibrate: Path | None = None
) -> None:
    def press(progress: Progress) -> None:
        if progress.phase == "convert" and progress.done_bytes >= after * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(source, folder, names, calibrate=calibrate, progress=press)


def test_every_output_is_its_own_conversions_and_the_source_is_read_once(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, n_bytes = read._pread, [0]

    def counted(fd: int, view: memoryview, position: int) -> int:
        n = pread(fd, view, position)
        n_bytes[0] += n
        return n

    monkeypatch.setattr(read, "_pread", counted)
    done = together(source, tmp_path / "out")
    assert n_bytes[0] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert {name: content(tmp_path / "out" / name) for name in RECIPES} == singles
    assert [each.output for each in done] == [tmp_path / "out" / name for name in RECIPES]
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(RECIPES)


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.repositories[NAME] = Repository()
        server.repositories[NAME].push({path.name: path.read_bytes() for path in source.iterdir()})
        yield server


def test_from_the_hub_every_byte_is_fetched_once_and_two_shards_are_on_the_disk_at_most(
    server: HubServer, source: Path, tmp_path: Path, singles: dict[str, dict[str, object]]
) -> None:
    convert_checkpoint(NAME, tmp_path / "one", n_workers=2)
    for_one, most = server.n_bytes_sent, [0]

    def look(progress: Progress) -> None:
        most[0] = max(most[0], sum(1 for _ in (tmp_path / "out").glob("*.partial/source/*model-*")))

    together(NAME, tmp_path / "out", progress=look)
    assert server.n_bytes_sent == 2 * for_one and 1 <= most[0] <= 2
    for name, expected in singles.items():
        ours = content(tmp_path / "out" / name)
        assert {k: v for k, v in ours.items() if k != MANIFEST_NAME} == {
            k: v for k, v in expected.items() if k != MANIFEST_NAME
        }
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(RECIPES)


def test_from_the_hub_a_killed_run_goes_on_and_a_shard_leaves_only_when_every_output_has_it(
    server: HubServer, tmp_path: Path, singles: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, out = ["four", "six"], tmp_path / "out"
    press_ctrl_c(NAME, out, ["four"], after=0.7)  # one of the outputs is ahead by a shard or more
    wanted: list[list[str]] = []
    lines: list[list[int]] = []
    begin, drop = ShardsAhead.__init__, ShardsAhead.drop

    def begun(shards: ShardsAhead, hub: object, snapshot: object, headers: list[Header], **rest: object) -> None:
        wanted.append([header.path.name for header in headers])
        begin(shards, hub, snapshot, headers, **rest)

    def dropped(shards: ShardsAhead, name: str) -> None:
        lines.append([len((out / f"{each}.partial" / "journal.jsonl").read_text().splitlines()) for each in names])
        drop(shards, name)

    monkeypatch.setattr(ShardsAhead, "__init__", begun)
    monkeypatch.setattr(ShardsAhead, "drop", dropped)
    press_ctrl_c(NAME, out, names, after=0.5)
    four, six = together(NAME, out, names)
    assert four.resumed_bytes > six.resumed_bytes > 0
    assert len(wanted[0]) == 3 and wanted[1] == wanted[0][1:]  # what both have is not fetched again
    assert lines[0][0] > lines[0][1] > 1 and lines[-1] == [four.n_tensors + 1] * 2
    for name in names:
        assert verify_full(out / name).tensors == singles[name][MANIFEST_NAME].tensors


def test_an_output_that_is_ahead_is_not_repeated(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    press_ctrl_c(source, tmp_path / "out", ["six"], after=0.55)
    started: list[tuple[str, str]] = []
    write = ShardWriter.write

    def noted(writer: ShardWriter, packed: object) -> None:
        if packed.block.first_row == 0:
            started.append((writer._folder.parent.name, packed.block.tensor.source.name))
        write(writer, packed)

    monkeypatch.setattr(ShardWriter, "write", noted)
    four, six = together(source, tmp_path / "out", ["four", "six"])
    assert four.resumed_bytes == 0 and six.resumed_bytes >= 0.55 * six.source_bytes
    n_tensors = four.n_tensors
    assert [name for name, _ in started].count("four.partial") == n_tensors
    assert 0 < [name for name, _ in started].count("six.partial") < n_tensors
    assert content(tmp_path / "out" / "six") == singles["six"] and content(tmp_path / "out" / "four") == singles["four"]


def test_a_kill_at_any_operation_leaves_each_whole_or_absent_and_the_same_call_finishes_all(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]]
) -> None:
    names, lot = ["four", "six"], random.Random(0)
    with FaultyDisk(tmp_path) as count:
        together(source, tmp_path / "count", names)
    n = count.n_operations
    commits = [at for at, operation in enumerate(count.operations) if operation == "rename"]
    for at in sorted({0, n - 1, *commits, *(each + 1 for each in commits), *lot.sample(range(n), 6)}):
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        with FaultyDisk(folder, at=at, kind=lot.choice(["kill", "torn"])) as disk:
            together(source, folder, names)
        assert disk.crashed
        stamps = {name: (folder / name).stat().st_ino for name in names if (folder / name).exists()}
        for name in stamps:
            verify_full(folder / name)
        if len(stamps) < len(names):
            together(source, folder, names)
        for name in names:
            assert content(folder / name) == singles[name]
            assert stamps.get(name) in (None, (folder / name).stat().st_ino), "a finished output was made again"


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_loses_nothing_that_was_published(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]], seed: int
) -> None:
    names, lot = ["four", "six"], random.Random(seed)
    with FaultyDisk(tmp_path) as count:
        together(source, tmp_path / "count", names)
    folder = tmp_path / "cut"
    folder.mkdir()
    with FaultyDisk(folder, at=lot.randrange(count.n_operations), kind="torn") as disk:
        together(source, folder, names)
    disk.lose_power(lot if seed % 2 else None)
    if not all((folder / name).exists() for name in names):
        together(source, folder, names)
    assert {name: content(folder / name) for name in names} == {name: singles[name] for name in names}


def test_a_full_disk_is_one_message_and_the_same_call_finishes(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]]
) -> None:
    names = ["four", "mx"]
    for at in (30, 90, 150):
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        with pytest.raises(ConversionError, match="the disk is full"), FaultyDisk(folder, at=at, kind="full"):
            together(source, folder, names)
        together(source, folder, names)
        assert {name: content(folder / name) for name in names} == {name: singles[name] for name in names}


def test_an_output_of_another_run_is_refused_before_anything_and_replaced_by_force(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]]
) -> None:
    convert_checkpoint(source, tmp_path / "six", recipe="8bit")
    with pytest.raises(ConversionError, match=r"six: exists already\. Choose another output, or pass --force"):
        together(source, tmp_path, ["four", "six"])
    assert not (tmp_path / "four.partial").exists()
    together(source, tmp_path, ["four", "six"], force=True)
    assert {name: content(tmp_path / name) for name in ("four", "six")} == {n: singles[n] for n in ("four", "six")}


def stop_after_the_first_is_published(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    publish, n = job.publish, [0]

    def once(*arguments: object, **options: object) -> None:
        if n[0]:
            raise KeyboardInterrupt
        n[0] += 1
        publish(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "publish", once)
        together(source, folder, ["four", "six"])
    assert not (folder / "six").exists()
    return (folder / "four").stat().st_ino


def test_a_published_output_of_a_stopped_run_is_left_alone_even_by_force(
    source: Path, tmp_path: Path, singles: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, force in enumerate((False, True)):
        folder = tmp_path / str(number)
        first = stop_after_the_first_is_published(source, folder, monkeypatch)
        four, six = together(source, folder, ["four", "six"], force=force)
        assert (folder / "four").stat().st_ino == first
        assert (
            four.resumed_bytes == six.resumed_bytes == sum(output.stat().st_size for output in ()) + four.resumed_bytes
        )
        assert content(folder / "six") == singles["six"]
        assert sorted(each.name for each in folder.iterdir()) == ["four", "six"]


def test_a_published_output_counts_only_for_the_conversion_that_made_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_the_first_is_published(source, tmp_path, monkeypatch)
    with pytest.raises(ConversionError, match="four: exists already"):
        convert_checkpoint(source, tmp_path / "four", recipe="8bit")
    with pytest.raises(ConversionError, match="four: exists already"):
        together(source, tmp_path, ["four", "six"], restart=True)
    (tmp_path / "four" / "config.json").write_text("{}")  # no longer whole: not taken for ours
    with pytest.raises(ConversionError, match="four: exists already"):
        together(source, tmp_path, ["four", "six"])
    assert together(source, tmp_path, ["four", "six"], force=True)[0].resumed_bytes == 0
    verify_full(tmp_path / "four")


def test_a_converter_at_work_on_one_of_two_outputs_refuses_both(source: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "six"):
        with pytest.raises(ConversionError, match=rf"six: process {os.getpid()} on .* is writing it"):
            together(source, tmp_path, ["four", "six"])
        assert not (tmp_path / "four.partial").exists()
        assert convert_checkpoint(source, tmp_path / "four", recipe="4bit").is_written  # the other one's lock is free
    shutil.rmtree(tmp_path / "four")
    assert len(together(source, tmp_path, ["four", "six"])) == 2


@pytest.mark.parametrize("second", ["./out", "out/in", "out.partial", "out.source/x", "link"])
def test_outputs_that_get_in_each_others_way_are_refused(source: Path, tmp_path: Path, second: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(OptionError, match=r"is the output .*out too, or lies in it|expected one or more different fol"):
        convert_recipes(source, {f"{tmp_path}/out": "4bit", f"{tmp_path}/{second}": "6bit"})
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


def test_no_output_at_all_is_refused(source: Path) -> None:
    with pytest.raises(OptionError, match="expected one or more different folders"):
        convert_recipes(source, {})


def test_disk_and_memory_are_planned_for_all_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[object] = []
    options = ConvertOptions(dry_run=True, n_workers=2)
    convert_recipes(source, {tmp_path / "a": "4bit", tmp_path / "b": "8bit"}, options, on_plan=plans.extend)
    four, eight = plans
    assert convert_checkpoint(source, tmp_path / "a", recipe="4bit", dry_run=True).output_bytes == four.output_bytes
    assert four.peak_memory_bytes == eight.peak_memory_bytes
    free = int(1.05 * (four.output_bytes + eight.output_bytes)) - 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    needed, there = f"{(free + 100) / 1e3:.2f} kB", f"{free / 1e3:.2f} kB"
    with pytest.raises(
        ConversionError, match=f"a: needs {needed} more on its disk with the other outputs, {there} are"
    ):
        convert_recipes(source, {tmp_path / "a": "4bit", tmp_path / "b": "8bit"})
    assert convert_checkpoint(source, tmp_path / "b", recipe="8bit").is_written


def test_a_calibration_text_runs_once_for_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, runs = tmp_path / "text.txt", []
    text.write_text("wait, is the answer 479? let me think again. " * 30)

    def counted(*_: object) -> dict[str, np.ndarray]:
        runs.append(1)
        return {"lm_head": np.linspace(0.1, 4, 128, dtype=np.float32)}

    monkeypatch.setattr(calibrating, "_run", counted)
    press_ctrl_c(source, tmp_path / "out", ["four"], after=0.2, calibrate=text)
    together(source, tmp_path / "out", ["four", "six"], calibrate=text)
    assert len(runs) == 1
    convert_checkpoint(source, tmp_path / "six", recipe="6bit", calibrate=text, n_workers=2)
    assert len(runs) == 2 and content(tmp_path / "six") == content(tmp_path / "out" / "six")


def test_the_quality_of_all_is_measured_in_one_pass_and_is_each_ones_own(source: Path, tmp_path: Path) -> None:
    text, seen = tmp_path / "essay.txt", []
    text.write_text("Wait, is the answer so? The answer is in the end. " * 2)
    done = together(source, tmp_path / "out", ["four", "six"], quality=text, progress=seen.append)
    assert done[0].kl != done[1].kl and None not in (done[0].kl, done[1].kl)
    totals = {each.total_bytes for each in seen if each.phase == "quality"}
    assert len(totals) == 1
    convert_checkpoint(source, tmp_path / "six", recipe="6bit", quality=text, n_workers=2)
    assert content(tmp_path / "six") == content(tmp_path / "out" / "six")
