"""OpenAI's chat completions against `Reasoner.stream` with the same seed, and what is refused by its name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from serving import CHAT, QUESTION, Served, user

from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.serve.dialects import openai
from qwq_mlx.serve.jobs import Delta, Ended, Usage
from qwq_mlx.serve.settings import ReasoningField, Settings
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

SEEDED = {"seed": 5, "temperature": 0.9}


@pytest.fixture(scope="module")
def trace(reasoner: Reasoner) -> Trace:
    """What the engine writes for SEEDED."""
    return reasoner.generate(QUESTION, sampling=Sampling(seed=5, temperature=0.9), inspect=Inspect(top_k=2))


@pytest.fixture(scope="module")
def reasoner(pocket_reasoner: Reasoner) -> Reasoner:
    return pocket_reasoner


def parts(chunks: list[Any], field: str = "reasoning") -> tuple[str, str]:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return tuple("".join(delta.get(name) or "" for delta in deltas) for name in (field, "content"))  # type: ignore[return-value]


def test_a_completion_is_the_text_of_the_engine(pocket_server: Served, trace: Trace) -> None:
    body = pocket_server.post(CHAT, user(**SEEDED, model="pocket"))
    [choice] = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": trace.conclusion,
        "refusal": None,
        "reasoning_content": trace.thinking,
        "reasoning": trace.thinking,
    }
    assert choice["finish_reason"] == "stop" and body["object"] == "chat.completion" and body["model"] == "pocket"
    n_prompt, n_output = len(trace.prompt_ids), len(trace.ids)
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert body["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_output,
        "total_tokens": n_prompt + n_output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": trace.thinking_span[1]},
    }


def test_a_stream_is_the_same_text_with_one_end(pocket_server: Served, trace: Trace) -> None:
    chunks = pocket_server.chunks(
        CHAT, user(**SEEDED, logprobs=True, top_logprobs=2, stream_options={"include_usage": True})
    )
    assert parts(chunks) == parts(chunks, "reasoning_content") == (trace.thinking, trace.conclusion)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1] if chunk["choices"][0]["finish_reason"]] == [
        "stop"
    ]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(trace.ids)
    assert len({chunk["id"] for chunk in chunks}) == 1 and all(chunk["usage"] is None for chunk in chunks[:-1])
    logprobs = [chunk["choices"][0]["logprobs"] or {} for chunk in chunks[:-1]]
    thought = [entry for each in logprobs for entry in each.get("reasoning_logprobs", ())]
    entries = thought + [entry for each in logprobs for entry in each.get("content", ())]
    assert len(thought) == trace.thinking_span[1]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == trace.text
    for entry, logprob, alternatives in zip(entries, trace.logprobs, trace.alternatives, strict=False):
        assert logprob is not None and math.isclose(entry["logprob"], logprob, abs_tol=1e-4)
        assert [each["token"] for each in entry["top_logprobs"]] == [each.text for each in alternatives]


def test_logprobs_of_one_body_are_those_of_its_parts(pocket_server: Served, trace: Trace) -> None:
    [choice] = pocket_server.post(CHAT, user(**SEEDED, logprobs=True))["choices"]
    logprobs = choice["logprobs"]
    assert "".join(entry["token"] for entry in logprobs["content"]) == trace.conclusion
    assert "".join(entry["token"] for entry in logprobs["reasoning_logprobs"]) == trace.thinking
    assert logprobs["content"][0]["top_logprobs"] == []


def test_choices_are_forks_with_seeds_of_their_own(pocket_server: Served, reasoner: Reasoner, trace: Trace) -> None:
    body = pocket_server.post(CHAT, user(**SEEDED, n=2))
    sampling = Sampling(seed=question_seed(5, 1), temperature=0.9)
    alone = [trace, reasoner.generate(QUESTION, sampling=sampling)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in body["choices"]] == [each.conclusion for each in alone]
    assert [choice["message"]["reasoning"] for choice in body["choices"]] == [each.thinking for each in alone]
    assert body["usage"]["prompt_tokens"] == len(trace.prompt_ids)
    assert body["usage"]["completion_tokens"] == sum(len(each.ids) for each in alone)
    chunks = pocket_server.chunks(CHAT, user(n=2, max_tokens=2))
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1]


def test_stop_texts_end_the_answer_and_not_the_thinking(pocket_server: Served, trace: Trace) -> None:
    assert "7" in trace.thinking and "7" in trace.conclusion
    body = pocket_server.post(CHAT, user(**SEEDED, stop=["7", "none"]))
    [choice] = body["choices"]
    assert choice["message"]["reasoning"] == trace.thinking
    assert choice["message"]["content"] == trace.conclusion.partition("7")[0] and choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < len(trace.ids)


def test_a_cut_thinking_is_no_answer_and_thinking_counts(pocket_server: Served, trace: Trace) -> None:
    body = pocket_server.post(CHAT, user(**SEEDED, max_completion_tokens=6, max_tokens=500))
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning"] == "".join(trace.texts[:6]) and body["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("fields", "budget", "is_shown"),
    [
        ({}, None, True),
        ({"reasoning": {"max_tokens": 8}}, 8, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 8}}, 8, True),
        ({"reasoning_effort": "low"}, 1_024, True),
        ({"reasoning_effort": "high", "reasoning": {"max_tokens": 8, "exclude": True}}, 8, False),
        ({"reasoning_effort": "none"}, None, False),
        ({"thinking": {"type": "disabled"}}, None, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, False),
        ({"include_reasoning": False}, None, False),
    ],
)
def test_what_says_how_long_to_think(fields: dict[str, Any], budget: int | None, is_shown: bool) -> None:
    body = {**user(), **fields}
    ask, writer, _ = openai.read_chat(body, settings=Settings(), model="m", joins_thinking=True)
    assert ask.thinking == Thinking(think_tokens=budget)
    assert (writer.delta(Delta(choice=0, reasoning="I think")) != b"") is is_shown


def test_no_thinking_may_mean_the_answer_at_once() -> None:
    settings = Settings(no_think="answer-now")
    body = user(reasoning_effort="none")
    assert openai.read_chat(body, settings=settings, model="m", joins_thinking=True)[0].thinking.think_tokens == 0
    assert openai.read_chat(user(), settings=settings, model="m", joins_thinking=True)[0].thinking.think_tokens is None


def test_a_budget_is_kept_and_hidden_thinking_counts(pocket_server: Served, reasoner: Reasoner) -> None:
    alone = reasoner.generate(QUESTION, sampling=Sampling(temperature=0), thinking=Thinking(think_tokens=8))
    body = pocket_server.post(CHAT, user(temperature=0, reasoning={"max_tokens": 8, "exclude": True}))
    assert "reasoning" not in body["choices"][0]["message"]
    assert body["choices"][0]["message"]["content"] == alone.conclusion
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == alone.thinking_span[1]


@pytest.mark.parametrize(
    ("field", "names", "content"),
    [
        ("both", {"reasoning_content", "reasoning"}, "7"),
        ("reasoning", {"reasoning"}, "7"),
        ("reasoning_content", {"reasoning_content"}, "7"),
        ("none", set(), "7"),
        ("think-tags", set(), "<think>\n3+4\n</think>\n\n7"),
    ],
)
def test_where_the_thinking_goes(field: ReasoningField, names: set[str], content: str) -> None:
    settings = Settings(reasoning_field=field)
    _, writer, _ = openai.read_chat(user(), settings=settings, model="m", joins_thinking=True)
    ended = Ended(choice=0, finish="stop", stop_text=None, reasoning="3+4", content="7", usage=Usage(n_prompt=1))
    message = writer.whole([ended])["choices"][0]["message"]
    assert {name for name in message if name.startswith("reasoning")} == names and message["content"] == content
    raw = writer.delta(Delta(choice=0, reasoning="3+")) + writer.delta(Delta(choice=0, reasoning="4"))
    raw += writer.delta(Delta(choice=0, content="7")) + writer.end(ended)
    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in raw.decode().split("\n\n") if line
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == content
    assert {name for delta in deltas for name in delta if name.startswith("reasoning")} == names


def test_roles_and_parts_make_the_prompt_of_the_engine(pocket_server: Served, reasoner: Reasoner) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]},
        {"role": "assistant", "content": "**7**", "reasoning_content": "3+4=7\n"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    plain = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "3+4=7\n**7**"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    alone = reasoner.generate(plain, sampling=Sampling(temperature=0), limits=Limits(max_tokens=4))
    body = pocket_server.post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 4})
    assert body["usage"]["prompt_tokens"] == len(alone.prompt_ids)
    assert body["choices"][0]["message"]["reasoning"] == alone.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"max_tokens": 5_000}, "max_tokens"),
        ({"reasoning": {"max_tokens": 5, "summary": "auto"}}, "reasoning.summary"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"what": 1}, "what"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 9_000}]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(pocket_server: Served, fields: dict[str, Any], param: str) -> None:
    error = pocket_server.post(CHAT, {**user(), **fields}, status=400)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_a_request_beyond_the_plan_gets_the_arithmetic(pocket_server: Served) -> None:
    error = pocket_server.post(CHAT, user(max_tokens=5_000), status=400)["error"]
    assert error["code"] == "context_length_exceeded"
    assert "KV cache" in error["message"] and "4,096 positions of 8,192 bytes" in error["message"]


def test_null_is_a_field_left_out_and_neutral_values_are_taken(pocket_server: Served) -> None:
    neutral: dict[str, Any] = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "user": "me",
        "stop": [],
    }
    nothing = dict.fromkeys(("seed", "logit_bias", "top_p", "anything", "stream_options", "functions"))
    body = pocket_server.post(CHAT, user(max_tokens=1.0, **neutral, **nothing))
    assert body["usage"]["completion_tokens"] == 1
    assert len(pocket_server.chunks(CHAT, user(max_tokens=1, stream_options={}))) >= 2


def test_the_models_list_has_the_planned_context(pocket_server: Served) -> None:
    [card] = pocket_server.get("/v1/models")["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("pocket", "model", 4096)
    assert pocket_server.get("/v1/models/pocket") == card
    error = pocket_server.post(CHAT, user(model="gpt-4o"), status=404)["error"]
    assert error["param"] == "model" and error["code"] == "model_not_found" and "'pocket'" in error["message"]
    assert pocket_server.send("GET", "/v1/models/other")[0] == 404
