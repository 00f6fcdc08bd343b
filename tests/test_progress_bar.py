"""Progress on a terminal and in a file, by a clock that the test moves."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwq_mlx.progress import ProgressBar


class Stderr(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def shown_in(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> Stderr:
    stderr = Stderr(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def test_in_a_file_a_line_comes_every_ten_seconds(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = shown_in(monkeypatch, is_terminal=False)
    with ProgressBar(unit="B") as bar:
        for seconds in (0, 5, 11, 12, 22):
            now[0] = 1000.0 + seconds
            bar.show("converting", seconds * 10**8, 9 * 10**9, note="lm_head.weight")
    first, second = stderr.getvalue().splitlines()
    assert first.startswith("converting:  12%|") and "| 1.10G/9.00G [00:11<01:19, 100MB/s, lm_head.weight]" in first
    assert second.startswith("converting:  24%|") and "| 2.20G/9.00G [00:22<" in second
    assert "\r" not in stderr.getvalue()


def test_on_a_terminal_a_bar_replaces_itself_and_is_gone_in_the_end(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = shown_in(monkeypatch, is_terminal=True)
    with ProgressBar(unit="tokens") as bar:
        bar.show("prefill", 0, 10)
        now[0] += 1
        bar.show("prefill", 5, 10)
    states = stderr.getvalue().split("\r")
    assert "prefill:  50%|" in states[-3] and "| 5/10 [00:01<00:01,  5.00tokens/s]" in states[-3]
    assert states[-2].strip() == states[-1] == "" and "\n" not in stderr.getvalue()


def test_the_rate_counts_neither_what_was_there_nor_the_wait_for_the_first_step(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = shown_in(monkeypatch, is_terminal=False)
    with ProgressBar(unit="B") as bar:
        bar.show("converting", 5 * 10**8, 10**9, n_before=5 * 10**8)
        now[0] += 100
        bar.show("converting", 5 * 10**8, 10**9, n_before=5 * 10**8)
        now[0] += 20
        bar.show("converting", 6 * 10**8, 10**9, n_before=5 * 10**8)
    assert "| 600M/1.00G [00:20<01:20, 5.00MB/s]" in stderr.getvalue().splitlines()[-1]


def test_of_work_that_has_begun_all_time_counts_and_the_note_moves(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = shown_in(monkeypatch, is_terminal=True)
    with ProgressBar(unit="question") as bar:
        for n_done, note in ((0, "no rate"), (0, "7.0 tok/s"), (1, "8.0 tok/s")):
            bar.show("answering", n_done, 3, note=note, is_begun=True)
            now[0] += 20
    states = stderr.getvalue().split("\r")
    assert any("| 0/3 [00:20<?, ?question/s, 7.0 tok/s]" in state for state in states)
    assert any("| 1/3 [00:40<01:20, 40.00s/question, 8.0 tok/s]" in state for state in states)


def test_threads_may_count_together_where_nobody_knows_the_whole(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = shown_in(monkeypatch, is_terminal=True)
    with ProgressBar(unit="B", stays=True) as bar, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: bar.add("reading", n), [1000] * 50))
    assert "reading: 50.0kB [00:00" in stderr.getvalue()


def test_what_is_not_to_be_shown_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = shown_in(monkeypatch, is_terminal=True)
    with ProgressBar(unit="B", is_shown=False) as bar:
        bar.show("reading", 1, 2)
        bar.add("reading", 1)
    assert stderr.getvalue() == ""
