"""A Trace goes to JSON and comes back equal; anything else is refused by name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.numpy

from qwq_mlx.errors import SavingError, SourceError
from qwq_mlx.reasoning.loops import LoopScores
from qwq_mlx.trace import trace_file
from qwq_mlx.trace.trace import SCHEMA_VERSION, Alternative, Asked, FinishReason, Injection, Timings, Trace


@pytest.fixture
def trace() -> Trace:
    return Trace(
        question="x",
        prompt_ids=(1, 2, 3),
        ids=(4, 5),
        text="a\u2028b🧮",
        texts=("a\u2028", "b🧮"),
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


def inspected(trace: Trace) -> Trace:
    return dataclasses.replace(
        trace,
        alternatives=((Alternative(id=4, text="a", logprob=-0.1), Alternative(id=9, text="\ufffd", logprob=-2.5)), ()),
        margins=(2.4, None),
        loop_scores=(LoopScores(cycle=0.5, variants=0.0, candidate=0.0833, doubts=0.0), None),
        hidden={0: np.array([[1, 2, 3], [np.nan] * 3], np.float32), 12: np.ones((2, 3), np.float32)},
    )


def test_a_saved_trace_is_read_back_equal(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace.save(path)
    assert Trace.load(path) == trace
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert lines[0]["schema_version"] == SCHEMA_VERSION == 4 and lines[0]["n_tokens"] == 2
    assert lines[1:3] == [
        {"id": 4, "text": "a\u2028", "logprob": -0.1, "entropy": 2.5},
        {"id": 5, "text": "b🧮", "logprob": None, "entropy": None},
    ]
    assert lines[3]["end"] == 2 and len(lines) == 4
    assert [each.name for each in tmp_path.iterdir()] == ["trace.jsonl"]


def test_a_trace_from_before_answers_were_asked_for_and_drafts_counted_is_read(trace: Trace, tmp_path: Path) -> None:
    for schema in (2, 3):
        value = trace.to_json() | {"schema_version": schema}
        for name in ("drafted", "accepted"):
            del value["timings"][name]
        if schema == 2:
            del value["asked"]
        assert Trace.from_json(value, where="here") == trace
    asked = Asked(cue="a", text="5}", n_tokens=9, answer="5", confidence=0.5)
    dataclasses.replace(trace, asked=asked, answer_kind="asked").save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").asked == asked


def test_what_was_inspected_is_saved_with_its_arrays_beside(trace: Trace, tmp_path: Path) -> None:
    path, whole = tmp_path / "trace[1].jsonl", inspected(trace)
    whole.save(path)
    found = Trace.load(path)
    assert found == whole and found.hidden.keys() == {0, 12}
    for layer in (0, 12):
        np.testing.assert_array_equal(found.hidden[layer], whole.hidden[layer])
    beside = next(tmp_path.glob("*.safetensors"))
    theirs = safetensors.numpy.load_file(beside)
    np.testing.assert_array_equal(theirs["0"], whole.hidden[0])
    dataclasses.replace(whole, hidden={0: np.zeros((2, 3), np.float32)}).save(path)
    assert Trace.load(path).hidden[0].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert len(list(tmp_path.iterdir())) == 2, "the older arrays are gone"
    trace.save(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_every_flipped_byte_and_every_cut_is_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    inspected(trace).save(path)
    for each in list(tmp_path.iterdir()):
        good = each.read_bytes()
        for place in range(len(good)):
            each.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(SourceError, match=re.escape(str(each))):
                Trace.load(path)
        for length in range(0, len(good), 7):
            each.write_bytes(good[:length])
            with pytest.raises(SourceError, match=re.escape(str(each))):
                Trace.load(path)
        each.write_bytes(good)
    assert Trace.load(path) == inspected(trace)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match=r"there is no such file. They belong to trace\.jsonl: keep both files"):
        Trace.load(path)


def resealed(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Edit a file and put the right digest under it, as nobody does by accident."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-2]]
    change(lines)
    body = b"".join((json.dumps(line) + "\n").encode() for line in lines)
    end = {"end": len(lines) - 1, "sha256": hashlib.sha256(body).hexdigest()}
    path.write_bytes(body + (json.dumps(end) + "\n").encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[0].update(schema_version=1),
            "schema_version is 1, expected 2, 3 or 4. Read the trace with",
        ),
        (
            lambda lines: lines[0].update(format="other", n_tokens=3),
            "holds 2 tokens, its first line says 3, its last 2",
        ),
        (lambda lines: lines[2].pop("logprob"), "line 3 has the fields id, text, entropy"),
        (lambda lines: lines[1].update(more=1), "line 2 has the fields"),
        (lambda lines: lines[0].update(more=1), "more is present, expected no such field"),
        (lambda lines: lines[0].update(hidden={"file": "..", "sha256": ""}), "the name of the hidden states is"),
        (lambda lines: lines[0].update(hidden=3), "the name of the hidden states is 3"),
        (lambda lines: lines[1].update(text=5), r"texts\[0\] is 5, expected a text"),
    ],
)
def test_edited_files_are_refused_by_name(
    trace: Trace, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    path = tmp_path / "trace.jsonl"
    trace.save(path)
    resealed(path, change)
    with pytest.raises(SourceError, match=re.escape(str(path)) + ".*" + message):
        Trace.load(path)


def test_arrays_of_another_shape_are_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    dataclasses.replace(trace, hidden={3: np.ones((1, 3), np.float32)}).save(path)
    with pytest.raises(SourceError, match=r"3 is F32 \(1, 3\), expected F32 \(2, hidden\)"):
        Trace.load(path)


@pytest.mark.parametrize("n_good", [0, 1])
def test_a_full_disk_leaves_the_old_trace(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_good: int
) -> None:
    path = tmp_path / "trace.jsonl"
    inspected(trace).save(path)
    real, left = trace_file.write_file, [n_good]

    def full(path: Path, data: bytes) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(path, data)

    monkeypatch.setattr(trace_file, "write_file", full)
    with pytest.raises(SavingError, match=r"the trace cannot be saved \(No space left on device\)\. Make room"):
        dataclasses.replace(trace, hidden={1: np.zeros((2, 3), np.float32)}).save(path)
    assert Trace.load(path) == inspected(trace) and len(list(tmp_path.iterdir())) == 2


def test_rates_count_intervals_and_are_absent_where_nothing_was_measured() -> None:
    timings = Timings(n_prefilled=30, prefill_s=2.0, n_intervals=9, decode_s=3.0)
    assert (timings.prefill_tok_s, timings.decode_tok_s) == (15.0, 3.0)
    nothing = Timings(n_prefilled=0, prefill_s=0.0, n_intervals=0, decode_s=0.0)
    assert (nothing.prefill_tok_s, nothing.decode_tok_s) == (None, None)


def test_the_end_is_described_in_words(trace: Trace) -> None:
    told = trace.describe()
    assert told.startswith("the thinking budget was spent and the answer asked for (cut at 1); ")
    assert told.endswith("for a longer thinking, more `think_tokens`")


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_end_without_an_answer_has_a_reason_and_a_way_on(trace: Trace, reason: FinishReason) -> None:
    told = replace(trace, finish_reason=reason, detail="", answer=None).describe()
    assert "no answer" in told
    assert told.split("; ")[-1].startswith(("to ", "for "))


def test_a_text_ended_without_an_answer_is_to_be_repeated_with_a_budget_before_its_end(trace: Trace) -> None:
    ended = replace(trace, finish_reason="stop", answer=None, ids=tuple(range(200)), settings={"sampling": {"seed": 7}})
    assert ended.describe().endswith("repeat it with `seed` 7 `think_tokens` 135")
    assert "seed" not in replace(ended, settings={"sampling": {"seed": 7, "temperature": 0}}).describe()
    assert ended.describe(is_saved=True).endswith("; no answer is marked in the text")
    assert "--think-tokens" not in replace(ended, answer="5").describe()


def test_the_answer_is_told_with_its_confidence_and_doubts(trace: Trace) -> None:
    sure = replace(trace, answer="1/2", confidence=0.98, is_revised=False)
    assert "; answer '1/2', confidence 0.98; " in sure.describe()
    assert (
        "; unsure answer '1/2', doubted afterwards, confidence 0.49; "
        in replace(sure, is_revised=True, confidence=0.49).describe()
    )
    assert f"answer '{'x' * 59}…', " in replace(sure, answer="x" * 100).describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, r"schema_version is 99, expected 4\. Read the trace with the version"),
        ({"schema_version": None}, "schema_version is None"),
        ({"ids": ...}, "ids is missing, expected a value"),
        ({"more": 1}, "more is present, expected no such field"),
        ({"finish_reason": "tired"}, "finish_reason is 'tired', expected one of 'stop', 'answered'"),
        ({"timings": {"x": 1}}, r"timings\.n_prefilled is missing"),
        ({"injections": 5}, "injections is 5, expected a list"),
        ({"text": "other"}, "text, texts, ids and logprobs do not fit together"),
    ],
)
def test_a_file_that_is_no_trace_of_this_schema_is_refused(trace: Trace, change: dict[str, Any], message: str) -> None:
    value = {name: each for name, each in (trace.to_json() | change).items() if each is not ...}
    with pytest.raises(SourceError, match=f"here: .*{message}"):
        Trace.from_json(value, where="here")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no such file. Give the file that save"):
        Trace.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_')
    with pytest.raises(SourceError, match=r"half\.json: line 1 is not JSON"):
        Trace.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SourceError, match="line 1 holds a JSON list, expected an object"):
        Trace.load(tmp_path / "list.json")
    with pytest.raises(SourceError, match="schema_version is 'list'"):
        Trace.from_json([], where="here")
    (tmp_path / "other.json").write_text("{}\n")
    with pytest.raises(SourceError, match="is no trace of qwq_mlx"):
        Trace.load(tmp_path / "other.json")
    (tmp_path / "one.json").write_text('{"schema_version": 1, "ids": []}\n')
    with pytest.raises(SourceError, match="schema_version is 1, expected 2, 3 or 4"):
        Trace.load(tmp_path / "one.json")
