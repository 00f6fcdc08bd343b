"""The cache of a conversation is kept, and every turn's ids are those of templating the whole conversation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.chat.conversation import Conversation
from qwq_mlx.errors import OptionError, PromptError, SourceError
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.run import Run
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.options import Limits, Sampling, Thinking

pytestmark = pytest.mark.tiny

GREEDY = Sampling(temperature=0.0, seed=1)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return load(write_tiny_checkpoint(tmp_path_factory.mktemp("wide"), n_heads=2, n_kv_heads=1))


def talk_with(reasoner: Reasoner, n: int = 8, sampling: Sampling = GREEDY, **limits: int) -> Conversation:
    return Conversation(
        reasoner,
        sampling=sampling,
        limits=Limits(max_tokens=n, **limits),  # type: ignore[arg-type]
        thinking=Thinking(on_loop="off"),
    )


def answered(talk: Conversation, run: Run) -> list[int]:
    ids = [step.id for step in run]
    talk.close(run)
    return ids


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_ids_are_those_of_the_whole_conversation_and_only_new_ones_are_fed(
    kv_bits: int | None, reasoner: Reasoner
) -> None:
    talk = talk_with(reasoner, kv_bits=kv_bits)  # type: ignore[arg-type]
    n_before = 0
    for question in ("one 数", "two <|im_end|>", "three"):
        run = talk.ask(question)
        messages = list(talk.messages)
        whole = prompt_ids(reasoner.model.tokenizer, messages, context=512)
        assert list(run.request.prompt_ids) == whole
        assert run.n_cached >= n_before, "what was there is not fed again"
        ids = answered(talk, run)
        alone = reasoner.stream(
            messages, sampling=GREEDY, limits=Limits(max_tokens=8, kv_bits=kv_bits), thinking=Thinking(on_loop="off")
        )
        assert [step.id for step in alone] == ids, "the kept cache gives the same greedy ids"
        n_before = len(whole)
        assert talk.turns[-1].n_fed == len(whole) - run.n_cached
    assert talk.turns[0].n_fed == talk.turns[0].n_prompt
    assert talk.turns[2].n_fed < talk.turns[2].n_prompt / 2
    assert talk.n_left == 512 - talk.turns[-1].n_prompt - talk.turns[-1].n_output


def test_ids_drawn_otherwise_than_the_text_is_cut_are_fed_again(reasoner: Reasoner) -> None:
    """A random model draws ids that are never made from their text, so feeding starts again where they differ."""
    talk = talk_with(reasoner, n=24, sampling=Sampling(temperature=2.0, seed=3))
    first = talk.ask("one")
    drawn = answered(talk, first)
    second = talk.ask("two")
    known = [*first.request.prompt_ids, *drawn]
    prompt = list(second.request.prompt_ids)
    n_same = next(place for place, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b)
    assert len(first.request.prompt_ids) <= second.n_cached <= n_same
    assert prompt == prompt_ids(reasoner.model.tokenizer, talk.messages, context=512)


def test_another_system_prompt_starts_the_cache_anew(reasoner: Reasoner) -> None:
    talk = talk_with(reasoner)
    answered(talk, talk.ask("one"))
    talk.system_prompt = "Zzz."
    run = talk.ask("two")
    assert run.n_cached < 20
    expected = prompt_ids(reasoner.model.tokenizer, talk.messages, system_prompt="Zzz.", context=512)
    assert list(run.request.prompt_ids) == expected


def test_a_retry_answers_the_same_question_with_other_draws(reasoner: Reasoner) -> None:
    talk = talk_with(reasoner, sampling=Sampling(temperature=1.0, seed=4))
    with pytest.raises(OptionError, match="There is no question yet; ask one first"):
        talk.retry()
    first = talk.ask("one")
    ids = answered(talk, first)
    run = talk.retry()
    assert run.request.prompt_ids == first.request.prompt_ids
    assert run.n_cached == len(first.request.prompt_ids) - 1
    assert answered(talk, run) != ids
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_question_that_outgrows_the_context_is_refused_and_the_conversation_stays(reasoner: Reasoner) -> None:
    talk = talk_with(reasoner, context=200)
    answered(talk, talk.ask("one"))
    before = list(talk.messages)
    with pytest.raises(PromptError, match="the context is 200"):
        talk.ask("x" * 300)
    assert talk.messages == before
    answered(talk, talk.ask("two"))


def test_a_conversation_that_fills_the_context_can_be_saved_loaded_and_answered_again(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    talk = talk_with(reasoner, n=500, context=200)
    run = talk.ask("one")
    answered(talk, run)
    assert run.trace().finish_reason == "context_full" and talk.n_left == 0
    with pytest.raises(PromptError, match="the context is 200"):
        talk.ask("two")
    talk.save(tmp_path / "talk.json")
    other = talk_with(reasoner, n=500, context=200)
    other.load(tmp_path / "talk.json")
    assert (other.messages, other.n_left) == (talk.messages, 0)
    other.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "talk.json").read_bytes()
    assert other.retry().request.prompt_ids == run.request.prompt_ids
    narrow = talk_with(reasoner, context=20)
    with pytest.raises(PromptError, match="the context is 20 "):
        narrow.load(tmp_path / "talk.json")
    assert narrow.messages == []


def test_a_turn_is_taken_back_and_the_next_goes_on_from_what_is_left(reasoner: Reasoner) -> None:
    talk = talk_with(reasoner)
    answered(talk, talk.ask("one"))
    kept = list(talk.messages)
    alone = answered(talk, talk.ask("two"))
    assert talk.back() == "two" and talk.messages == kept
    n_held = len(prompt_ids(reasoner.model.tokenizer, kept, context=512))
    assert talk.n_left == talk.context - n_held
    again = talk.ask("two")
    assert again.n_cached > 0, "the cache of what is left is kept"
    assert answered(talk, again) == alone
    assert (talk.back(), talk.back()) == ("two", "one")
    assert (talk.messages, talk.n_left) == ([], talk.context)
    with pytest.raises(OptionError, match="There is no question yet; ask one first"):
        talk.back()


def test_a_conversation_is_saved_and_loaded(reasoner: Reasoner, tmp_path: Path) -> None:
    talk = talk_with(reasoner)
    talk.system_prompt = "Be kind."
    answered(talk, talk.ask("one"))
    talk.save(tmp_path / "talk.json")
    other = talk_with(reasoner)
    other.load(tmp_path / "talk.json")
    n_held = len(prompt_ids(reasoner.model.tokenizer, talk.messages, system_prompt="Be kind.", context=512))
    assert other.n_left == other.context - n_held < 512, "what was loaded counts before it is fed"
    assert (other.system_prompt, other.messages) == ("Be kind.", talk.messages)
    assert talk.ask("two").request.prompt_ids == other.ask("two").request.prompt_ids
    with pytest.raises(SourceError, match="cannot be written"):
        talk.save(tmp_path / "no" / "where")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ('{"schema_version": 2}', "schema_version is 2, expected 1, a conversation"),
        ('{"schema_version": 1, "system_prompt": 3, "messages": []}', "system_prompt is 3, expected a text"),
        (
            '{"schema_version": 1, "system_prompt": null, "messages": [{"role": "tool", "content": "x"}]}',
            r"messages\[0\]\.role is 'tool', expected one of 'system', 'user'",
        ),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(text: str, message: str, reasoner: Reasoner, tmp_path: Path) -> None:
    (tmp_path / "talk").write_text(text)
    talk = talk_with(reasoner)
    with pytest.raises(SourceError, match=message):
        talk.load(tmp_path / "talk")
    with pytest.raises(SourceError, match="there is no such file"):
        talk.load(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is not a regular file"):
        talk.load(tmp_path / "pipe")


def test_the_saved_file_is_plain_json(reasoner: Reasoner, tmp_path: Path) -> None:
    talk = talk_with(reasoner)
    answered(talk, talk.ask("数"))
    talk.save(tmp_path / "talk.json")
    value = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert value["messages"][0] == {"role": "user", "content": "数"}
