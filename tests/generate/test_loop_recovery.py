"""A run that goes round in a loop ends with an answer or with that reason, or leaves the loop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.engine.row import Token
from qwq_mlx.generate.loop_recovery import MAX_NUDGES, STRETCH
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling, Thinking

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def looping(reasoner: Reasoner, *, strength: float = 1e6, text: str = "a", **thinking: Any) -> dict[str, Any]:
    """Options under which the same letter comes again and again."""
    token_id = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == text.encode())
    bias = dict.fromkeys(reasoner.model.stop_ids, float("-inf")) | {token_id: strength}
    return {
        "sampling": Sampling(temperature=0.0, seed=1, logit_bias=bias),
        "limits": Limits(max_tokens=400),
        "thinking": Thinking(**thinking),
    }


def test_stop_ends_the_run_with_the_evidence(reasoner: Reasoner) -> None:
    trace = reasoner.generate("x", **looping(reasoner, on_loop="stop"))
    (event,) = trace.events
    assert (trace.finish_reason, event["kind"], event["action"], event["period"]) == ("loop", "cycle", "stop", 1)
    assert trace.detail == event["evidence"] and event["end"] == len(trace.ids) < 200
    assert trace.describe().startswith("the text went round in a loop (the last")


def test_answer_asks_for_the_answer_and_the_loop_is_the_reason(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", **looping(reasoner, answer_tokens=9))
    steps = list(run)
    trace = run.trace()
    assert trace.finish_reason == "loop" and trace.injections[0].reason == "loop"
    assert trace.events[0]["action"] == "answer" and trace.events[0]["end"] <= trace.injections[0].start
    assert len(trace.ids) == trace.injections[0].end + 9 == len(steps)


def test_a_limit_behind_the_cue_of_a_loop_can_be_raised(reasoner: Reasoner, tmp_path: Path) -> None:
    options = looping(reasoner, answer_tokens=30)
    whole = reasoner.generate("x", **options)
    assert not whole.is_resumable, "answer_tokens ended it"
    n_cut = whole.injections[0].end + 4
    run = reasoner.stream("x", **options | {"limits": Limits(max_tokens=n_cut)})
    list(run)
    cut = run.trace()
    assert (cut.finish_reason, len(cut.ids), cut.is_resumable) == ("loop", n_cut, True)
    run.save(tmp_path / "run")
    rest = reasoner.resume(tmp_path / "run", max_tokens=400)
    list(rest)
    assert rest.trace().ids == whole.ids


def test_a_loop_in_the_answer_itself_is_stopped(reasoner: Reasoner) -> None:
    # the cue is part of the question's text here, so the model is in its answer from the first token on
    given = looping(reasoner)
    run = reasoner.stream("x", **given)
    run.run.output.feed(Token(0, 0.0, 0.0), "**Final Answer**\n\n")
    for _ in run:
        pass
    trace = run.trace()
    assert (trace.finish_reason, trace.events[0]["action"], trace.injections) == ("loop", "stop", ())


def test_off_does_not_look(reasoner: Reasoner) -> None:
    trace = reasoner.generate("x", **looping(reasoner, on_loop="off"))
    assert (trace.finish_reason, trace.events, len(trace.ids)) == ("length", (), 400)


def test_nudge_goes_back_before_the_loop_and_out_of_it(reasoner: Reasoner) -> None:
    plain = reasoner.generate("x", **looping(reasoner, strength=12.0, on_loop="stop"))
    assert plain.finish_reason == "loop"
    run = reasoner.stream("x", **looping(reasoner, strength=12.0, on_loop="nudge"))
    indices = [step.index for step in run]
    trace = run.trace()
    nudges = [event for event in trace.events if event["action"] == "nudge"]
    backward = [place for before, place in pairwise(indices) if place <= before]
    assert backward == [event["start"] for event in nudges] and nudges
    start = nudges[0]["start"]
    assert trace.ids[:start] == plain.ids[:start] and trace.ids[start:] != plain.ids[start : len(trace.ids)]
    assert len(trace.ids) == len(trace.logprobs) == indices[-1] + 1
    assert trace.text == reasoner.decode([i for i in trace.ids if i not in reasoner.model.stop_ids])
    assert run.running.row.ids[run.running.row.n_prompt :] == list(trace.ids)


def test_nudges_that_do_not_help_end_in_the_answer(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", **looping(reasoner, on_loop="nudge", answer_tokens=5))
    for _ in run:
        pass
    trace = run.trace()
    assert [event["action"] for event in trace.events] == ["nudge"] * MAX_NUDGES + ["answer"]
    assert trace.finish_reason == "loop" and len(trace.injections) == 1


def test_after_the_stretch_the_temperature_is_the_runs_own(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", **looping(reasoner, strength=12.0, on_loop="nudge"))
    hot = [run.running.row.sampler.sampling.temperature for _ in run]
    assert 0.0 in hot and 1.0 in hot
    first = hot.index(1.0)
    after = hot[first : first + STRETCH + 2]
    assert after[-1] == 0.0 or len(run.trace().events) > 1


def test_banned_texts_hold_through_a_nudge(reasoner: Reasoner) -> None:
    given = looping(reasoner, strength=12.0, on_loop="nudge") | {"limits": Limits(max_tokens=300, banned=("e", "zb"))}
    run = reasoner.stream("x", **given)
    for _ in run:
        pass
    trace = run.trace()
    assert any(event["action"] == "nudge" for event in trace.events)
    assert "e" not in trace.text.replace("**Final Answer**", "")
    assert run.running.row.ids[run.running.row.n_prompt :][: len(trace.ids)] == list(trace.ids)


def test_a_run_saved_at_the_end_of_a_hotter_stretch_goes_on_alike(reasoner: Reasoner, tmp_path: Path) -> None:
    """The step under way was drawn hotter still, where a resumed run, which has none, drew it as before."""
    options = looping(reasoner, strength=5.5, on_loop="nudge") | {"limits": Limits(max_tokens=STRETCH + 20)}
    run = reasoner.stream("x", **options)
    for step in run:
        if run.run.recovery.dump() == (1, 1):  # one token of the first stretch is left
            assert step.index >= STRETCH - 1
            run.save(tmp_path / "run")
    resumed = reasoner.resume(tmp_path / "run")
    list(resumed)
    assert resumed.trace().ids == run.trace().ids
