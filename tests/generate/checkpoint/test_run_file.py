"""A saved run goes on bit for bit; a file that is not whole, or of another model, is refused by name."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.errors import OptionError, SavingError, SourceError
from qwq_mlx.generate.checkpoint import file as checkpoint
from qwq_mlx.generate.checkpoint.file import model_digest, read_checkpoint, write_checkpoint
from qwq_mlx.generate.loop_recovery import STRETCH
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.run import Run
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Step

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(temperature=0.0, seed=1)},
    "sampled": {"sampling": Sampling(temperature=1.0, seed=4)},
    "penalties": {
        "sampling": Sampling(temperature=1.0, seed=4, repetition_penalty=1.2, presence_penalty=0.3, dry_multiplier=0.8)
    },
    "budget": {"sampling": Sampling(temperature=1.0, seed=4), "thinking": Thinking(think_tokens=12, answer_tokens=500)},
    "banned": {"sampling": Sampling(temperature=1.0, seed=4), "limits": Limits(max_tokens=90, banned=("e", "99"))},
}


def started(reasoner: Reasoner, case: str, n: int = 90) -> Run:
    options = {"limits": Limits(max_tokens=n), "thinking": Thinking(on_loop="off")} | CASES[case]
    return reasoner.stream("x 数", **options)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(case: str, reasoner: Reasoner, tmp_path: Path) -> None:
    whole = started(reasoner, case)
    steps = list(whole)
    expected = whole.trace()
    run = started(reasoner, case)
    first = list[Step]()
    for cut in (1, 2, 11, 40, 75, min(89, len(steps) - 1)):
        first += [next(run) for _ in range(cut - len(first))]
        run.save(tmp_path / "run")
        resumed = reasoner.resume(tmp_path / "run")
        assert first + list(resumed) == steps, f"cut at {cut}: ids, texts, logprobs and entropies, to the last bit"
        found = resumed.trace()
        for name in ("text", "finish_reason", "detail", "injections", "settings", "answer", "thinking_span"):
            assert getattr(found, name) == getattr(expected, name), (cut, name)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert first + list(run) == steps, "saving changes nothing"


@pytest.mark.parametrize("ended_by", ["budget", "question", "loop"])
def test_a_cut_anywhere_around_an_answer_cue_hands_out_every_step_once(
    ended_by: str, reasoner: Reasoner, tmp_path: Path
) -> None:
    """Saved in the middle of a cue, its remaining Steps were lost; saved right before it, it came up to 64 tokens late;
    saved in a prompt whose budget is 0, it came late, too."""
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")
    sampling = Sampling(temperature=1.0, seed=4, logit_bias={letter: 1e4} if ended_by == "loop" else {})
    budgets = (0, 9) if ended_by == "budget" else (None,)

    def start(think_tokens: int | None) -> Run:
        return reasoner.stream(
            "x 数",
            sampling=sampling,
            limits=Limits(max_tokens=200),
            thinking=Thinking(think_tokens=think_tokens, answer_tokens=3, on_loop="answer"),
        )

    def steps_of(run: Run, n: int | None = None) -> list[Step]:
        steps = list[Step]()
        while (n is None or len(steps) < n) and (step := next(run, None)) is not None:
            steps.append(step)
            if ended_by == "question" and step.index == 5:
                run.answer_now()
        return steps

    for budget in budgets:
        whole = start(budget)
        expected = steps_of(whole)
        (cue,) = whole.trace().injections
        assert cue.end - cue.start > 1
        run = start(budget)
        first = list[Step]()
        for cut in range(max(0, cue.start - 2), cue.end + 2):
            first += steps_of(run, cut - len(first))
            run.save(tmp_path / "run")
            resumed = reasoner.resume(tmp_path / "run")
            assert first + list(resumed) == expected, (budget, cut)
            assert resumed.trace().injections == whole.trace().injections
        assert first + steps_of(run) == expected, "saving changes nothing"


def test_a_run_cut_at_its_length_where_its_budget_ends_is_asked_when_it_goes_on(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    def start(n: int) -> Run:
        return started(reasoner, "budget", n)

    whole = start(120)
    steps = list(whole)
    place = whole.trace().injections[0].start
    for n in (place - 1, place):
        run = start(n)
        first = list(run)
        assert run.trace().finish_reason == "length"
        run.save(tmp_path / "run")
        resumed = reasoner.resume(tmp_path / "run", max_tokens=120)
        # half a character at the end of the first run was shown there
        assert [step.id for step in (*first, *resumed)] == [step.id for step in steps]
        assert (resumed.trace().text, resumed.trace().injections) == (whole.trace().text, whole.trace().injections)


def test_a_run_cut_at_its_length_can_be_given_more(reasoner: Reasoner, tmp_path: Path) -> None:
    longer = [step.id for step in started(reasoner, "sampled", 60)]
    run = started(reasoner, "sampled", 20)
    list(run)
    assert run.trace().finish_reason == "length"
    run.save(tmp_path / "run")
    with pytest.raises(OptionError, match=r"max_tokens is 20, but the run has 20 already\. Give more"):
        reasoner.resume(tmp_path / "run")
    resumed = reasoner.resume(tmp_path / "run", max_tokens=60)
    list(resumed)
    assert list(resumed.trace().ids) == longer


def test_a_state_as_long_as_a_full_context_is_read_back(tmp_path: Path) -> None:
    """Above 65,536 bytes, some 1,300 tokens, a file was written that could not be read: it was a text of the header."""
    state = {"steps": [[n, -1.25 / (n + 1), 2.5 / (n + 1), False] for n in range(32_768)]}
    write_checkpoint(tmp_path / "run", state, {"x": mx.ones((3,))})
    found, arrays = read_checkpoint(tmp_path / "run")
    assert found == state and list(arrays) == ["x"] and arrays["x"].tolist() == [1, 1, 1]


def test_a_run_saved_in_its_prompt_starts_again(reasoner: Reasoner, tmp_path: Path) -> None:
    run = started(reasoner, "sampled")
    run.save(tmp_path / "run")
    assert list(reasoner.resume(tmp_path / "run")) == list(started(reasoner, "sampled"))


def test_a_nudged_run_is_resumed_with_its_heat(reasoner: Reasoner, tmp_path: Path) -> None:
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")
    bias = dict.fromkeys(reasoner.model.stop_ids, float("-inf")) | {letter: 12.0}

    def start() -> Run:
        return reasoner.stream(
            "x",
            sampling=Sampling(temperature=0.0, seed=1, logit_bias=bias),
            limits=Limits(max_tokens=300),
            thinking=Thinking(on_loop="nudge"),
        )

    whole = start()
    steps = list(whole)
    n_back = next(n for n in range(1, len(steps)) if steps[n].index <= steps[n - 1].index)
    n_cool = n_back + STRETCH  # the heat ends there
    assert n_cool + 20 < len(steps)
    run = start()
    first = list[Step]()
    for cut in (n_back, n_cool - 1, n_cool, len(steps) - 20):
        first += [next(run) for _ in range(cut - len(first))]
        run.save(tmp_path / "run")
        resumed = reasoner.resume(tmp_path / "run")
        assert first + list(resumed) == steps
        assert resumed.trace().events == whole.trace().events, "the loops that a nudge took back stay written down"
    assert first + list(run) == steps, "saving changes nothing"


def test_loop_scores_of_an_answer_stay_at_nothing_in_a_resumed_run(reasoner: Reasoner, tmp_path: Path) -> None:
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")

    def start() -> Run:
        return reasoner.stream(
            "x",
            sampling=Sampling(temperature=0.0, logit_bias={letter: 1e4}),
            limits=Limits(max_tokens=50),
            thinking=Thinking(think_tokens=0),
            inspect=Inspect(loop_scores=True),
        )

    run = start()
    first = [next(run) for _ in range(40)]
    run.save(tmp_path / "run")
    assert first + list(reasoner.resume(tmp_path / "run")) == list(start())


def test_a_fork_shares_the_beginning_and_draws_on_by_itself(reasoner: Reasoner) -> None:
    run = started(reasoner, "sampled")
    steps = list(run)
    same, other = run.fork(at=30, seed=4), run.fork(at=30, seed=5)
    assert steps[:30] + list(same) == steps
    list(other)
    assert other.trace().ids[:30] == run.trace().ids[:30] and other.trace().ids != run.trace().ids
    assert run.trace().ids == tuple(step.id for step in steps), "the forked run is not touched"
    for at in (-1, 91):
        with pytest.raises(OptionError, match=f"at is {at}, expected from 0 to {len(steps)}"):
            run.fork(at=at, seed=1)


def test_a_fork_within_an_answer_cue_has_its_beginning_and_can_be_saved(reasoner: Reasoner, tmp_path: Path) -> None:
    run = started(reasoner, "budget")
    steps = list(run)
    (cue,) = run.trace().injections
    for at in (cue.start, cue.start + 1, cue.end - 1, cue.end, cue.end + 1):
        fork = run.fork(at=at, seed=7)
        found = fork.trace().injections
        assert [(each.start, each.end) for each in found] == ([(cue.start, min(at, cue.end))] if at > cue.start else [])
        assert all(each.text == "".join(step.text for step in steps[each.start : each.end]) for each in found)
        fork.save(tmp_path / "fork")
        assert list(reasoner.resume(tmp_path / "fork")) == list(fork)


def test_other_models_and_ended_runs_are_refused(reasoner: Reasoner, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = started(reasoner, "sampled")
    next(run)
    run.save(tmp_path / "run")
    other = load(write_tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(SourceError, match=r"was saved with another model than .*other"):
        other.resume(tmp_path / "run")
    half = load(tiny_checkpoint, compute_type="bfloat16")
    with pytest.raises(SourceError, match="was computed in float32, this model computes in bfloat16"):
        half.resume(tmp_path / "run")
    stop_id = min(reasoner.model.stop_ids)
    ended = reasoner.stream("x", sampling=Sampling(temperature=0.0, logit_bias={stop_id: 1e9}))
    list(ended)
    ended.save(tmp_path / "ended")
    with pytest.raises(SourceError, match=r"ended: the run has ended \(stop\)"):
        reasoner.resume(tmp_path / "ended")


@pytest.mark.parametrize("bad", [-1, 298, 10**6, 2**31, "5", True])
def test_ids_that_the_model_has_not_are_refused_wherever_a_file_brings_them(
    reasoner: Reasoner, bad: Any, tmp_path: Path
) -> None:
    """A receipt or a saved run with the id 1,000,000 ended the process with a segmentation fault."""
    run = started(reasoner, "sampled", 4)
    list(run)
    run.save(tmp_path / "run")
    text = rf"holds the id {bad!r}, expected a whole number from 0 to 297\."
    for place in ("prompt_ids", "steps"):
        state, arrays = read_checkpoint(tmp_path / "run")
        state[place][-1] = bad if place == "prompt_ids" else [bad, *state[place][-1][1:]]
        write_checkpoint(tmp_path / "edited", state, arrays)
        expected = rf"Place \d+ {text}" if type(bad) is int else rf"{place}.* is {bad!r}, expected a whole number\."
        with pytest.raises(SourceError, match=rf"edited: {expected} The file is edited; it cannot be resumed"):
            reasoner.resume(tmp_path / "edited", max_tokens=9)
    receipt = reasoner.receipt(run.trace())
    with pytest.raises(OptionError, match=text):
        reasoner.rerun(replace(receipt, prompt_ids=(*receipt.prompt_ids[:-1], bad)))


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_checkpoint(path, {"a": 1, "text": "数"}, {"x": mx.arange(6, dtype=mx.float32).reshape(2, 3)})
    good = path.read_bytes()
    state, arrays = read_checkpoint(path)
    assert state == {"a": 1, "text": "数"} and arrays["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(SourceError, match=str(path)):
            read_checkpoint(path)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(SourceError, match=str(path)):
            read_checkpoint(path)
    with pytest.raises(SourceError, match="none"):
        read_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_FORMAT", "other", "is no saved run of qwq_mlx"),
        ("SCHEMA_VERSION", 9, "is a saved run of schema 9, expected 4"),
    ],
)
def test_other_files_and_schemas_are_refused_by_name(
    name: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, name, value)
        write_checkpoint(tmp_path / "run", {}, {})
    with pytest.raises(SourceError, match=message):
        read_checkpoint(tmp_path / "run")


def test_a_full_disk_leaves_the_old_file_and_the_run_goes_on(
    reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(reasoner, "sampled")
    first = [next(run) for _ in range(5)]
    run.save(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "fsync_file", full)
    first.append(next(run))
    with pytest.raises(
        SavingError, match=r"the run cannot be saved \(No space left on device\).*The run needs [\d,]+ bytes"
    ) as caught:
        run.save(tmp_path / "run")
    assert caught.value.exit_code == 3
    assert (tmp_path / "run").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert first + list(run) == list(started(reasoner, "sampled"))


def test_the_digest_of_a_model_sees_every_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = write_tiny_checkpoint(tmp_path / "one")
    assert model_digest(one) == model_digest(tiny_checkpoint)
    config = one / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert model_digest(one) != model_digest(tiny_checkpoint)
    (one / "manifest.json").write_text("{}")
    with_manifest = model_digest(one)
    config.write_text("{}")
    assert model_digest(one) == with_manifest, "a manifest stands for the files it proves at every load"
