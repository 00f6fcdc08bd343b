"""The bundled reasoner through the generate command and the Python door: the pocket is the default, and it answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling, Thinking

pytestmark = pytest.mark.pocket

LETTERS = "How many r in strawberry."


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return load(pocket_checkpoint())


def test_without_a_model_the_pocket_is_converted_once_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QWQ_MLX_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    notes = []
    for _ in range(2):
        assert command.main(["-p", "What is 3 + 4?", "--temp", "0"]) == 0
        shown = capfd.readouterr()
        assert shown.out.rstrip().endswith("\\[ \\boxed{7} \\]")
        notes.append(shown.err)
    assert "model: the bundled pocket model" in notes[0] and "4-bit weights" in notes[0]
    assert "converting the pocket model to 4 bits, once" in notes[0]
    assert "converting" not in notes[1]
    assert notes[1].splitlines()[-1].startswith("stop: the model ended its text; answer '7', confidence 0.98; prompt ")
    assert len(list((tmp_path / "cache" / "qwq-mlx").iterdir())) == 1


def test_thinking_and_answer_are_apart(reasoner: Reasoner) -> None:
    trace = reasoner.generate(LETTERS, sampling=Sampling(temperature=0.0))
    assert (trace.answer, trace.answer_kind, trace.finish_reason) == ("3", "heading", "stop")
    assert trace.thinking + trace.conclusion == trace.text
    assert trace.conclusion.startswith("**Final Answer**") and "boxed" not in trace.thinking
    assert trace.events == ()


def test_a_budget_cuts_the_search_and_still_gets_an_answer(reasoner: Reasoner) -> None:
    question = "Add one pair of parentheses to make this equation true: 4 + 5 * 6 - 1 * 7 = 39"
    trace = reasoner.generate(
        question, sampling=Sampling(temperature=0.0), thinking=Thinking(think_tokens=24, answer_tokens=60)
    )
    assert trace.finish_reason == "budget" and len(trace.injections) == 1
    assert trace.answer is not None and trace.ids[-1] in reasoner.model.stop_ids


def test_a_seed_repeats_a_sampled_answer(reasoner: Reasoner) -> None:
    first, second = (
        reasoner.generate(LETTERS, sampling=Sampling(seed=seed), limits=Limits(max_tokens=20)) for seed in (3, 3)
    )
    assert first.ids == second.ids and first.settings == second.settings
