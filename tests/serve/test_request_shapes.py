"""Requests as clients send them that cannot be installed here, by their source and documentation: Open WebUI, Zed,
LibreChat, Page Assist and others. Each is taken as it is, with its Origin, and its own rule finds the thinking once.
"""

from __future__ import annotations

from typing import Any

import pytest
from serving import CHAT, QUESTION, Served, user

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Sampling
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


EXTENSION = "chrome-extension://jfgfiigpkhlkbnfnbobbkinehhfdhndo"  # Page Assist's, in Chrome's store
VISITS: list[tuple[str, str | None, str, str, dict[str, Any] | None, int]] = [
    ("Open WebUI", None, "GET", "/v1/models", None, 200),
    ("Open WebUI", None, "GET", "/api/version", None, 200),
    ("Open WebUI, from the browser", "http://localhost:3000", "GET", "/api/tags", None, 200),
    ("Open WebUI", None, "POST", "/api/show", {"name": "tiny"}, 200),
    ("LibreChat", None, "GET", "/v1/models", None, 200),
    ("Zed", None, "GET", "/api/tags", None, 200),
    ("Zed", None, "POST", "/api/show", {"model": "tiny:latest"}, 200),
    ("Page Assist, before --allow-origin", EXTENSION, "GET", "/api/tags", None, 403),
    ("Page Assist, asking the browser", EXTENSION, "OPTIONS", "/api/chat", None, 403),
    ("Obsidian", "app://obsidian.md", "OPTIONS", CHAT, None, 204),
    ("Obsidian", "app://obsidian.md", "POST", CHAT, user("x", model="tiny", max_tokens=1), 200),
    ("VS Code", "vscode-webview://1b2c", "GET", "/api/ps", None, 200),
    ("Msty", "tauri://localhost", "GET", "/api/tags", None, 200),
    ("a page in the web", "https://evil.example", "POST", CHAT, user("x"), 403),
]


@pytest.mark.tiny
@pytest.mark.parametrize(("client", "origin", "method", "path", "body", "status"), VISITS)
def test_who_comes_by_which_origin(
    tiny_server: Served, client: str, origin: str | None, method: str, path: str, body: Any, status: int
) -> None:
    sent = {"authorization": "Bearer sk-none", "content-type": "application/json", "user-agent": client}
    got, headers, raw = tiny_server.send(method, path, body, sent if origin is None else {**sent, "origin": origin})
    assert got == status, raw
    assert headers.get("access-control-allow-origin") == (None if status == 403 else origin)


@pytest.mark.pocket
@pytest.mark.parametrize(
    "fields",
    [("reasoning_content", "reasoning", "thinking"), ("reasoning",)],
    ids=["Open WebUI", "LibreChat with reasoningKey"],
)
def test_the_first_field_that_a_client_looks_at_has_the_thinking_once(
    pocket_server: Served, pocket_reasoner: Reasoner, fields: tuple[str, ...]
) -> None:
    trace = pocket_reasoner.generate(QUESTION, sampling=Sampling(temperature=0))
    body = {"model": "pocket", "temperature": 0, "stream_options": {"include_usage": True}}
    thinking = answer = ""
    for chunk in pocket_server.chunks(CHAT, user(**body)):
        for choice in chunk["choices"]:
            thinking += next((choice["delta"][name] for name in fields if choice["delta"].get(name)), "")
            answer += choice["delta"].get("content") or ""
    assert (thinking, answer) == (trace.thinking, trace.conclusion)
