"""A Trace goes to JSON and comes back equal; anything else is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.generate.trace import SCHEMA_VERSION, Injection, Timings, Trace


@pytest.fixture
def trace() -> Trace:
    return Trace(
        prompt_ids=(1, 2, 3),
        ids=(4, 5),
        text="a\u2028b🧮",
        thinking="a",
        conclusion="b🧮",
        answer=None,
        answer_kind="none",
        is_revised=False,
        confidence=0.25,
        thinking_span=(0, 1),
        conclusion_span=(1, 2),
        finish_reason="budget",
        detail="cut at 1",
        logprobs=(-0.1, None),
        entropies=(2.5, None),
        injections=(Injection(start=1, end=2, text="b", reason="budget"),),
        timings=Timings(n_prefilled=3, prefill_s=0.5, n_intervals=1, decode_s=0.25),
        peak_bytes=123,
        settings={"sampling": {"temperature": 0.7}},
        model={"name": "tiny"},
        events=({"kind": "loop"},),
    )


def test_a_saved_trace_is_read_back_equal(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    assert json.loads((tmp_path / "trace.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_rates_count_intervals_and_are_absent_where_nothing_was_measured() -> None:
    timings = Timings(n_prefilled=30, prefill_s=2.0, n_intervals=9, decode_s=3.0)
    assert (timings.prefill_tok_s, timings.decode_tok_s) == (15.0, 3.0)
    nothing = Timings(n_prefilled=0, prefill_s=0.0, n_intervals=0, decode_s=0.0)
    assert (nothing.prefill_tok_s, nothing.decode_tok_s) == (None, None)


def test_the_end_is_described_in_words(trace: Trace) -> None:
    assert trace.describe() == "the thinking budget was spent and the answer asked for (cut at 1)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, r"schema_version is 99, expected 1\. Read the trace with the version"),
        ({"schema_version": None}, "schema_version is None"),
        ({"ids": ...}, "the field 'ids' is missing"),
        ({"more": 1}, "the field 'more' is unknown"),
        ({"finish_reason": "tired"}, "finish_reason is 'tired', expected one of stop, answered"),
        ({"timings": {"x": 1}}, "is no trace"),
        ({"injections": 5}, "is no trace"),
    ],
)
def test_a_file_that_is_no_trace_of_this_schema_is_refused(
    trace: Trace, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    value = {name: each for name, each in (trace.to_json() | change).items() if each is not ...}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(value))
    with pytest.raises(SourceError, match=re.escape(str(path)) + ".*" + message):
        Trace.load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(No such file"):
        Trace.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_')
    with pytest.raises(SourceError, match=r"half\.json: not JSON"):
        Trace.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SourceError, match="schema_version is 'list'"):
        Trace.load(tmp_path / "list.json")
