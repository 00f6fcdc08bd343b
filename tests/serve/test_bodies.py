"""Bodies that are no request: each gets a status of 4xx with a sentence, and the server goes on."""

from __future__ import annotations

import json
import socket

import pytest
from serving import CHAT, Served, until, user

from qwq_mlx.serve.body import dumped
from qwq_mlx.serve.dialects import ollama_models
from qwq_mlx.serve.model_card import ModelCard
from qwq_mlx.serve.settings import Settings

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, b"no JSON"),
        (b"{", 400, b"no JSON"),
        (b"\xff\xfe", 400, b"no JSON"),
        (b"[]", 400, b"a list, expected a JSON object"),
        (b"null", 400, b"null, expected a JSON object"),
        (b'{"messages": NaN}', 400, b"NaN is no JSON number"),
        (b'{"seed": ' + b"1" * 5_000 + b"}", 400, b"no JSON"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, 400, b"deeper than 32"),
        (b"[" * 100_000 + b"]" * 100_000, 400, b"deeper than 32"),
        (b'{"messages": "x"}', 400, b"expected a list"),
        (b'{"messages": [1]}', 400, b"messages[0] is a number, expected an object"),
        (b'{"messages": [{}]}', 400, b"messages[0].role is missing"),
        (b'{"messages": [{"role": "user", "content": {"a": 1}}]}', 400, b"messages[0].content is no text"),
    ],
    ids=range(13),
)
def test_what_is_no_request_is_told_so(tiny_server: Served, body: bytes, status: int, said: bytes) -> None:
    got, headers, raw = tiny_server.send("POST", CHAT, body)
    assert got == status and said in raw and headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/chat/completions", "openai"),
        ("/v1/completions", "openai"),
        ("/v1/responses", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/api/chat", "ollama"),
        ("/api/generate", "ollama"),
        ("/api/show", "ollama"),
        ("/api/qwq/runs", "ollama"),
    ],
)
@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a":' * 60 + b"1" + b"}" * 60, b'{"model": 1}', b'{"no_such": 1}'])
def test_each_interface_says_it_in_its_own_form(tiny_server: Served, path: str, form: str, body: bytes) -> None:
    status, _, raw = tiny_server.send("POST", path, body)
    told = json.loads(raw)
    assert status == 400 and isinstance(told["error"], str if form == "ollama" else dict)
    if form != "ollama":
        assert set(told["error"]) == ({"message", "type", "param", "code"} if form == "openai" else {"message", "type"})
        assert told["error"]["type"] == "invalid_request_error" and told.get("type") == (
            "error" if form == "anthropic" else None
        )


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(tiny_server: Served) -> None:
    limit = Settings().body_bytes
    with socket.create_connection((tiny_server.host, tiny_server.port), timeout=30) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), limit + 1)
        )
        assert connection.recv(1_000).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection((tiny_server.host, tiny_server.port), timeout=30) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
        part = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
        for _ in range(limit // (1 << 20) + 1):
            connection.sendall(part)
        assert connection.recv(1_000).startswith(b"HTTP/1.1 413 ")


def test_head_options_and_other_paths(tiny_server: Served) -> None:
    assert tiny_server.send("HEAD", "/v1/models")[0] == 200
    assert tiny_server.send("OPTIONS", CHAT)[0] == 204
    status, headers, _ = tiny_server.send("GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    status, _, raw = tiny_server.send("GET", "/v1/nothing")
    assert status == 404 and b'"code":"not_found"' in raw


def test_the_log_holds_paths_and_no_prompts(tiny_server: Served) -> None:
    tiny_server.post(CHAT, user("a secret sentence", max_tokens=1))
    until(lambda: tiny_server.log[-1].startswith("POST '/v1/chat/completions' 200 "))
    assert not any("secret" in line for line in tiny_server.log)


def test_a_fault_is_logged_with_its_place_and_without_its_text(
    tiny_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "a secret sentence"

    def failing(card: ModelCard) -> None:
        raise KeyError(question)

    monkeypatch.setattr(ollama_models, "tags", failing)
    status, _, raw = tiny_server.send("GET", "/api/tags")
    assert (status, raw) == (500, b'{"error":"Internal error: KeyError."}')
    until(lambda: tiny_server.log[-1].startswith("GET '/api/tags' 500 "))
    [fault] = [line for line in tiny_server.log if line.startswith("internal error: KeyError in")]
    assert "in failing" in fault and question not in fault


def test_a_stream_never_cuts_a_character(tiny_server: Served) -> None:
    """Random ids write halves of characters all the time; a half that was sent would be another character."""
    n_beyond_ascii = 0
    for seed in range(4):
        body = {"prompt": "数🙂", "seed": seed, "temperature": 2, "max_tokens": 40}
        [choice] = tiny_server.post("/v1/completions", body)["choices"]
        texts = [chunk["choices"][0]["text"] for chunk in tiny_server.chunks("/v1/completions", body)]
        assert "".join(texts) == choice["text"] and len(texts) > 10
        n_beyond_ascii += sum(not character.isascii() and character != "\ufffd" for character in choice["text"])
    assert n_beyond_ascii


def test_numbers_that_json_has_not_become_null() -> None:
    assert dumped({"a": [1.5, float("inf"), (float("nan"), "\ud800")]}) == r'{"a":[1.5,null,[null,"\ud800"]]}'
