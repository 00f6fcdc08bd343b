"""Ollama's, Anthropic's and OpenAI's other interfaces: the engine's text in their words, and their refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import QUESTION, Served

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

MESSAGES = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def trace(pocket_reasoner: Reasoner) -> Trace:
    return pocket_reasoner.generate(QUESTION, sampling=Sampling(temperature=0))


def lines(served: Served, path: str, body: Any) -> list[Any]:
    status, headers, raw = served.send("POST", path, body)
    assert status == 200 and headers["content-type"] == "application/x-ndjson", raw
    return [json.loads(line) for line in raw.splitlines()]


def events(served: Served, path: str, body: Any) -> list[Any]:
    """Server-sent events whose name is the type of their data."""
    status, _, raw = served.send("POST", path, {**body, "stream": True})
    assert status == 200, raw
    pairs = [event.split("\n") for event in raw.decode().split("\n\n") if event]
    assert all(name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"] for name, data in pairs)
    return [json.loads(data.removeprefix("data: ")) for _, data in pairs]


def test_ollama_chat_streams_thinking_answer_and_counts(pocket_server: Served, trace: Trace) -> None:
    got = lines(pocket_server, "/api/chat", {"model": "pocket:latest", "messages": MESSAGES, "options": GREEDY})
    assert "".join(line["message"].get("thinking", "") for line in got) == trace.thinking
    assert "".join(line["message"]["content"] for line in got) == trace.conclusion
    assert [line["done"] for line in got] == [False] * (len(got) - 1) + [True]
    last = got[-1]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (
        "stop",
        len(trace.prompt_ids),
        len(trace.ids),
    )
    assert last["total_duration"] >= last["eval_duration"] + last["prompt_eval_duration"] > 10_000_000


def test_ollama_without_thinking_is_one_object(pocket_server: Served, trace: Trace) -> None:
    body = {
        "model": "pocket",
        "prompt": QUESTION,
        "options": {**GREEDY, "num_ctx": 200},
        "stream": False,
        "think": False,
    }
    got = pocket_server.post("/api/generate", body)
    assert got["response"] == trace.conclusion and "thinking" not in got and got["done"] is True


def test_ollama_raw_goes_on_with_a_text(pocket_server: Served) -> None:
    body = {"model": "pocket", "prompt": "Step by step.\n3+4=", "raw": True, "options": {**GREEDY, "num_predict": 1}}
    got = lines(pocket_server, "/api/generate", body)
    assert got[0]["response"] == "7" and got[-1]["done_reason"] == "length"


def test_ollama_asked_nothing_says_that_the_model_is_there(pocket_server: Served) -> None:
    assert pocket_server.post("/api/chat", {"model": "pocket", "messages": []})["done_reason"] == "load"
    assert pocket_server.post("/api/generate", {"model": "pocket", "keep_alive": 0})["response"] == ""


def test_ollama_tells_its_model(pocket_server: Served) -> None:
    status, _, raw = pocket_server.send("GET", "/")
    assert (status, raw) == (200, b"Ollama is running") and pocket_server.send("HEAD", "/")[0] == 200
    [tag], [process] = pocket_server.get("/api/tags")["models"], pocket_server.get("/api/ps")["models"]
    assert tag["name"] == tag["model"] == process["name"] == "pocket:latest" and len(tag["digest"]) == 64
    assert process["context_length"] == 4096
    for body in ({"model": "pocket"}, {"name": "pocket:latest", "verbose": True}):
        shown = pocket_server.post("/api/show", body)
        assert shown["capabilities"] == ["completion", "thinking"]
        assert shown["model_info"]["qwen2.context_length"] == 4096
        assert shown["details"]["parameter_size"].endswith("M") and "im_start" in shown["template"]
    assert pocket_server.get("/api/version")["version"].startswith("0.")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/api/pull", {"model": "llama3"}, 501, "/api/pull is not implemented"),
        ("DELETE", "/api/delete", {"model": "pocket"}, 501, "not implemented"),
        ("POST", "/api/embed", {"model": "pocket", "input": "x"}, 501, "not implemented"),
        ("POST", "/api/chat", {"messages": MESSAGES}, 400, "model is missing"),
        ("POST", "/api/chat", {"model": "llama3", "messages": MESSAGES}, 404, "'llama3'"),
        ("POST", "/api/show", {"model": "llama3"}, 404, "'llama3'"),
        ("POST", "/api/chat", {"model": "pocket", "messages": MESSAGES, "format": "json"}, 400, "format"),
        ("POST", "/api/chat", {"model": "pocket", "messages": MESSAGES, "think": "hard"}, 400, "think"),
        ("POST", "/api/chat", {"model": "pocket", "messages": MESSAGES, "tools": [{}]}, 400, "tools"),
        ("POST", "/api/chat", {"model": "pocket", "messages": MESSAGES, "options": {"x": 1}}, 400, "options.x"),
        ("POST", "/api/chat", {"model": "pocket", "messages": MESSAGES, "options": {"num_ctx": 8192}}, 400, "KV cache"),
        (
            "POST",
            "/api/chat",
            {"model": "pocket", "messages": [{"role": "user", "content": "x", "images": ["aa"]}]},
            400,
            "images",
        ),
        ("POST", "/api/nothing", {}, 404, "nothing at"),
    ],
)
def test_ollama_refuses_in_its_own_form(
    pocket_server: Served, method: str, path: str, body: Any, status: int, said: str
) -> None:
    got, _, raw = pocket_server.send(method, path, body)
    assert got == status and set(json.loads(raw)) == {"error"} and said in json.loads(raw)["error"]


def test_anthropic_streams_blocks_in_order(pocket_server: Served, trace: Trace) -> None:
    body = {"model": "pocket", "max_tokens": 300, "messages": MESSAGES, **GREEDY}
    got = events(pocket_server, "/v1/messages", {**body, "thinking": {"type": "enabled", "budget_tokens": 200}})
    names = [event["type"] for event in got if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert names == ["message_start", "ping", *block, *block, "message_delta", "message_stop"]
    assert got[0]["message"]["usage"]["input_tokens"] == len(trace.prompt_ids)
    deltas = [event["delta"] for event in got if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == trace.thinking
    assert "".join(delta.get("text", "") for delta in deltas) == trace.conclusion
    assert [delta["type"] for delta in deltas].count("signature_delta") == 1
    assert got[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert got[-2]["usage"]["output_tokens"] == len(trace.ids)


def test_anthropic_hides_thinking_that_was_not_enabled(pocket_server: Served, trace: Trace) -> None:
    body = {
        "max_tokens": 300,
        "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        "stop_sequences": ["7"],
        **GREEDY,
    }
    got = pocket_server.post("/v1/messages", body)
    assert got["content"] == [{"type": "text", "text": trace.conclusion.partition("7")[0]}]
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", "7")


def test_anthropic_keeps_the_budget(pocket_server: Served, pocket_reasoner: Reasoner) -> None:
    alone = pocket_reasoner.generate(QUESTION, sampling=Sampling(temperature=0), thinking=Thinking(think_tokens=8))
    body = {"max_tokens": 300, "messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": 8}, **GREEDY}
    thought, text = pocket_server.post("/v1/messages", body)["content"]
    assert (thought["thinking"], text["text"]) == (alone.thinking, alone.conclusion)


def test_anthropic_counts_the_prompt_of_the_engine(pocket_server: Served, pocket_reasoner: Reasoner) -> None:
    thought = [{"type": "thinking", "thinking": "3+4=7\n", "signature": "x"}, {"type": "text", "text": "**7**"}]
    messages = [*MESSAGES, {"role": "assistant", "content": thought}, {"role": "user", "content": "And 2 + 2?"}]
    plain = [*MESSAGES, {"role": "assistant", "content": "3+4=7\n**7**"}, {"role": "user", "content": "And 2 + 2?"}]
    alone = pocket_reasoner.generate(
        [{"role": "system", "content": "Be short."}, *plain],
        limits=Limits(max_tokens=1),
        sampling=Sampling(temperature=0),
    )
    got = pocket_server.post(
        "/v1/messages/count_tokens", {"messages": messages, "system": [{"type": "text", "text": "Be short."}]}
    )
    assert got == {"input_tokens": len(alone.prompt_ids)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, "thinking.budget_tokens"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}
                ]
            },
            "image",
        ),
        ({"seed": 1}, "seed"),
    ],
)
def test_anthropic_refuses_in_its_own_form(pocket_server: Served, fields: dict[str, Any], said: str) -> None:
    got = pocket_server.post("/v1/messages", {"max_tokens": 300, "messages": MESSAGES, **fields}, status=400)
    assert (
        got["type"] == "error" and got["error"]["type"] == "invalid_request_error" and said in got["error"]["message"]
    )


def test_responses_stream_items_in_order(pocket_server: Served, trace: Trace) -> None:
    got = events(pocket_server, "/v1/responses", {"model": "pocket", "input": QUESTION, **GREEDY})
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    names = [event["type"].removeprefix("response.") for event in got if not event["type"].endswith(".delta")]
    assert names == [
        *("created", "in_progress"),
        *("output_item.added", "reasoning_summary_part.added"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    texts = {
        kind: "".join(e["delta"] for e in got if e["type"] == f"response.{kind}.delta")
        for kind in ("output_text", "reasoning_summary_text")
    }
    assert texts == {"output_text": trace.conclusion, "reasoning_summary_text": trace.thinking}
    thought, message = got[-1]["response"]["output"]
    assert thought["summary"][0]["text"] == trace.thinking and message["content"][0]["text"] == trace.conclusion
    assert got[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": trace.thinking_span[1]}


def test_responses_take_items_and_say_where_they_were_cut(pocket_server: Served, pocket_reasoner: Reasoner) -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "3+4=7\n"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "**7**", "annotations": []}],
        },
        {"role": "user", "content": "And 2 + 2?"},
    ]
    plain = [*MESSAGES, {"role": "assistant", "content": "3+4=7\n**7**"}, {"role": "user", "content": "And 2 + 2?"}]
    alone = pocket_reasoner.generate(plain, limits=Limits(max_tokens=2), sampling=Sampling(temperature=0))
    got = pocket_server.post("/v1/responses", {"input": items, "max_output_tokens": 2, "store": True, **GREEDY})
    assert got["status"] == "incomplete" and got["incomplete_details"] == {"reason": "max_output_tokens"}
    assert got["usage"]["input_tokens"] == len(alone.prompt_ids)
    assert got["output"][0]["summary"][0]["text"] == alone.text


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search"}]},
        {"background": True},
        {"text": {"format": {"type": "json_object"}}},
    ],
)
def test_responses_refuse_by_name(pocket_server: Served, fields: dict[str, Any]) -> None:
    error = pocket_server.post("/v1/responses", {"input": "x", **fields}, status=400)["error"]
    assert error["param"].partition(".")[0] in fields


def test_completions_go_on_with_each_prompt(pocket_server: Served, pocket_reasoner: Reasoner) -> None:
    prompts = ["Step by step.\n3+4=", "Step by step.\n2+2="]
    body = {"prompt": prompts, "max_tokens": 2, "logprobs": 1, **GREEDY}
    got = pocket_server.post("/v1/completions", body)
    texts = [choice["text"] for choice in got["choices"]]
    assert [text[0] for text in texts] == ["7", "4"] and [choice["index"] for choice in got["choices"]] == [0, 1]
    assert got["choices"][0]["finish_reason"] == "length"
    logprobs = got["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == texts[0] and logprobs["text_offset"] == [0, 1]
    assert logprobs["top_logprobs"][0] == {"7": logprobs["token_logprobs"][0]}
    ids = pocket_reasoner.model.tokenizer.plain.encode(prompts[0]).ids
    chunks = pocket_server.chunks(
        "/v1/completions", {"prompt": ids, "max_tokens": 2, "stream_options": {"include_usage": True}, **GREEDY}
    )
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == texts[0]
    assert chunks[-1]["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": {}},
        {"prompt": [1, "x"]},
        {"prompt": [999_999]},
        {"echo": True},
        {"suffix": "x"},
    ],
)
def test_completions_refuse_by_name(pocket_server: Served, fields: dict[str, Any]) -> None:
    error = pocket_server.post("/v1/completions", {"prompt": "x", **fields}, status=400)["error"]
    assert error["param"] in fields
