"""Ask a server as each client does, in the clients' own environment: `python ask.py CLIENT URL`.

A line of JSON for each part: ["whole", TOLD], ["stream", TOLD], and after a stream that was left midway ["left", {}];
then the process waits until its stdin is closed, so that it is not the process's end that frees the server's row. Where
a client has no way to leave, ["to be ended", {}] comes before a long request, within which the process is to be killed.
TOLD is {"answer", "thinking", "prompt_tokens", "output_tokens"}, without what a client does not show.
The functions are what a user of that client writes; `CLIENTS` names them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

QUESTION = "What is 3 + 4?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
MODEL = "pocket"
LEFT = 0.01  # temperature of what is left midway, by which the server under test knows it and waits


def tell(part: str, **told: Any) -> None:
    """A line for who compares."""
    print(json.dumps([part, told]), flush=True)


def openai_chat(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    done = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    message, usage = done.choices[0].message, done.usage
    assert message.reasoning == message.reasoning_content
    assert usage.completion_tokens_details.reasoning_tokens > 0
    counts = {"prompt_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    tell("whole", answer=message.content, thinking=message.reasoning, **counts)
    answer = thinking = ""
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options=options
    ):
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            thinking += getattr(choice.delta, "reasoning_content", "") or ""
    counts = {"prompt_tokens": chunk.usage.prompt_tokens, "output_tokens": chunk.usage.completion_tokens}
    tell("stream", answer=answer, thinking=thinking, **counts)
    _openai_reads_lists_and_errors(client)
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=LEFT, stream=True)
    next(iter(stream))
    stream.close()


def _openai_reads_lists_and_errors(client: Any) -> None:
    import openai

    assert [model.id for model in client.models.list().data] == [MODEL] == [client.models.retrieve(MODEL).id]
    done = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, n=2)
    assert [choice.index for choice in done.choices] == [0, 1]
    for choice in done.choices:
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for wrong, kind, param in (
        ({"frequency_penalty": 1e9}, openai.BadRequestError, "frequency_penalty"),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **wrong})
            raise AssertionError(f"{wrong} was taken")
        except kind as error:
            assert error.param == param, error


def openai_responses(url: str) -> None:
    from openai import OpenAI

    def told(done: Any) -> dict[str, Any]:
        thinking = "".join(part.text for item in done.output if item.type == "reasoning" for part in item.summary)
        counts = {"prompt_tokens": done.usage.input_tokens, "output_tokens": done.usage.output_tokens}
        return {"answer": done.output_text, "thinking": thinking, **counts}

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tell("whole", **told(client.responses.create(model=MODEL, input=QUESTION, temperature=0)))
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        done = told(stream.get_final_response())
    assert "".join(pieces) == done["answer"]
    tell("stream", **done)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=LEFT) as stream:
        next(iter(stream))


def anthropic(url: str) -> None:
    from anthropic import Anthropic, BadRequestError

    def told(done: Any) -> dict[str, Any]:
        texts = {block.type: getattr(block, block.type) for block in done.content}
        counts = {
            "prompt_tokens": done.usage.input_tokens + done.usage.cache_read_input_tokens,
            "output_tokens": done.usage.output_tokens,
        }
        return {"answer": texts["text"], "thinking": texts["thinking"], **counts}

    client = Anthropic(base_url=url, api_key="none", max_retries=0)
    asked: Any = {
        "model": MODEL,
        "max_tokens": 300,
        "messages": MESSAGES,
        "thinking": {"type": "enabled", "budget_tokens": 200},
    }
    cold: Any = {"extra_body": {"temperature": 0}}
    tell("whole", **told(client.messages.create(**asked, **cold)))
    with client.messages.stream(**asked, **cold) as stream:
        answer = "".join(stream.text_stream)
        done = told(stream.get_final_message())
    assert answer == done["answer"]
    tell("stream", **done)
    count = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert count.input_tokens == done["prompt_tokens"]
    try:
        client.messages.create(model=MODEL, max_tokens=9_000, messages=MESSAGES)
        raise AssertionError("9,000 tokens were taken")
    except BadRequestError as error:
        assert "at most 9,000 are to be written" in str(error)
    with client.messages.stream(**asked, extra_body={"temperature": LEFT}) as stream:
        next(iter(stream))


def ollama(url: str) -> None:
    from ollama import Client, ResponseError

    def told(message: Any, last: Any) -> dict[str, Any]:
        counts = {"prompt_tokens": last.prompt_eval_count, "output_tokens": last.eval_count}
        return {"answer": message[0], "thinking": message[1], **counts}

    client, cold = Client(host=url), {"temperature": 0}
    done = client.chat(MODEL, MESSAGES, options=cold, think=True)
    tell("whole", **told((done.message.content, done.message.thinking), done))
    parts = list(client.generate(MODEL, QUESTION, options=cold, think=True, stream=True))
    texts = ("".join(part.response or "" for part in parts), "".join(part.thinking or "" for part in parts))
    tell("stream", **told(texts, parts[-1]))
    parts = list(client.chat(MODEL, MESSAGES, options=cold, stream=True))
    texts = (
        "".join(part.message.content or "" for part in parts),
        "".join(part.message.thinking or "" for part in parts),
    )
    tell("stream", **told(texts, parts[-1]))
    assert [model.model for model in client.list().models] == [f"{MODEL}:latest"]
    assert client.show(MODEL).capabilities == ["completion", "thinking"]
    assert client.ps().models[0].context_length == 4096
    try:
        client.pull("llama3")
        raise AssertionError("a model was pulled")
    except ResponseError as error:
        assert error.status_code == 501
    stream = client.chat(MODEL, MESSAGES, options={"temperature": LEFT}, stream=True)
    next(stream)
    stream.close()


async def litellm(url: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
    import litellm

    litellm.suppress_debug_info = True
    bases = {"openai": f"{url}/v1", "hosted_vllm": f"{url}/v1", "lm_studio": f"{url}/v1"}
    for provider in ("openai", "hosted_vllm", "lm_studio", "ollama_chat", "ollama", "anthropic"):
        asked: Any = {
            "model": f"{provider}/{MODEL}",
            "api_base": bases.get(provider, url),
            "api_key": "none",
            "messages": MESSAGES,
            "temperature": 0,
            "max_tokens": 300,
        }
        if provider == "anthropic":
            asked["thinking"] = {"type": "enabled", "budget_tokens": 200}
            asked["allowed_openai_params"] = ["thinking"]  # it knows no model of this name that thinks
        done = await litellm.acompletion(**asked)
        message, usage = done.choices[0].message, done.usage
        counts = {"prompt_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        tell("whole", answer=message.content, thinking=message.reasoning_content, provider=provider, **counts)
        answer = thinking = ""
        async for chunk in await litellm.acompletion(**asked, stream=True):
            answer += chunk.choices[0].delta.content or ""
            thinking += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        tell("stream", answer=answer, thinking=thinking, provider=provider)
        await leave(litellm.acompletion(**{**asked, "temperature": LEFT}))


async def langchain_openai(url: str) -> None:
    from langchain_openai import ChatOpenAI

    for uses_responses in (False, True):
        model = ChatOpenAI(
            base_url=f"{url}/v1", api_key="none", model=MODEL, temperature=0, use_responses_api=uses_responses
        )
        await _langchain(model, "chat.completions" if not uses_responses else "responses")
    await _leave_langchain(model.model_copy(update={"temperature": LEFT}))


async def langchain_ollama(url: str) -> None:
    from langchain_ollama import ChatOllama

    await _langchain(ChatOllama(base_url=url, model=MODEL, temperature=0, reasoning=True), "ollama")
    await _leave_langchain(ChatOllama(base_url=url, model=MODEL, temperature=LEFT))


async def _langchain(model: Any, provider: str) -> None:
    for part in ("whole", "stream"):
        if part == "whole":
            message = await model.ainvoke(QUESTION)
        else:
            message = None
            async for chunk in model.astream(QUESTION):
                message = chunk if message is None else message + chunk
        blocks = message.content_blocks
        told = {
            "answer": "".join(block["text"] for block in blocks if block["type"] == "text"),
            "thinking": "".join(block.get("reasoning", "") for block in blocks if block["type"] == "reasoning"),
        }
        usage = message.usage_metadata or {}
        counts = {"prompt_tokens": usage.get("input_tokens"), "output_tokens": usage.get("output_tokens")}
        tell(part, provider=provider, **told, **counts)


async def _leave_langchain(model: Any) -> None:
    stream = model.astream(QUESTION)
    await anext(stream)
    await stream.aclose()


async def pydantic_ai(url: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ThinkingPart
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def told(run: Any, messages: Any) -> dict[str, Any]:
        parts = messages[-1].parts
        thinking = "".join(part.content for part in parts if isinstance(part, ThinkingPart))
        usage = run.usage() if callable(run.usage) else run.usage
        return {"thinking": thinking, "prompt_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    agent = Agent(model, model_settings={"temperature": 0})
    run = await agent.run(QUESTION)
    tell("whole", answer=run.output, **told(run, run.all_messages()))
    async with agent.run_stream(QUESTION) as stream:
        answer = await stream.get_output()
        tell("stream", answer=answer, **told(stream, stream.all_messages()))
    await leave(Agent(model, model_settings={"temperature": LEFT}).run(QUESTION))


def llm(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(OLLAMA_HOST=url, LLM_USER_PATH=folder)
        entry = f"- model_id: own\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: own\n"
        Path(folder, "extra-openai-models.yaml").write_text(entry)
        import llm

        for name, asked in ((f"ollama/{MODEL}", {"think": True}), ("own", {"key": "none"})):
            for part in ("whole", "stream"):
                response = llm.get_model(name).prompt(QUESTION, stream=part == "stream", temperature=0, **asked)
                answer = "".join(response)
                usage = response.usage()
                counts = {"prompt_tokens": usage.input, "output_tokens": usage.output}
                thinking = _thinking_of_llm(response)
                tell(part, answer=answer, thinking=thinking, provider=name, **counts)
        tell("to be ended")  # a command line, which its user ends by Ctrl-C
        "".join(llm.get_model("own").prompt(QUESTION, key="none", temperature=LEFT))


def _thinking_of_llm(response: Any) -> str:
    return "".join(event.chunk for event in response.stream_events() if event.type == "reasoning")


async def inspect_ai(url: str) -> None:
    from inspect_ai.model import GenerateConfig, get_model

    os.environ["QWQ_API_KEY"] = "none"
    for part, streams in (("whole", False), ("stream", True)):
        model = get_model(
            f"openai-api/qwq/{MODEL}", base_url=f"{url}/v1", config=GenerateConfig(temperature=0), stream=streams
        )
        done = await model.generate(QUESTION)
        content = done.choices[0].message.content
        thinking = "".join(each.reasoning for each in content if each.type == "reasoning")
        counts = {
            "prompt_tokens": done.usage.input_tokens + (done.usage.input_tokens_cache_read or 0),
            "output_tokens": done.usage.output_tokens,
        }
        tell(part, answer=done.completion, thinking=thinking, **counts)
    await leave(model.generate(QUESTION, config=GenerateConfig(temperature=LEFT)))


def lm_eval(url: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        data.write_text(json.dumps({"question": QUESTION, "answer": "7"}) + "\n")
        os.environ["HF_HOME"] = folder
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        task = {
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 300, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        }
        arguments = f"model={MODEL},base_url={url}/v1/chat/completions,num_concurrent=1,max_retries=1"
        rest: Any = {"apply_chat_template": True, "task_manager": TaskManager(include_defaults=False)}
        done = simple_evaluate("local-chat-completions", arguments, tasks=[task], **rest)
        tell("whole", answer=done["samples"]["sums"][0]["resps"][0][0])
        task["generation_kwargs"]["temperature"] = LEFT
        tell("to be ended")
        simple_evaluate("local-chat-completions", arguments, tasks=[task], **rest)


async def leave(answer: Awaitable[Any]) -> None:
    """Begin to wait for an answer that takes long, and give it up."""
    task = asyncio.ensure_future(answer)
    await asyncio.sleep(0.3)
    assert not task.done(), "the answer came too soon to be left"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


CLIENTS: dict[str, Callable[[str], Any]] = {
    function.__name__: function
    for function in (
        openai_chat,
        openai_responses,
        anthropic,
        ollama,
        litellm,
        langchain_openai,
        langchain_ollama,
        pydantic_ai,
        llm,
        inspect_ai,
        lm_eval,
    )
}


async def _run(asked: Any) -> None:
    await asked
    tell("left")
    await asyncio.to_thread(sys.stdin.read)  # in the loop, whose end would close what is open


def main(name: str, url: str) -> None:
    """Ask as that client."""
    asked = CLIENTS[name](url)
    if asyncio.iscoroutine(asked):
        asyncio.run(_run(asked))
        return
    tell("left")
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
