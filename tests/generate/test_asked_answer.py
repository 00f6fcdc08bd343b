"""The model is asked for its answer behind a finished text: what mlx-lm's own model would write there, and nothing of
the run changes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import OptionError
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.asked_answer import MAX_ANSWER
from qwq_mlx.generate.question_file.results import read_traces
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.reasoning.profile import find_profile
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

LETTERS = "How many r in strawberry."
PARENTHESES = "Add one pair of parentheses to make this equation true: 4 + 5 * 6 - 1 * 7 = 39"
CUE = "\n\n**Final Answer**\n\n\\[ \\boxed{"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return load(pocket_checkpoint())


def finished(
    reasoner: Reasoner, question: str = LETTERS, *, sampling: dict[str, Any] | None = None, **limits: Any
) -> Stream:
    run = reasoner.stream(
        question, sampling=Sampling(**{"temperature": 0.0, **(sampling or {})}), limits=Limits(**limits)
    )
    list(run)
    return run


@pytest.mark.parametrize("n_tokens", [10, 25])
def test_the_asked_answer_is_what_mlx_lm_draws_behind_the_cue(
    n_tokens: int, reasoner: Reasoner, tmp_path: Path
) -> None:
    run = finished(reasoner, max_tokens=n_tokens)
    before = run.trace()
    asked, after = run.ask_answer(), run.trace()
    assert before.answer is None and asked is not None and asked.cue == CUE and asked.answer is not None
    assert (after.answer, after.answer_kind, after.confidence) == (
        asked.answer,
        "asked",
        round(0.8 * asked.confidence, 3),
    )
    # mlx_lm's model without a cache, the whole text anew for every id
    model, tokenizer = import_mlx_lm("mlx_lm.utils").load(str(reasoner.model.folder))
    model.set_dtype(mx.float32)  # as ours computes on the CPU
    cue_ids = tokenizer.encode(CUE, add_special_tokens=False)
    ids, probability, text = [*before.prompt_ids, *before.ids, *cue_ids], 1.0, ""
    while not text.endswith("}"):
        logits = model(mx.array([ids]))[0, -1, : reasoner.model.tokenizer.n_ids].astype(mx.float32)
        ids.append(int(mx.argmax(logits).item()))
        probability *= math.exp((logits[ids[-1]] - mx.logsumexp(logits)).item())
        text += tokenizer.decode(ids[-1:])
    assert asked.text == text and asked.answer == text[:-1]
    assert asked.confidence == pytest.approx(probability, abs=2e-3)
    assert after.asked_tokens == len(ids) - len(before.prompt_ids) - len(before.ids)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_ids_receipt_and_saved_run_stay_what_they_were(kv_bits: Any, reasoner: Reasoner, tmp_path: Path) -> None:
    # the context is full at the 256 positions that the cache has room for, so it grows while the model is asked
    run = finished(reasoner, f"{PARENTHESES} {PARENTHESES}", context=256, kv_bits=kv_bits)
    before = run.trace()
    run.save(tmp_path / "before")
    asked = run.ask_answer()
    after = run.trace()
    assert asked is not None and after.asked == asked and after.finish_reason == "context_full"
    changed: dict[str, Any] = {"answer": None, "answer_kind": "none", "confidence": 0.0, "asked": None}
    assert dataclasses.replace(after, **changed) == dataclasses.replace(before, **changed)
    assert reasoner.receipt(after) == reasoner.receipt(before)
    run.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    assert run.ask_answer() == asked, "the cache holds what it held"


def test_nothing_is_asked_where_the_answer_is_sure_and_nothing_before_the_end(reasoner: Reasoner) -> None:
    run = reasoner.stream("What is 3 + 4?", sampling=Sampling(temperature=0.0))
    next(run)
    with pytest.raises(OptionError, match="ask_answer: the run is not over"):
        run.ask_answer()
    list(run)
    assert run.trace().confidence >= 0.85 and run.ask_answer() is None and run.trace().asked is None
    run = reasoner.stream(LETTERS)
    next(run)
    run.stop()
    list(run)
    assert run.trace().finish_reason == "interrupted" and run.ask_answer() is None


def test_a_context_without_room_for_cue_and_answer_is_told(reasoner: Reasoner) -> None:
    run = finished(reasoner, context=110)
    asked = run.ask_answer()
    assert asked is not None and asked.answer is None and asked.n_tokens == 0
    assert asked.detail.startswith("no room to ask: the context is 110 tokens")
    assert run.trace().answer_kind == "none"


def test_banned_texts_are_not_answered(reasoner: Reasoner) -> None:
    asked = finished(reasoner, max_tokens=10).ask_answer()
    assert asked is not None and asked.answer is not None
    banned = finished(reasoner, max_tokens=10, banned=(asked.answer + "}",))
    other = banned.ask_answer()
    assert other is not None and asked.answer + "}" not in other.text


def test_the_cue_closes_a_thinking_that_is_open_and_no_other() -> None:
    box = "**Final Answer**\n\n\\[ \\boxed{"
    tagged, preview = find_profile("qwq-tagged"), find_profile("qwq-preview")
    assert tagged.request_for_box(is_closed=False) == "</think>\n\n" + box
    assert tagged.request_for_box(is_closed=True) == box == preview.request_for_box(is_closed=False)


def test_an_answer_as_long_as_there_is_room_for_is_none(reasoner: Reasoner) -> None:
    tokenizer = reasoner.model.tokenizer.hf.backend_tokenizer
    closing = [i for i in range(reasoner.model.tokenizer.n_ids) if "}" in (tokenizer.id_to_token(i) or "")]
    asked = finished(reasoner, max_tokens=10, sampling={"logit_bias": dict.fromkeys(closing, -math.inf)}).ask_answer()
    assert asked is not None and asked.answer is None
    assert "box was open" in asked.detail or "ended its text" in asked.detail
    assert asked.n_tokens <= MAX_ANSWER + 10


def test_the_command_asks_for_one_question_and_for_a_file(
    reasoner: Reasoner, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(reasoner.model.folder), "--temp", "0", "--max-tokens", "10", "--ask-answer"]
    asked = finished(reasoner, max_tokens=10).ask_answer()
    assert asked is not None
    assert command.main(["-p", LETTERS, "--json", *flags]) == 0
    shown = capfd.readouterr()
    trace = Trace.from_json(json.loads(shown.out), where="stdout")
    assert (trace.answer, trace.answer_kind, trace.asked) == (asked.answer, "asked", asked)
    assert f"answer '{asked.answer}', asked for behind the text, confidence {trace.confidence:.2f}" in shown.err
    assert "output 10 tokens at " in shown.err and f", {asked.n_tokens} to ask for the answer" in shown.err
    (tmp_path / "in").write_text(json.dumps({"question": LETTERS}) + "\n")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--seed", "1"]
    assert command.main([*files, *flags]) == 0
    [(_, of_file)] = read_traces(tmp_path / "out")
    assert of_file is not None and (of_file.asked, of_file.ids) == (asked, trace.ids)
    assert command.main([*files, *flags[:-1]]) == 2, "lines with and without asking are not mixed"
    assert "other values of ask_answer" in capfd.readouterr().err
