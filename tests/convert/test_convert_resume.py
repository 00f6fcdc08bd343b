"""Going on after an interruption: what is kept, what is checked, and what is never mixed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from qwq_mlx.convert import ConvertProgress, convert_checkpoint, read
from qwq_mlx.convert.journal import FinishedTensor, Journal, differences, read_description
from qwq_mlx.convert.read import Buffers, Stopped
from qwq_mlx.errors import ConversionError, SourceError
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.manifest import verify_full

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def interrupt(source: Path, output: Path, *, after: float) -> None:
    """Convert until this share of the source is read, then press Ctrl-C."""

    def press(progress: ConvertProgress) -> None:
        if progress.phase == "convert" and progress.done_bytes >= after * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, output, progress=press, n_workers=2)


def resume_refused(
    source: Path, output: Path, message: str, error: type[Exception] = ConversionError, **options: object
) -> None:
    with pytest.raises(error, match=message):
        convert_checkpoint(source, output, **options)
    assert not output.exists()


def test_an_interrupted_run_keeps_what_is_finished_and_the_next_one_reads_only_the_rest(
    source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(source, tmp_path / "whole")
    interrupt(source, tmp_path / "out", after=0.6)
    assert not (tmp_path / "out").exists()
    seen: list[ConvertProgress] = []
    resumed = convert_checkpoint(source, tmp_path / "out", progress=seen.append)
    assert resumed.resumed_bytes >= 0.6 * resumed.source_bytes
    assert seen[0].resumed_bytes == resumed.resumed_bytes < seen[0].done_bytes
    manifest = verify_full(tmp_path / "out")
    assert manifest.run["resumed_bytes"] == resumed.resumed_bytes
    for path in (tmp_path / "whole").glob("model*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert manifest.tensors == verify_full(tmp_path / "whole").tensors
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_what_a_killed_process_left_half_written_is_never_published(source: Path, tmp_path: Path) -> None:
    """Small files are written under a name with the process's number, which the next process does not overwrite."""
    interrupt(source, tmp_path / "out", after=0.6)
    (tmp_path / "out.partial" / "model" / ".config.json.4242.tmp").write_text("{")
    convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "whole")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_restart_throws_the_unfinished_conversion_away(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", after=0.6)
    assert convert_checkpoint(source, tmp_path / "out", restart=True).resumed_bytes == 0


def test_another_recipe_or_version_or_tokenizer_is_never_mixed_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    interrupt(source, output, after=0.5)
    resume_refused(
        source,
        output,
        r"(?s)out\.partial: holds an unfinished conversion of something else:.*recipe: was .*`restart=True`",
        recipe="pocket-4bit",
    )
    with monkeypatch.context() as patch:
        patch.setattr("qwq_mlx.convert.finalize.package_version", lambda name: "99")
        resume_refused(source, output, r"versions\.mlx: was '0.*', is '99'")
    config = source / "tokenizer_config.json"
    before = config.read_bytes()
    config.write_bytes(before + b" ")
    resume_refused(source, output, r"files\.tokenizer_config\.json: was ")
    config.write_bytes(before)
    assert convert_checkpoint(source, output).resumed_bytes > 0


def test_a_shard_that_changed_meanwhile_is_noticed_by_its_bytes(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", after=0.3)
    raw = bytearray((source / FIRST).read_bytes())
    raw[3000] ^= 1
    (source / FIRST).write_bytes(raw)
    resume_refused(
        source,
        tmp_path / "out",
        rf"{FIRST}: differs from the shard that the unfinished conversion read: up to the end of ",
    )
    raw[3000] ^= 1
    (source / FIRST).write_bytes(raw)  # the same bytes at another time are the same shard
    assert convert_checkpoint(source, tmp_path / "out").resumed_bytes > 0


def test_a_finished_shard_is_read_again_only_if_its_time_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr("qwq_mlx.convert.read._hash_range", lambda fd, shard, *rest: hashed.append(shard.path.name))
    monkeypatch.setattr("qwq_mlx.convert.read._check_prefix", lambda *rest: None)
    for touch in (False, True):
        interrupt(source, tmp_path / "out", after=0.6)
        if touch:
            os.utime(source / FIRST)
        hashed.clear()
        interrupt(source, tmp_path / "out", after=0.7)
        assert (FIRST in hashed) == touch
        shutil.rmtree(tmp_path / "out.partial")


def test_a_changed_shard_is_noticed_though_its_time_was_put_back(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", after=0.7)  # the first shard is finished
    status, raw = (source / FIRST).stat(), bytearray((source / FIRST).read_bytes())
    raw[-9] ^= 1
    (source / FIRST).write_bytes(raw)
    os.utime(source / FIRST, ns=(status.st_atime_ns, status.st_mtime_ns))
    resume_refused(source, tmp_path / "out", rf"{FIRST}: differs from the shard that the unfinished conversion read")


def test_a_partial_folder_that_lost_a_shard_is_refused(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", after=0.5)
    shard = tmp_path / "out.partial" / "model" / "model-00001-of-00001.safetensors"
    os.truncate(shard, 100)
    resume_refused(
        source, tmp_path / "out", r"model-00001-of-00001\.safetensors: has 100 bytes, expected \d+,\d+ in the unf"
    )
    shard.unlink()
    resume_refused(
        source, tmp_path / "out", r"safetensors: the unfinished conversion cannot go on without it \(No such file"
    )


def test_a_partial_folder_without_a_first_line_is_begun_again(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", after=0.5)
    (tmp_path / "out.partial" / "journal.jsonl").write_bytes(b"12345678 {torn")
    assert convert_checkpoint(source, tmp_path / "out").resumed_bytes == 0


def test_two_converters_on_one_output_the_second_is_refused_while_the_first_lives(source: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out"):
        resume_refused(source, tmp_path / "out", rf"out: process {os.getpid()} on .* is writing it")
    assert not (tmp_path / "out.partial").exists()
    assert convert_checkpoint(source, tmp_path / "out").is_written


def test_a_lock_file_whose_process_is_gone_locks_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("process 4242424 on elsewhere\n")
    assert convert_checkpoint(source, tmp_path / "out").is_written


def test_an_output_that_another_process_finished_meanwhile_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    def finish_first(plan: object) -> None:
        if not (tmp_path / "out").exists():
            (tmp_path / "out").mkdir()

    with pytest.raises(ConversionError, match="out: exists already"):
        convert_checkpoint(source, tmp_path / "out", on_plan=finish_first)


def test_a_source_that_shrinks_or_vanishes_while_it_is_read_is_named(source: Path, tmp_path: Path) -> None:
    def cut(plan: object) -> None:
        os.truncate(source / FIRST, 5000)

    resume_refused(
        source,
        tmp_path / "out",
        rf"{FIRST}: has 5,000 bytes, had \d+,\d+ when its header was read",
        SourceError,
        on_plan=cut,
    )


def test_a_vanished_shard_is_named(source: Path, tmp_path: Path) -> None:
    resume_refused(
        source,
        tmp_path / "out",
        rf"{FIRST}: cannot be opened any more \(No such file",
        SourceError,
        on_plan=lambda plan: (source / FIRST).unlink(),
    )


def test_a_read_error_names_shard_tensor_and_position(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = read._pread

    def broken(fd: int, view: memoryview, position: int) -> int:
        if position > 100_000:
            raise OSError(5, "Input/output error")
        return real(fd, view, position)

    with monkeypatch.context() as patch:
        patch.setattr(read, "_pread", broken)
        message = rf"{FIRST}: tensor model\.\S+: reading at byte 1\d\d,\d+ failed \(Input/output error\)"
        resume_refused(source, tmp_path / "out", message, SourceError)
    with monkeypatch.context() as patch:
        patch.setattr(read, "_pread", lambda fd, view, position: 0)
        resume_refused(
            source, tmp_path / "out", r"the file ends at byte \d.*, it had \d+,\d+ bytes before", SourceError
        )
    assert convert_checkpoint(source, tmp_path / "out").resumed_bytes > 0


def test_short_reads_and_writes_are_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(source, tmp_path / "whole")
    pread, pwrite = read._pread, os.pwrite
    monkeypatch.setattr(read, "_pread", lambda fd, view, at: pread(fd, view[:5000], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3000], at))
    convert_checkpoint(source, tmp_path / "out")
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_system_without_preadv_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(source, tmp_path / "whole")
    monkeypatch.delattr(os, "preadv", raising=False)
    convert_checkpoint(source, tmp_path / "out")
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_small_file_that_vanishes_is_named(source: Path, tmp_path: Path) -> None:
    resume_refused(
        source,
        tmp_path / "out",
        r"tokenizer_config\.json: cannot be read \(No such file",
        SourceError,
        on_plan=lambda plan: (source / "tokenizer_config.json").unlink(),
    )


DONE = FinishedTensor(
    name="a", sha256=("1", "2"), source_sha256="3", source_ctime_ns=4, error2=0.1, weight2=1 / 3, zero_pages=0
)


def test_a_journal_gives_back_what_was_appended_and_drops_a_torn_or_flipped_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, {"recipe": "x"})
    journal.append(DONE)
    journal.append(FinishedTensor(**{**{f: getattr(DONE, f) for f in DONE.__dataclass_fields__}, "name": "b"}))
    journal.close()
    whole = path.read_bytes()
    for damaged, names in (
        (whole, ["a", "b"]),
        (whole[:-1], ["a"]),
        (whole[: len(whole) - 30] + b"X" + whole[len(whole) - 29 :], ["a"]),
        (whole + b"00000000 ", ["a", "b"]),
    ):
        path.write_bytes(damaged)
        resumed = Journal.resume(path, {"recipe": "x"})
        assert resumed is not None and list(resumed.finished) == names and resumed.finished["a"] == DONE
        resumed.close()
        assert path.read_bytes() == whole[: sum(len(line) + 1 for line in whole.split(b"\n")[: 1 + len(names)])]


def test_differences_name_each_field_by_its_path() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": "x" * 99}) == [
        "a.c: was 2, is 5",
        "d: was 3, is nothing",
        "e: was nothing, is '" + "x" * 76 + "...",
    ]


def test_buffers_stop_whoever_waits() -> None:
    buffers = Buffers(2, 10)
    first = buffers.take()
    buffers.stop()
    buffers.give_back(first)
    with pytest.raises(Stopped):
        buffers.take()


def test_the_source_record_names_repository_and_commit_of_a_snapshot(tiny_checkpoint: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--Qwen--QwQ-32B-Preview" / "snapshots" / commit
    shutil.copytree(tiny_checkpoint, snapshot)
    convert_checkpoint(snapshot, tmp_path / "out")
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert (source["repository"], source["commit"]) == ("Qwen/QwQ-32B-Preview", commit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, r"line 2 is not JSON"),
        (b"[1]", r"line 2 holds a JSON list, expected an object"),
        (b'{"name": 1}', r"line 2"),
        (b'{"name": "x", "sha256": "y", "more": 1}', r"line 2"),
        (b'{"zero_pages": ' + b"9" * 5_000 + b"}", r"line 2 is not JSON"),
    ],
)
def test_a_line_that_somebody_wrote_with_its_checksum_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.create(path, {"recipe": "x"}).close()
    path.write_bytes(path.read_bytes() + b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises((ConversionError, SourceError), match=message) as told:
        Journal.resume(path, {"recipe": "x"})
    assert str(path) in str(told.value) and "restart=True" in str(told.value)
    assert read_description(path) in ({}, {"recipe": "x"}), "a restart does not fail on it"
