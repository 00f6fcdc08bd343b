"""Bodies as clients send them that cannot be installed here, by their documentation: each is taken as it stands."""

from __future__ import annotations

from typing import Any

import pytest

from qwq_mlx.serve.dialects import ollama, openai
from qwq_mlx.serve.settings import Settings

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]

OPENAI: dict[str, dict[str, Any]] = {
    "Open WebUI": {"stream": True, "model": "m", "messages": MESSAGES, "stream_options": {"include_usage": True}},
    "Open WebUI, a title": {"model": "m", "messages": MESSAGES[1:], "stream": False, "max_completion_tokens": 1000},
    "LibreChat": {
        "model": "m",
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "6650f0",
        "stream": True,
        "messages": MESSAGES,
    },
    "Cline": {
        "model": "m",
        "messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": None,
    },
    "Continue": {"model": "m", "messages": MESSAGES, "max_tokens": 2048, "stream": True, "stop": None, "tools": []},
    "aider": {"model": "m", "messages": MESSAGES, "temperature": 0, "stream": True},
    "Codex": {"model": "m", "messages": MESSAGES, "stream": True, "parallel_tool_calls": False, "store": False},
}
OLLAMA: dict[str, dict[str, Any]] = {
    "Open WebUI": {"model": "m:latest", "messages": MESSAGES, "options": {}, "stream": True, "keep_alive": "5m"},
    "Zed": {
        "model": "m",
        "messages": [{**MESSAGES[1], "images": None}],
        "stream": True,
        "keep_alive": -1,
        "options": {"num_ctx": 4096, "stop": [], "temperature": 1.0},
        "think": True,
        "tools": [],
    },
    "Page Assist": {
        "model": "m",
        "messages": MESSAGES,
        "stream": True,
        "options": {"temperature": 0.7, "num_ctx": 2048},
    },
    "Enchanted": {"model": "m:latest", "messages": [{**MESSAGES[1], "images": []}], "options": {"temperature": 0}},
    "Msty": {"model": "m", "messages": MESSAGES, "options": {"num_predict": -1, "top_k": 40, "repeat_last_n": 64}},
}


@pytest.mark.parametrize("client", OPENAI)
def test_a_client_of_openai_is_understood(client: str) -> None:
    body = OPENAI[client]
    ask, _, streams = openai.read_chat(body, settings=Settings(), model="m", joins_thinking=True)
    assert ask.messages[-1] == {"role": "user", "content": "x"} and streams is body.get("stream", False)


@pytest.mark.parametrize("client", OLLAMA)
def test_a_client_of_ollama_is_understood(client: str) -> None:
    ask, _, streams = ollama.read_chat(OLLAMA[client], settings=Settings(), model="m", joins_thinking=True)
    assert ask is not None and ask.messages[-1] == {"role": "user", "content": "x"} and streams
    assert ask.context == OLLAMA[client].get("options", {}).get("num_ctx")


@pytest.mark.parametrize(
    ("thought", "content", "prompt"),
    [
        ("I add.\n\n", "**Final Answer** 7", "I add.\n\n**Final Answer** 7"),
        ("I add. So it is \\boxed{7", "So it is \\boxed{7}.", "I add. So it is \\boxed{7}."),
        ("Hello! I am here.", "Hello! I am here.", "Hello! I am here."),
        ("a 7", "7 it is", "a 77 it is"),
        ("", "7", "7"),
    ],
)
def test_thinking_that_is_sent_back_stands_before_the_answer_once(thought: str, content: str, prompt: str) -> None:
    reply = {"role": "assistant", "content": content, "reasoning": thought}
    body = {"messages": [*MESSAGES, reply, MESSAGES[1]]}
    ask, _, _ = openai.read_chat(body, settings=Settings(), model="m", joins_thinking=True)
    assert ask.messages[2]["content"] == prompt
    bare, _, _ = openai.read_chat(body, settings=Settings(), model="m", joins_thinking=False)
    assert bare.messages[2]["content"] == content
