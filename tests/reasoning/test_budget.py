"""The thinking budget: where it cuts, what it puts in, and that it leaves a model alone that concludes by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_mlx.errors import OptionError
from qwq_mlx.reasoning.budget import Budget, BudgetOptions
from qwq_mlx.reasoning.profile import find_profile
from qwq_mlx.reasoning.split import Splitter

PREVIEW, TAGGED = find_profile("qwq-preview"), find_profile("qwq-tagged")


def actions(budget: Budget, texts: list[str]) -> list[str]:
    """What the budget says to thinking tokens, up to and with the first that is not "continue"."""
    said = []
    for text in texts:
        said.append(budget.feed(text, "thinking"))
        if said[-1] != "continue":
            break
    return said


@pytest.mark.parametrize(
    ("texts", "n_fed", "place"),
    [
        (["a", "b", "c.", "\n\n", "d"], 4, "paragraph"),
        (["a", "b", "c", "d", "e", "f", "g.", "h"], 7, "sentence"),
        (["a", "b", "c", "d", "e", "f", "g\n", "h"], 7, "line"),
        (["a"] * 30, 11, "anywhere"),
        (["a", "b", "c.", "d", "e", "f", "g!"], 7, "sentence"),
    ],
)
def test_the_cut_waits_for_a_paragraph_then_a_line_or_sentence_then_takes_any_place(
    texts: list[str], n_fed: int, place: str
) -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=3, patience_tokens=8))
    said = actions(budget, texts)
    assert (len(said), said[-1]) == (n_fed, "inject")
    assert budget.cut is not None
    assert (budget.cut.at, budget.cut.place, budget.cut.asked) == (n_fed, place, "budget")


@given(st.lists(st.sampled_from(["a", "b. ", "c\n", "\n\n", ""]), max_size=200), st.integers(1, 60), st.integers(0, 64))
def test_the_cut_lies_between_the_budget_and_the_end_of_patience(texts: list[str], think: int, patience: int) -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=think, patience_tokens=patience))
    said = actions(budget, texts)
    if budget.cut is None:
        assert len(texts) < think + patience
    else:
        assert think <= budget.cut.at == len(said) <= think + patience


@pytest.mark.parametrize(
    ("before", "cue"),
    [("x", "\n\n**Final"), ("x.\n", "\n**Final"), ("x.\n\n", "**Final"), ("x\n\n\n", "**Final"), ("", "**Final")],
)
def test_the_cue_stands_after_one_blank_line(before: str, cue: str) -> None:
    budget = Budget(PREVIEW)
    budget.feed(before, "thinking")
    assert budget.cue.startswith(cue)


@pytest.mark.parametrize("profile", [PREVIEW, TAGGED], ids=lambda profile: profile.name)
def test_the_cue_moves_the_splitter_to_the_answer(profile: object) -> None:
    splitter = Splitter(profile, prompt="<think>\n")  # type: ignore[arg-type]
    budget = Budget(profile, BudgetOptions(think_tokens=2, patience_tokens=0))  # type: ignore[arg-type]
    for text in ["Let ", "me"]:
        action = budget.feed(text, splitter.feed(text))
    assert action == "inject"
    assert splitter.feed(budget.cue) == "answer"
    splitter.feed("\\boxed{5}")
    found = splitter.finish()
    assert (found.answer, found.conclusion) == ("5", (2, 4))


def test_the_answer_is_stopped_when_it_has_had_its_room() -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=1, patience_tokens=0, answer_tokens=3))
    assert budget.feed("a", "thinking") == "inject"
    budget.injected(4)
    assert [budget.feed("b", "answer") for _ in range(3)] == ["continue", "continue", "stop"]
    assert budget.cut is not None
    assert budget.cut.at == 1


def test_a_model_that_answers_in_time_is_left_alone() -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=3, answer_tokens=2))
    said = [budget.feed("a\n\n", "thinking"), *(budget.feed("b", "answer") for _ in range(50))]
    assert set(said) == {"continue"}
    assert not budget.is_spent


def test_an_answer_taken_back_is_thinking_again_and_counts() -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=2, patience_tokens=0))
    said = [budget.feed("x", segment) for segment in ("thinking", "answer", "thinking")]
    assert said == ["continue", "continue", "inject"]


def test_asking_now_cuts_at_the_next_good_place_and_names_who_asked() -> None:
    budget = Budget(PREVIEW)
    assert budget.feed("a", "thinking") == "continue"
    budget.ask("loop")
    budget.ask("answer_now")
    assert actions(budget, ["b", "c.\n\n"]) == ["continue", "inject"]
    assert budget.cut is not None
    assert budget.cut.asked == "loop"
    budget.ask()
    assert budget.feed("d", "answer") == "continue"


def test_a_budget_of_nothing_asks_before_the_first_token() -> None:
    budget = Budget(PREVIEW, BudgetOptions(think_tokens=0))
    assert budget.start() == "inject"
    assert budget.cue == "**Final Answer**\n\n"
    assert Budget(PREVIEW).start() == "continue"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"think_tokens": -1}, "think_tokens is -1, expected 0 or more"),
        ({"patience_tokens": -1}, "patience_tokens is -1, expected 0 to 4096"),
        ({"answer_tokens": 0}, "answer_tokens is 0, expected at least 1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, int], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        BudgetOptions(**options)
