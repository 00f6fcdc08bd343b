"""A run that ended without an answer is asked for it from its file, and goes on as if the text had not ended there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.logits_processors.penalties import LogitBias
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.budget_forcing import cue_ids
from qwq_mlx.generate.checkpoint.file import read_checkpoint, write_checkpoint
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.run import Run
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny

SEED = 4


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def ended(reasoner: Reasoner, **options: Any) -> Run:
    """A run whose text the model ends by itself after some tokens, without an answer."""
    chosen = {"limits": Limits(max_tokens=400), "thinking": Thinking(on_loop="off", answer_tokens=30)} | options
    run = reasoner.stream("x", sampling=Sampling(temperature=1.0, seed=SEED), **chosen)
    list(run)
    return run


def finished(run: Run) -> Trace:
    list(run)
    return run.trace()


@pytest.mark.parametrize("banned", [(), ("never written",)])
def test_the_answer_is_asked_for_in_place_of_the_end(
    reasoner: Reasoner, tmp_path: Path, banned: tuple[str, ...]
) -> None:
    run = ended(reasoner, limits=Limits(max_tokens=400, banned=banned))
    first = run.trace()
    assert (first.finish_reason, first.is_unsure, first.can_be_asked) == ("stop", True, True)
    assert first.ids[-1] in reasoner.model.stop_ids and len(first.ids) > 5
    assert "`save` the run and `resume` it with `answer_now`" in first.describe()
    run.save(tmp_path / "run")
    asked = reasoner.resume(tmp_path / "run", answer_now=True)
    steps = list(asked)
    trace = asked.trace()
    cue = cue_ids(reasoner.model.tokenizer, reasoner.profile, after=first.text[-2:])
    n_kept = len(first.ids) - 1
    assert trace.ids[: n_kept + len(cue)] == (*first.ids[:-1], *cue)
    (injection,) = trace.injections
    assert (injection.start, injection.end, injection.reason) == (n_kept, n_kept + len(cue), "answered")
    assert steps[0].index == n_kept and [step.id for step in steps[: len(cue)]] == cue
    assert trace.finish_reason == "answered" and trace.text.startswith(first.text)
    assert len(trace.ids) <= injection.end + 30

    # the same, without Run, from the model alone: the prompt, those ids, and the draws of their places
    n_ids, module = reasoner.model.tokenizer.n_ids, reasoner.model.module
    sampling = reasoner.resolved(Sampling(temperature=1.0, seed=SEED))
    alone, row = Decoder(module, n_ids=n_ids), Row(Sampler(sampling, seed=SEED), cache=new_cache(module))
    list(alone.prefill(row, first.prompt_ids, chunk=512))
    alone.force(row, [*first.ids[:-1], *cue])
    expected = [alone.draw(row).id for _ in range(len(trace.ids) - injection.end)]
    assert list(trace.ids[injection.end :]) == expected

    half = reasoner.resume(tmp_path / "run", answer_now=True)
    some = [next(half) for _ in range(len(cue) + 3)]
    half.save(tmp_path / "half")
    assert some + list(reasoner.resume(tmp_path / "half")) == steps


def test_the_advice_to_repeat_such_a_run_leads_to_its_answer(reasoner: Reasoner) -> None:
    """It named no seed: it looked for it in another place than a real Trace has it."""
    first = ended(reasoner).trace()
    advised = re.search(r"repeat it with `seed` (\d+) `think_tokens` (\d+)$", first.describe())
    assert advised is not None, first.describe()
    seed, think_tokens = map(int, advised.groups())
    again = reasoner.generate(
        "x",
        sampling=Sampling(temperature=1.0, seed=seed),
        limits=Limits(max_tokens=400),
        thinking=Thinking(on_loop="off", think_tokens=think_tokens, answer_tokens=30),
    )
    (cut,) = again.injections
    assert again.finish_reason == "budget" and again.ids[: cut.start] == first.ids[: cut.start]


def test_a_loop_a_cut_run_and_a_run_that_wrote_nothing_are_asked_too(reasoner: Reasoner, tmp_path: Path) -> None:
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")
    stop_id = min(reasoner.model.stop_ids)
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))
    for bias, limits, reason in (
        (never_stop | {letter: 1e4}, Limits(), "loop"),
        (never_stop, Limits(max_tokens=20), "length"),
        ({stop_id: 1e9}, Limits(), "stop"),
    ):
        run = reasoner.stream(
            "x",
            sampling=Sampling(temperature=1.0, seed=1, logit_bias=bias),
            limits=limits,
            thinking=Thinking(on_loop="stop", answer_tokens=5),
        )
        list(run)
        first = run.trace()
        assert first.finish_reason == reason and (first.can_be_asked or first.is_resumable)
        assert ("answer_now" in first.describe()) == (reason != "length")
        run.save(tmp_path / "run")
        asked = reasoner.resume(tmp_path / "run", answer_now=True, max_tokens=300)
        list(asked)
        trace = asked.trace()
        assert trace.finish_reason == "answered"
        for each in ("loop", "context_full"):
            assert "answer_now" not in replace(trace, finish_reason=each).describe(), "once is enough"
        assert trace.injections[0].start == len(first.ids) - (reason == "stop")


def test_the_last_tokens_of_a_full_context_make_room_for_the_answer(reasoner: Reasoner, tmp_path: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=1, logit_bias=dict.fromkeys(reasoner.model.stop_ids, float("-inf")))
    thinking = Thinking(on_loop="off", answer_tokens=30)
    run = reasoner.stream("x", sampling=sampling, thinking=thinking)
    list(run)
    first = run.trace()
    assert first.finish_reason == "context_full" and "`resume` it with `answer_now`" in first.describe()
    run.save(tmp_path / "run")
    trace = finished(reasoner.resume(tmp_path / "run", answer_now=True))
    (cut,) = trace.injections
    assert trace.ids[: cut.start] == first.ids[: cut.start] and trace.finish_reason == "answered"
    assert cut.end + 30 == len(trace.ids) and len(first.ids) - 3 <= len(trace.ids) < len(first.ids)
    n_ids, module = reasoner.model.tokenizer.n_ids, reasoner.model.module
    alone = Decoder(module, n_ids=n_ids)
    bias = LogitBias(sampling.logit_bias, n_ids=n_ids)
    row = Row(Sampler(reasoner.resolved(sampling), seed=1), cache=new_cache(module), processors=[bias])
    list(alone.prefill(row, first.prompt_ids, chunk=512))
    alone.force(row, list(trace.ids[: cut.end]))
    assert [alone.draw(row).id for _ in range(30)] == list(trace.ids[cut.end :])

    small = reasoner.stream("x", sampling=sampling, thinking=Thinking(on_loop="off"), limits=Limits(context=100))
    n_output = len(finished(small).ids)
    small.save(tmp_path / "run")
    (cut,) = finished(reasoner.resume(tmp_path / "run", answer_now=True)).injections
    assert n_output - n_output // 4 - 3 <= cut.end < n_output - n_output // 4, "no more than a quarter"
    (cut,) = finished(reasoner.resume(tmp_path / "run", answer_now=True, context=200)).injections
    assert cut.start == n_output, "with room enough nothing is taken off"


def test_what_cannot_be_asked_is_refused(reasoner: Reasoner, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = ended(reasoner)
    n_output = len(run.trace().ids) - 1
    run.save(path)
    with pytest.raises(SourceError, match=r"the run has ended \(stop\).* If it has no answer, `answer_now=True`"):
        reasoner.resume(path)
    with pytest.raises(OptionError, match=rf"max_tokens is {n_output + 3}, but the run has {n_output} already and the"):
        reasoner.resume(path, answer_now=True, max_tokens=n_output + 3)
    asked = reasoner.resume(path, answer_now=True)
    list(asked)
    asked.save(path)
    with pytest.raises(OptionError, match=r"answer_now: .*run was asked for its answer already\. Start another"):
        reasoner.resume(path, answer_now=True)
    begun = reasoner.stream("x", sampling=Sampling(temperature=1.0, seed=SEED), limits=Limits(max_tokens=9))
    begun.save(path)
    state, arrays = read_checkpoint(path)
    ids = reasoner.pieces._backend.encode("**Final Answer**\n\n 5", add_special_tokens=False).ids
    state["steps"] = [[each, -1.0, 1.0, False] for each in ids]
    write_checkpoint(path, state, arrays)
    with pytest.raises(OptionError, match=r"answer_now: the answer has begun\. Resume without it, or start another"):
        reasoner.resume(path, answer_now=True, max_tokens=99)
    text = run.trace().text[3:6]
    by_text = ended(reasoner, limits=Limits(max_tokens=400, stop=(text,)))
    assert by_text.trace().finish_reason == "stop" and not by_text.trace().can_be_asked
    by_text.save(path)
    with pytest.raises(OptionError, match=r"answer_now: .*run ended with a stop text, so it would end at once"):
        reasoner.resume(path, answer_now=True)


def test_the_command_saves_a_run_without_an_answer_and_asks_for_it(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "run", ["--model", str(tiny_checkpoint)]
    options = ["--temp", "1", "--seed", str(SEED), "--on-loop", "off", "--answer-tokens", "30"]
    assert command.main(["-p", "x", *model, *options, "--save", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"saved: go on with --resume {path} --answer-now" in err
    assert command.main(["--resume", str(path), *model]) == 1
    assert "--answer-now asks for it" in capsys.readouterr().err
    assert command.main(["--resume", str(path), "--answer-now", *model, "--json"]) == 0
    trace = json.loads(capsys.readouterr().out)
    assert trace["finish_reason"] == "answered" and trace["text"].startswith(out)
    assert command.main(["-p", "x", "--answer-now", *model]) == 2
    assert "--answer-now asks a saved run for its answer. Give its file" in capsys.readouterr().err
    assert command.main(["--input", "a", "--output", "b", "--answer-now", *model]) == 2
    assert "--answer-now" in capsys.readouterr().err


def test_a_switch_of_language_cut_in_its_line_is_told_once(reasoner: Reasoner, tmp_path: Path) -> None:
    strength = {b"\xe6": 2.0, b"\xb0": 2.0, b"\xb4": 2.0, b"a": 0.0, b"\n": 0.0}
    bias = {i: strength.get(reasoner.pieces[i], float("-inf")) for i in range(reasoner.pieces.n_ids)}

    def start(n: int) -> Run:
        return reasoner.stream(
            "x",
            sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=1, logit_bias=bias),
            limits=Limits(max_tokens=n),
            thinking=Thinking(on_loop="off"),
        )

    whole = start(120)
    list(whole)
    first, second, *_ = switches = whole.trace().events
    for cut in (first["end"] - 1, first["end"], second["end"] - 1):
        run = start(cut)
        list(run)
        run.save(tmp_path / "run")
        resumed = reasoner.resume(tmp_path / "run", max_tokens=120)
        list(resumed)
        assert resumed.trace().events == switches, cut
