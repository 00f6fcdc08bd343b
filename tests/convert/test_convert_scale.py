"""What carries a conversion to 65 GB: synthetic shards made on demand, syncs beside the work, the big scripts."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

import measure_conversion  # noqa: E402 - the path must be set first
import qwq_shaped  # noqa: E402

from qwq_mlx.convert import convert_checkpoint, write  # noqa: E402
from qwq_mlx.convert.calibration.collect import PassingShards, pass_order  # noqa: E402
from qwq_mlx.errors import DiskFullError  # noqa: E402
from qwq_mlx.facts import QWQ_32B_PREVIEW  # noqa: E402
from qwq_mlx.files.checkpoint import open_checkpoint  # noqa: E402
from qwq_mlx.model import process_memory as memory  # noqa: E402

pytestmark = pytest.mark.tiny


def test_the_full_layout_is_qwqs_771_tensors_in_17_shards(shared: Path) -> None:
    checkpoint = qwq_shaped.synthetic_checkpoint(n_layers=64)
    entries = [entry for shard in checkpoint.shards for entry in shard.entries]
    known = json.loads((shared / "qwq" / "tensors.json").read_text())
    assert {entry.name: list(entry.shape) for entry in entries} == known["tensors"]
    assert sum(entry.end - entry.start for entry in entries) == known["metadata"]["total_size"] == 65_527_752_704
    assert len(checkpoint.shards) == known["metadata"]["shards"] == 17


class TwoAtATime:
    """Shards that are handed out and taken back, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.held: set[str] = set()

    def wait(self, name: str) -> Path:
        self.names += [] if name in self.names else [name]
        self.held.add(name)
        assert len(self.held) <= 2
        return Path(name)

    def drop(self, name: str) -> None:
        self.held.remove(name)


def test_a_calibration_text_passes_the_32b_with_two_shards_at_a_time() -> None:
    checkpoint = qwq_shaped.synthetic_checkpoint(n_layers=64)
    tensors = {
        entry.name: (SimpleNamespace(path=Path(shard.name)), entry)
        for shard in checkpoint.shards
        for entry in shard.entries
    }
    order = pass_order(SimpleNamespace(tensors=tensors), QWQ_32B_PREVIEW, "text")
    shards = TwoAtATime()
    passing = PassingShards(order, shards)
    for part in order.needed:
        passing.before(part)
        assert {header.path.name for name, (header, _) in tensors.items() if name.startswith(part)} <= shards.held
    passing.after()
    assert not shards.held and shards.names == [each.name for each in checkpoint.shards]
    assert sum(len(names) == 2 for names in order.needed.values()) > 10  # layers that reach into the next shard


def test_any_range_of_a_synthetic_shard_is_a_cut_of_the_whole(tmp_path: Path) -> None:
    checkpoint = qwq_shaped.synthetic_checkpoint(n_layers=2, shard_bytes=200_000, is_tiny=True)
    assert len(checkpoint.shards) == 4
    qwq_shaped.write_checkpoint(checkpoint, tmp_path / "folder")
    choose = random.Random(0)
    for shard in checkpoint.shards:
        whole = (tmp_path / "folder" / shard.name).read_bytes()
        assert len(whole) == shard.size_bytes
        for _ in range(50):
            start, end = sorted(choose.randrange(shard.size_bytes + 1) for _ in range(2))
            assert shard.read(start, end) == whole[start:end]
    assert len(open_checkpoint(tmp_path / "folder").tensors) == 27


