"""The publishers' own clients, as a user installs them, against a server on a socket: answer, thinking, usage, streams.

They are the extra `clients`; without it these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
from serving import QUESTION, Served, until

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Sampling
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

MESSAGES: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def trace(pocket_reasoner: Reasoner) -> Trace:
    return pocket_reasoner.generate(QUESTION, sampling=Sampling(temperature=0))


@pytest.fixture(scope="module")
def openai_client(pocket_server: Served) -> Any:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{pocket_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(pocket_server: Served) -> Any:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=pocket_server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ollama_client(pocket_server: Served) -> Any:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=pocket_server.url)
    yield client
    client.close()


def test_openai_reads_a_completion(openai_client: Any, trace: Trace) -> None:
    [model] = openai_client.models.list().data
    done = openai_client.chat.completions.create(model=model.id, messages=MESSAGES, temperature=0, logprobs=True)
    message = done.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (
        trace.conclusion,
        trace.thinking,
        trace.thinking,
    )
    assert done.choices[0].finish_reason == "stop" and done.usage.completion_tokens == len(trace.ids)
    assert done.usage.completion_tokens_details.reasoning_tokens == trace.thinking_span[1]
    assert "".join(entry.token for entry in done.choices[0].logprobs.content) == trace.conclusion


def test_openai_gathers_a_stream(openai_client: Any, trace: Trace) -> None:
    with openai_client.chat.completions.stream(
        model="pocket", messages=MESSAGES, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        thinking = "".join(
            event.chunk.choices[0].delta.reasoning or ""
            for event in stream
            if event.type == "chunk" and event.chunk.choices and hasattr(event.chunk.choices[0].delta, "reasoning")
        )
        done = stream.get_final_completion()
    assert (thinking, done.choices[0].message.content) == (trace.thinking, trace.conclusion)
    assert done.usage.completion_tokens == len(trace.ids)


def test_openai_leaves_a_stream_and_reads_errors(openai_client: Any, pocket_server: Served) -> None:
    import openai

    stream = openai_client.chat.completions.create(model="pocket", messages=MESSAGES, stream=True, temperature=1.5)
    next(iter(stream))
    stream.close()
    until(lambda: pocket_server.is_idle)
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model="pocket", messages=MESSAGES, frequency_penalty=1e9)
    assert caught.value.param == "frequency_penalty"
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


def test_openai_reads_responses(openai_client: Any, trace: Trace) -> None:
    with openai_client.responses.stream(model="pocket", input=QUESTION, temperature=0) as stream:
        kinds = [event.type for event in stream]
        done = stream.get_final_response()
    assert done.output_text == trace.conclusion and done.output[0].summary[0].text == trace.thinking
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert done.usage.output_tokens == len(trace.ids)


def test_anthropic_reads_blocks(anthropic_client: Any, trace: Trace) -> None:
    thinking = {"type": "enabled", "budget_tokens": 200}
    with anthropic_client.messages.stream(
        model="pocket", max_tokens=300, messages=MESSAGES, thinking=thinking, extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == trace.conclusion
        done = stream.get_final_message()
    assert [block.type for block in done.content] == ["thinking", "text"]
    assert done.content[0].thinking == trace.thinking and done.usage.output_tokens == len(trace.ids)
    count = anthropic_client.messages.count_tokens(model="pocket", messages=MESSAGES)
    assert count.input_tokens == len(trace.prompt_ids)


def test_anthropic_leaves_and_reads_errors(anthropic_client: Any, pocket_server: Served) -> None:
    import anthropic

    with anthropic_client.messages.stream(model="pocket", max_tokens=300, messages=MESSAGES) as stream:
        next(iter(stream))
    until(lambda: pocket_server.is_idle)
    with pytest.raises(anthropic.BadRequestError, match="at most 9,000 are to be written"):
        anthropic_client.messages.create(model="pocket", max_tokens=9_000, messages=MESSAGES)


def test_ollama_chats_and_lists(ollama_client: Any, trace: Trace) -> None:
    options = {"temperature": 0}
    parts = list(ollama_client.chat("pocket", MESSAGES, stream=True, options=options))
    assert "".join(part.message.thinking or "" for part in parts) == trace.thinking
    assert "".join(part.message.content for part in parts) == trace.conclusion
    assert parts[-1].eval_count == len(trace.ids) and parts[-1].done_reason == "stop"
    assert [model.model for model in ollama_client.list().models] == ["pocket:latest"]
    assert ollama_client.show("pocket").capabilities == ["completion", "thinking"]
    assert ollama_client.ps().models[0].context_length == 4096
    assert ollama_client.generate("pocket", QUESTION, think=False, options=options).response == trace.conclusion


def test_ollama_leaves_and_reads_errors(ollama_client: Any, pocket_server: Served) -> None:
    import ollama

    stream = ollama_client.chat("pocket", MESSAGES, stream=True)
    next(stream)
    stream.close()
    until(lambda: pocket_server.is_idle)
    with pytest.raises(ollama.ResponseError) as caught:
        ollama_client.pull("llama3")
    assert caught.value.status_code == 501
