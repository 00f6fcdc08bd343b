"""The counts of the scripts that break things: shown as they grow, kept when a run is cut short."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tally import Tally


@pytest.fixture
def interrupt() -> Iterator[None]:
    """The handler of Ctrl-C is put back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still; its `now` is set by the test."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_a_line_per_so_many_events_tells_rate_and_rest(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    tally = Tally(every=10)
    tally.begin("kill")
    for _ in tally.until("kills", 25):
        tally["kills"] += 1
        clock.now += 6
    tally.end()
    assert tally.finish() == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "kill: 10 of 25, 10.0 a minute, 1.5 minutes left | 10 kills",
        "kill: 20 of 25, 10.0 a minute, 0.5 minutes left | 20 kills",
        "kill: 25 of 25, 10.0 a minute, 0.0 minutes left | 25 kills",
    ]
    assert said.out == "kill: 25 kills\nall good\n"


def test_a_count_in_capitals_makes_the_run_fail_though_a_later_part_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    for part, what in (("first", "OTHER BYTES"), ("second", "same bytes")):
        tally.begin(part)
        tally[what] += 2
        tally.end()
    assert tally.finish() == 1
    assert capsys.readouterr().out == "first: 2 OTHER BYTES\nsecond: 2 same bytes\n2 NOT GOOD\n"


def test_at_the_end_of_the_budget_the_counts_so_far_are_printed_and_the_rest_is_not_begun(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    tally = Tally(budget_s=10)
    for part in ("kill", "race"):
        tally.begin(part)
        for _ in tally.until("runs", 100):
            tally["runs"] += 1
            clock.now += 4
        tally.end()
    assert tally.finish() == 0
    assert capsys.readouterr().out == (
        "kill (cut short): 3 runs\nrace (cut short): nothing done\nall good so far; cut short by the budget or Ctrl-C\n"
    )


@pytest.mark.usefixtures("interrupt")
def test_ctrl_c_lets_the_event_under_way_end_and_a_second_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally().stop_at_interrupt()
    tally.begin("kill")
    for _ in tally.until("kills", 100):
        if tally["kills"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        tally["kills"] += 1
    tally.end()
    assert tally.finish() == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "kill (cut short): 3 kills"
    assert said.err == "stopping after what is under way; Ctrl-C again stops at once\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.tiny
def test_a_bit_flipped_in_every_region_of_a_conversion_is_counted_as_found(repository: Path) -> None:
    options = ["--every", "100", "--changes", "0", "--poisons", "0", "--flips", "1"]
    command = [sys.executable, "-W", "error", str(repository / "scripts" / "break_source.py"), *options]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "flip: 12 flips, 12 found by verify --full, 7 of these found by every load" in run.stdout
    assert re.search(r"^flip: 10 of 12, .* a minute, .* minutes left \| 10 flips", run.stderr, re.MULTILINE)
    assert run.stdout.endswith("all good\n")


def test_mutated_headers_that_we_take_are_taken_by_the_reference(repository: Path) -> None:
    command = [sys.executable, "-W", "error", str(repository / "scripts" / "fuzz_header.py"), "--headers", "4000"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = re.fullmatch(
        r"fuzz: 4,000 headers, ([\d,]+) taken by both(?:, \d+ taken by the reference alone)?\n"
        r"([\d,]+) line pairs, [\d,]+ seeds, slowest \d+ ms, \d+ s CPU\nall good\n",
        run.stdout,
    )
    assert found is not None, run.stdout
    assert int(found[1]) > 5 and int(found[2]) > 120  # the mutations reach the reader's end, and most of its lines
