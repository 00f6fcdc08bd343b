"""Who is let in: Host, Origin and key, on the application alone, without a socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from qwq_mlx.errors import OptionError
from qwq_mlx.serve.security import Doors
from qwq_mlx.serve.settings import Settings

LOCAL = ("host", "127.0.0.1:8080")


def ask(
    *headers: tuple[str, str], settings: Settings | None = None, path: str = "/v1/models", method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer behind the doors, which is "in" where they open."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    log: list[str] = []
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "scheme": "http"}
    doors = Doors(PlainTextResponse("in"), settings=settings or Settings(), log=log.append)
    asyncio.run(doors(scope, receive, send))
    assert len(log) == 1
    own = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], own, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("host", "is_in"),
    [
        ("127.0.0.1:8080", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("a.localhost:8080", True),
        ("mac.local", True),
        ("192.168.1.5:8080", True),
        ("[::1]:8080", True),
        ("my.example:1", True),
        ("", False),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("localhost@evil.example", False),
        ("evil.example/localhost", False),
        ("localhost:x", False),
        ("[::1", False),
        (" localhost", False),
    ],
)
def test_a_host_that_is_no_name_of_this_machine_stays_outside(host: str, is_in: bool) -> None:
    status, _, body = ask(("host", host), settings=Settings(allowed_hosts=("my.example",)))
    assert (status == 200) is is_in and (is_in or b"host_not_allowed" in body)


def test_a_host_that_is_missing_or_there_twice_stays_outside() -> None:
    assert ask()[0] == 403 and ask(LOCAL, ("host", "localhost"))[0] == 403


@pytest.mark.parametrize(
    ("origin", "is_in"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("https://[::1]:1", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://abc", True),
        ("https://ok.example", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://192.168.1.5", False),
        ("null", False),
        ("", False),
        ("http://[::1", False),
        ("chrome-extension://abc", False),
    ],
)
def test_pages_of_others_stay_outside_and_those_of_this_machine_may_read(origin: str, is_in: bool) -> None:
    settings = Settings(allowed_origins=("https://ok.example",))
    status, headers, _ = ask(LOCAL, ("origin", origin), settings=settings)
    assert (status == 200) is is_in
    assert headers.get("access-control-allow-origin") == (origin if is_in else None)


@pytest.mark.parametrize(
    ("host", "origin", "api_key", "is_in"),
    [
        ("192.168.1.5:8080", "http://192.168.1.5:8080", None, True),
        ("[fd00::1]:8080", "http://[fd00::1]:8080", None, True),
        ("my.example", "https://my.example", None, True),
        ("mac.local:8080", "http://mac.local:8080", "secret", True),
        ("evil.local:8080", "http://evil.local:8080", None, False),
        ("192.168.1.5:8080", "http://192.168.1.5:3000", None, False),
        ("192.168.1.5:8080", "http://192.168.1.6:8080", "secret", False),
    ],
)
def test_the_servers_own_page_may_ask_at_any_of_its_addresses(
    host: str, origin: str, api_key: str | None, is_in: bool
) -> None:
    settings = Settings(allowed_hosts=("my.example",), api_key=api_key)
    sent = (("host", host), ("origin", origin), ("x-api-key", api_key or ""))
    assert (ask(*sent, settings=settings, method="POST")[0] == 200) is is_in


def test_a_preflight_needs_no_key_and_says_what_is_allowed() -> None:
    asked = (
        LOCAL,
        ("origin", "app://x"),
        ("access-control-request-headers", "authorization,content-type"),
        ("access-control-request-private-network", "true"),
    )
    status, headers, _ = ask(*asked, settings=Settings(api_key="secret"), method="OPTIONS", path="/v1/messages")
    assert status == 204 and headers["access-control-allow-headers"] == "authorization,content-type"
    assert headers["access-control-allow-private-network"] == "true"
    assert "POST" in headers["access-control-allow-methods"] and headers["vary"] == "Origin"
    assert ask(LOCAL, ("origin", "https://evil.example"), method="OPTIONS")[0] == 403


@pytest.mark.parametrize(
    ("header", "is_in"),
    [
        (("authorization", "Bearer secret"), True),
        (("authorization", "bearer  secret"), True),
        (("x-api-key", "secret"), True),
        (("authorization", "Basic secret"), False),
        (("authorization", "Bearer "), False),
        (("authorization", "Bearer secre"), False),
        (("x-api-key", "s\xe9cret"), False),
        (("x-other", "secret"), False),
    ],
)
def test_a_key_opens_by_either_header(header: tuple[str, str], is_in: bool) -> None:
    settings = Settings(host="0.0.0.0", api_key="secret")
    status, headers, _ = ask(LOCAL, header, settings=settings)
    assert status == (200 if is_in else 401) and headers.get("www-authenticate") == (None if is_in else "Bearer")
    assert ask(LOCAL, settings=settings, path="/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models", {"message", "type", "param", "code"}),
        ("/v1/messages", {"type", "message"}),
    ],
)
def test_a_refusal_has_the_form_of_the_clients_path(path: str, expected: set[str]) -> None:
    body = json.loads(ask(("host", "evil.example"), path=path)[2])
    assert set(body["error"]) == expected
    assert isinstance(json.loads(ask(("host", "evil.example"), path="/api/tags")[2])["error"], str)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(OptionError, match="api_key"):
        Settings(host=host)
    assert Settings(host=host, api_key="k").host == host
    with pytest.raises(OptionError, match="api_key is empty"):
        Settings(host=host, api_key=" ")
