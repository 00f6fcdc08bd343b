"""Messages to ids: the official template's ids, and no text of a message becomes a control token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_mlx.errors import PromptError
from qwq_mlx.model.prompt import conversation, encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "How many r in strawberry?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  wait\n\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 中文 👩‍👩‍👧 é e\u0301 \x00 \ue000\ue001 שלום"},
        {"role": "assistant", "content": "The answer is so so.\n"},
        {"role": "user", "content": "1 + 2 * 3 = 479"},
    ],
)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> LoadedTokenizer:
    return load_tokenizer(tiny_checkpoint, vocab_size=320)


@pytest.fixture(scope="module")
def real(real_tokenizer: LoadedTokenizer) -> LoadedTokenizer:
    return real_tokenizer


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_ids_are_those_of_the_official_template(tiny_checkpoint: Path, messages: list[dict[str, str]]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    check_against_transformers(theirs, load_tokenizer(tiny_checkpoint, vocab_size=320), messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_real_ids_are_those_of_the_official_template(
    official_tokenizer: Any, real: LoadedTokenizer, messages: list[dict[str, str]]
) -> None:
    check_against_transformers(official_tokenizer, real, messages)


def check_against_transformers(theirs: Any, tokenizer: LoadedTokenizer, messages: list[dict[str, str]]) -> None:
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, messages, context=32_768) == expected
    if len(messages) == 1:
        assert prompt_ids(tokenizer, messages[0]["content"], context=32_768) == expected


def n_control(tokenizer: LoadedTokenizer, ids: list[int]) -> int:
    control = set(tokenizer.added.values())
    return sum(token_id in control for token_id in ids)


def test_every_control_text_stays_text_in_what_a_user_or_system_says(real: LoadedTokenizer) -> None:
    plain = n_control(real, prompt_ids(real, "hi", system_prompt="hi", context=32_768))
    texts = list(real.added)
    texts += [f"{a[:4]}{b}{a[4:]}" for a in texts for b in texts] + [f"{a}{b}" for a in texts for b in texts]
    texts += [f"{text[:at]}\n{text[at:]}" for text in list(real.added) for at in (1, 5)]
    assert len(texts) >= 1000
    for start in range(0, len(texts), 100):
        text = " ".join(texts[start : start + 100])
        ids = prompt_ids(real, text, system_prompt=text, context=32_768)
        assert n_control(real, ids) == plain
        assert real.hf.decode(ids).count(text) == 2


PIECES = ("<|im_end|>", "<|im_start|>", "<|", "|>", "im_end", "\n", "system", "\ue000", "\ue001", "\ue100", "a")


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), min_size=1).map("".join))
def test_any_text_comes_back_as_it_was_and_holds_no_control_token(tiny: LoadedTokenizer, text: str) -> None:
    ids = encode_text(tiny, text)
    assert n_control(tiny, ids) == 0
    assert tiny.hf.decode(ids) == tiny.plain.normalizer.normalize_str(text)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), min_size=1).map("".join))
def test_the_prompt_of_any_pieces_has_the_templates_own_control_tokens(real: LoadedTokenizer, text: str) -> None:
    ids = prompt_ids(real, f"x{text}", context=32_768)
    assert n_control(real, ids) == 5
    assert f"<|im_start|>user\nx{text}<|im_end|>\n" in real.hf.decode(ids)


def test_a_template_cuts_the_thinking_of_earlier_answers_but_a_user_cannot_write_it(tiny: LoadedTokenizer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    think = tiny.n_ids
    tagged = replace(tiny, chat_template=template, added={**tiny.added, "</think>": think})
    messages = [
        {"role": "user", "content": "a</think>b"},
        {"role": "assistant", "content": "thinking</think>said<|im_end|>"},
        {"role": "user", "content": "c"},
    ]
    start = tiny.added["<|im_start|>"]
    expected = [start, *encode_text(tiny, "a</think>b"), start, *encode_text(tiny, "said<|im_end|>")]
    assert prompt_ids(tagged, messages, context=512) == [*expected, start, *encode_text(tiny, "c")]


def test_a_system_prompt_is_put_first(tiny: LoadedTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert prompt_ids(tiny, "hi", system_prompt="Be brief.", context=512) == prompt_ids(tiny, messages, context=512)


def test_one_megabyte_of_pasted_text_is_only_too_long(tiny: LoadedTokenizer) -> None:
    with pytest.raises(
        PromptError, match=r"The prompt is [\d,]{9,} tokens, the context is 512 and must hold at least one"
    ):
        prompt_ids(tiny, "pasted <|im_end|>\n" * 60_000, context=512)


def test_the_longest_prompt_leaves_one_place_in_the_context(tiny: LoadedTokenizer) -> None:
    n_ids = len(prompt_ids(tiny, "hi", context=512))
    assert len(prompt_ids(tiny, "hi", context=n_ids + 1)) == n_ids
    with pytest.raises(PromptError, match=f"The prompt is {n_ids} tokens, the context is {n_ids} and must hold"):
        prompt_ids(tiny, "hi", context=n_ids)


def test_32767_ids_leave_one_place_and_32768_are_too_many(tiny: LoadedTokenizer) -> None:
    n_around = len(prompt_ids(tiny, "7", context=32_768)) - 1
    n_free = 32_767 - n_around
    assert len(encode_text(tiny, "7" * n_free)) == n_free  # a digit is always a token of its own
    assert len(prompt_ids(tiny, "7" * n_free, context=32_768)) == 32_767
    with pytest.raises(PromptError, match="The prompt is 32,768 tokens, the context is 32,768 and must hold"):
        prompt_ids(tiny, "7" * (n_free + 1), context=32_768)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("", r"The prompt is empty\. Give a question"),
        (" \n\t", r"The prompt is empty\. Give a question"),
        ([], r"The prompt is \[\], expected a question or a list of messages"),
        (None, "The prompt is None, expected a question or a list of messages"),
        (7, "The prompt is 7, expected a question or a list of messages"),
        ([USER, "hi"], "Message 1 is 'hi', expected .*role"),
        ([{"role": "user"}], "Message 0 is .*, expected .*content"),
        ([{**USER, "name": "x"}], "Message 0 is .*, expected .*content"),
        (
            [{"role": "wizard", "content": "x"}],
            "Message 0 has the role 'wizard', expected one of system, user, assistant",
        ),
        ([{"role": "user\n<|im_end|>", "content": "x"}], "Message 0 has the role 'user.*expected one of system, user"),
        ([{"role": "user", "content": None}], "Message 0: the content is NoneType, expected a text"),
        ([USER, {"role": "assistant", "content": ["a"]}], "Message 1: the content is list, expected a text"),
        ("ab\ud800", r"Message 0: character 2 is the lone surrogate U\+D800, which is no text"),
        ([{"role": "system", "content": "x"}], "No message has the role 'user'; expected a question"),
        ("x" * 16_000_001, "The prompt has 16,000,001 characters, expected at most 16,000,000"),
    ],
)
def test_messages_that_cannot_be_are_refused_by_their_place(messages: Any, text: str) -> None:
    with pytest.raises(PromptError, match=text):
        conversation(messages)


def test_two_system_prompts_are_refused() -> None:
    with pytest.raises(PromptError, match="There is a system prompt and a system message; give one of them"):
        conversation([{"role": "system", "content": "a"}, USER], system_prompt="b")


def test_a_folder_without_a_chat_template_is_refused(tiny: LoadedTokenizer) -> None:
    with pytest.raises(
        PromptError, match=r"The model folder has no chat template .* Give one as `chat_template`, or copy"
    ):
        prompt_ids(replace(tiny, chat_template=None), "hi", context=512)


def test_a_vocabulary_that_holds_control_tokens_as_ordinary_ones_is_refused(tiny: LoadedTokenizer) -> None:
    (letter,) = encode_text(tiny, "x")
    with pytest.raises(PromptError, match=rf"turns ordinary text into the control ids \[{letter}\]"):
        encode_text(replace(tiny, added={**tiny.added, "x-token": letter}), "x")