def test_a_sync_beside_the_work_changes_no_byte(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(tiny_checkpoint, tmp_path / "one")
    fsync, threads = os.fsync, set()

    def noted(fd: int) -> None:
        threads.add(threading.current_thread().name)
        fsync(fd)

    monkeypatch.setattr(write, "_SYNC_BYTES", 1000)
    monkeypatch.setattr("qwq_mlx.convert.plan.BLOCK_BYTES", 8192)
    monkeypatch.setattr(os, "fsync", noted)
    convert_checkpoint(tiny_checkpoint, tmp_path / "two")
    assert any(name.startswith("qwq-mlx-sync") for name in threads)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_a_sync_beside_the_work_meets_ends_the_run_and_the_next_one_finishes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(fd: int) -> None:
        if threading.current_thread().name.startswith("qwq-mlx-sync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_SYNC_BYTES", 1000)
        patch.setattr(os, "fsync", full)
        message = r"model-00001-of-00001\.safetensors: the disk is full: writing [\d,]+ bytes failed, [\d,]+ are free"
        with pytest.raises(DiskFullError, match=message):
            convert_checkpoint(tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert_checkpoint(tiny_checkpoint, tmp_path / "out").is_written


HOLD = (
    "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = bytes(len(block[::4096])).replace(b'\\0', b'x')"
)


def test_a_run_is_measured_with_its_own_memory_and_a_failed_one_says_why(tmp_path: Path) -> None:
    """In a process of its own: getrusage counts what the parent held when it forked, and a test worker holds much."""
    scripts = Path(measure_conversion.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(scripts)!r}); import measure_conversion as m; from pathlib import Path\n"
        f"print(m.run([sys.executable, '-c', {HOLD!r}, '400000000'], Path({str(tmp_path)!r})).peak_bytes)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=scripts.parent)
    assert 400e6 < int(said.stdout) < 450e6
    with pytest.raises(RuntimeError, match=r"(?s)failed: .*ZeroDivisionError"):
        measure_conversion.run([sys.executable, "-c", "1/0"], tmp_path)


def test_own_peak_memory_is_not_that_of_the_parent(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from qwq_mlx.model.process_memory import peak_memory_bytes; print(peak_memory_bytes())"
    nested = f"block = b'x' * 200_000_000; import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    said = subprocess.run([sys.executable, "-c", nested], check=True, capture_output=True, text=True, cwd=repository)
    if sys.platform == "linux":
        assert int(said.stdout) < 100_000_000
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_STATUS", Path("/nonexistent"))
        elsewhere = memory.peak_memory_bytes()
    assert elsewhere > 10_000_000


def test_peak_memory_is_at_most_what_was_planned(repository: Path, tmp_path: Path) -> None:
    code = (
        "from qwq_mlx.convert import convert_checkpoint; plans = []; "
        f"done = convert_checkpoint('qwq_mlx/pocket/checkpoint', {str(tmp_path / 'out')!r}, on_plan=plans.append, "
        f"n_workers=2, quality=False); print(done.peak_memory_bytes / plans[0].peak_memory_bytes)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=repository)
    assert 0.8 < float(said.stdout) <= 1.0


def test_the_comparison_prints_its_figures_against_the_bars() -> None:
    ours = {"wall_s": 6.0, "cpu_s": 11.0, "peak_bytes": 240_000_000, "output_bytes": 1_150_000_000, "others": 0.02}
    theirs = {**ours, "wall_s": 10.0, "peak_bytes": 4_400_000_000}
    text = measure_conversion.table(
        {
            "layers": 1,
            "cores": 2,
            "runs": {measure_conversion.OURS: [ours] * 3, measure_conversion.THEIRS: [theirs] * 3},
            "is_quiet": True,
            "same_packed_bits": True,
            "wall_ratio": 0.6,
            "peak_ratio": 0.055,
            "by_layers": {8: ours},
            "is_within_bars": True,
        }
    )
    assert "qwq_mlx.convert             6.0     11.0     0.24      1.150" in text
    assert "ours, 8 layers: peak 0.240 GB, 6.0 s" in text
    assert text.endswith("bars: peak <= 1.2 GB, wall <= 0.7 of mlx_lm.convert: reached")


def test_rounds_beside_other_work_are_measured_again_and_never_reach_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """others: what the rest of the machine used in each run; two runs a round, then one for the flat peak."""
    options = argparse.Namespace(layers=1, rounds=2, flat="1", tiny=True)
    monkeypatch.setattr(measure_conversion, "warm", lambda folder: None)
    monkeypatch.setattr(measure_conversion, "packed_digests", lambda folder: {})

    def measured(*others: float | None) -> dict[str, Any]:
        left = iter(others)

        def run(command: list[str], output: Path) -> measure_conversion.Run:
            output.mkdir(exist_ok=True)
            wall_s = 1.0 if "qwq_mlx.convert" in command else 2.0
            is_source = "qwq_shaped.py" in command[1]
            noise = 0.0 if is_source else next(left)
            return measure_conversion.Run(wall_s=wall_s, cpu_s=1.0, peak_bytes=1, output_bytes=1, others=noise)

        monkeypatch.setattr(measure_conversion, "run", run)
        found = measure_conversion.measure(tmp_path, options)
        assert next(left, "none left") == "none left"
        return found

    quiet = measured(0.0, 0.9, 0.9, 0.0, 0.1, 0.0, 0.0, 0.1, 0.9)
    assert (quiet["is_quiet"], quiet["is_within_bars"], quiet["wall_ratio"]) == (True, True, 0.5)
    assert [len(runs) for runs in quiet["runs"].values()] == [2, 2]
    noisy = measured(*[0.0, 0.9] * 6, 0.0)
    assert (noisy["is_quiet"], noisy["is_within_bars"], noisy["wall_ratio"]) == (False, False, 0.5)
    assert [len(runs) for runs in noisy["runs"].values()] == [6, 6]
    assert "NOT QUIET: other processes ran beside the rounds" in measure_conversion.table(noisy)
    unknown = measured(None, None, None, None, None)
    assert unknown["is_within_bars"] and "unknown" in measure_conversion.table(unknown)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell what it used")
def test_what_others_use_beside_a_run_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        found = measure_conversion.run([sys.executable, "-c", "import time; time.sleep(1)"], tmp_path)
        other.kill()
    assert found.others is not None and found.others > measure_conversion.MAX_OTHERS
    monkeypatch.setattr(measure_conversion, "_STAT", tmp_path / "none")
    assert measure_conversion.run([sys.executable, "-c", ""], tmp_path).others is None


def test_the_whole_way_from_the_hub_at_a_small_size(tmp_path: Path) -> None:
    """The script that converts all 65.5 GB, on four narrow layers: fetched, converted, dropped, verified twice."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "convert_full_scale.py"), "--tiny", "--layers", "4"]
    run = subprocess.run(
        [*command, "--shard-bytes", "420000", "--work", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["faults"] == [] and result["fetched_twice_bytes"] == 0
    assert result["output_bytes"] == result["planned_bytes"] > 0
    assert (result["n_tensors"], result["n_shards"]) == (51, 3)
    assert "faults      none" in run.stdout
    assert list(tmp_path.iterdir()) == []
