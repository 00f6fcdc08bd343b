"""Send bodies and headers to a server that no client would, and look for a status of 500 or a server that is gone.

    python scripts/fuzz_server.py [--bodies N] [--headers N] [--seed N] [--budget SECONDS]

Starts a server of a random two-layer model on loopback. Bodies are good ones of every interface with values exchanged,
fields renamed, nested, repeated, cut, or with bytes changed; header sets are good ones with names, values and bytes
changed. Each answer must be a status below 500 (501 for what is not built; 0 is a set of headers after which the server
closed or waits for more), and the server must answer after all. Prints the counts by status; the first input that
breaks a promise is shown and the exit code is 1.

Does not: look for slow inputs, or follow streams to their end (the client leaves, which is part of the test).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

if TYPE_CHECKING:
    from serving import Served

from tally import Tally, add_budget  # noqa: E402 - the paths must be set first

_EVERY = 1_000  # inputs between two lines
_RUN_FOR = 1_000  # inputs that name one run, before the history has forgotten it
_MESSAGES: list[Any] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
]
SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": _MESSAGES,
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 1,
            "stop": ["a", "b"],
            "n": 1,
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": -1},
            "stream_options": {"include_usage": True},
            "reasoning": {"effort": "low", "max_tokens": 4, "exclude": False},
            "user": "u",
            "tools": [],
            "response_format": {"type": "text"},
        },
    ),
    ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 2, "logprobs": 1, "stop": "q", "echo": False}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1}),
    (
        "/v1/responses",
        {
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}],
            "max_output_tokens": 2,
            "reasoning": {"effort": "low", "summary": "auto"},
            "include": ["reasoning.encrypted_content"],
            "text": {"format": {"type": "text"}},
        },
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 3,
            "messages": _MESSAGES[1:],
            "system": [{"type": "text", "text": "s"}],
            "thinking": {"type": "enabled", "budget_tokens": 2},
            "stop_sequences": ["q"],
            "top_k": 4,
        },
    ),
    ("/v1/messages/count_tokens", {"messages": _MESSAGES[1:]}),
    (
        "/api/chat",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x", "images": []}],
            "options": {"num_predict": 2, "num_ctx": 64, "stop": ["q"], "repeat_penalty": 1.1},
            "think": True,
            "keep_alive": "5m",
        },
    ),
    ("/api/generate", {"model": "tiny", "prompt": "x", "system": "s", "options": {"num_predict": 1}, "stream": False}),
    ("/api/show", {"model": "tiny", "verbose": True}),
    ("/api/qwq/runs", {"question": "x", "max_tokens": 2, "think_tokens": 1, "alternatives": 2, "on_loop": "stop"}),
    ("/api/qwq/runs/{run}/fork", {"at": 1, "seed": 2}),
    ("/api/qwq/runs/{run}/vote", {"n": 2, "at": 1}),
    ("/api/qwq/runs/{run}/resume", {"max_tokens": 3, "context": 64, "answer_now": True}),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *(
        "",
        "x",
        "\ud800",
        "\u0000",
        "<|im_end|>",
        "数",
        "🙂" * 3,
        "a" * 5_000,
        "auto",
        "none",
        "user",
        "tool",
        "assistant",
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        ["x"],
        {"type": "text"},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9"}},
    ),
    *([1] * 50, {"a": {"b": {"c": {"d": {}}}}}),
)
_NAMES = (
    *("", "model", "messages", "stream", "n", "content", "role", "type", "options", "__class__"),
    *("\ud800", "n\u0000", "x" * 300),
)
_BYTES = [*rb'||"|\|{|}|[|]|,|\ud800|1e999|NaN|-'.split(b"|"), b"\x00", b"\xff", b"\n", b"\xf0\x9f"]
_NUMBERS = [*b"0|1|-1|5||x|1.5|%00|%F0|1&limit=2|' OR 1=1 --|\xd9\xa3".split(b"|"), b"9" * 30]
_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"Host", b"127.0.0.1"),
    (b"Content-Type", b"application/json"),
    (b"Authorization", b"Bearer x"),
    (b"Origin", b"http://localhost:3000"),
    (b"X-Api-Key", b"k"),
    (b"Accept", b"text/event-stream"),
    (b"Anthropic-Version", b"2023-06-01"),
)
_HEADER_VALUES = (
    *(
        b"",
        b" ",
        b"evil.example",
        b"[::1",
        b"127.0.0.1:99999",
        b"localhost:",
        b"null",
        b"-1",
        b"\xff\xfe",
        b"a" * 9_000,
    ),
    *(b"Bearer", b"Basic eA==", b"http://[", b"app://x", b"gzip", b"chunked", b"1, 2", b"\t", b"100-continue", b"\x00"),
)
_HEADER_NAMES = b"Host|Origin|Content-Length|Transfer-Encoding|Expect|Upgrade|X y||Connection".split(b"|")


def body(choose: random.Random, run: str = "run-0") -> tuple[str, bytes]:
    """A path and a body that was good once. run: the id of one there is."""
    path, seed = choose.choice(SEEDS)
    path = path.format(run=run)
    value = json.loads(json.dumps(seed))
    if choose.random() < 0.3:
        value["stream"] = choose.choice((True, False))
    for _ in range(choose.choice((1, 1, 1, 2, 3, 4))):  # more than one seldom come through to the model
        _mutate(value, choose)
    raw = json.dumps(value).encode()
    if choose.random() < 0.3:
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(len(raw) + 1)
            raw = raw[:at] + choose.choice(_BYTES) + raw[at + choose.randint(0, 3) :]
    return path, raw


def _mutate(value: Any, choose: random.Random) -> None:
    """One change somewhere in an object, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = choose.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and choose.random() < 0.6:
            value = value[key]
            continue
        break
    kind = choose.randrange(5)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[choose.choice(_NAMES)] = value.pop(key)
    elif kind == 2 and isinstance(value, list):
        value += [value[key]] * choose.randint(1, 20)
    elif kind == 3:
        for _ in range(choose.choice((1, 5, 40))):
            value[key] = choose.choice(([value[key]], {"a": value[key]}))
    else:
        value[key] = copy.deepcopy(choose.choice(_VALUES))


def head(choose: random.Random, run: str = "run-0") -> bytes:
    """A request line with headers, and a body that may not be as long as they say. run: the id of one there is."""
    path, seed = choose.choice(SEEDS)
    path = path.format(run=run)
    content = json.dumps(seed).encode()
    headers = [*_HEADERS, (b"Content-Length", b"%d" % len(content))]
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(headers))
        kind = choose.randrange(4)
        if kind == 0:
            del headers[at]
        elif kind == 1:
            headers[at] = (headers[at][0], choose.choice(_HEADER_VALUES))
        elif kind == 2:
            headers.append((choose.choice(_HEADER_NAMES), choose.choice(_HEADER_VALUES)))
        else:
            headers.append(headers[at])
    method = choose.choice((b"POST", b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"X", b""))
    runs, number = b"/api/qwq/runs", choose.choice(_NUMBERS)
    target = choose.choice(
        (
            *(path.encode(), path.encode(), b"/", b"*", b"//", b"/%ff", b"/v1/models/%00", b"http://x/", b"/v1/\xff"),
            *(runs + b"?limit=" + number, runs + b"?offset=" + number, runs + b"?parent=" + number),
            *(runs + b"/" + number, runs + b"/" + run.encode() + b"/steps?wait=0&from=" + number),
        )
    )
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return method + b" " + target + b" HTTP/1.1\r\nConnection: close\r\n" + lines + b"\r\n" + content


def request(path: str, content: bytes) -> bytes:
    """A body as a request."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def status_of(host: str, port: int, raw: bytes, *, timeout_s: float = 20.0) -> int:
    """The status of the answer to these bytes; 0 where the server closed, or waits for more of them so long."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        try:
            connection.sendall(raw)
            line = connection.recv(64)
        except (ConnectionError, TimeoutError):
            return 0
    return int(line.split(b" ")[1]) if line.startswith(b"HTTP/1.1 ") else 0


def is_kept(status: int) -> bool:
    """Whether a server may say this."""
    return status < 500 or status == 501


def main() -> int:
    """Fuzz; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=10_000, metavar="N")
    parser.add_argument("--headers", type=int, default=1_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    add_budget(parser)
    options = parser.parse_args()

    tally = Tally(options.budget, _EVERY).stop_at_interrupt()
    with tempfile.TemporaryDirectory() as temporary, _tiny_server(Path(temporary)) as served:
        for part, n in (("bodies", options.bodies), ("headers", options.headers)):
            choose, run = random.Random(options.seed), ""
            tally.begin(part)
            for number in tally.until("sent", n):
                if number % _RUN_FOR == 0:
                    run = served.post("/api/qwq/runs", {"question": "x", "max_tokens": 3}, status=201)["id"]
                is_body = part == "bodies"
                raw = request(*body(choose, run)) if is_body else head(choose, run)
                status = status_of(served.host, served.port, raw, timeout_s=20.0 if is_body else 0.5)
                tally["sent"] += 1
                tally[f"status {status}" if is_kept(status) and (status or not is_body) else "NO ANSWER"] += 1
                if tally["NO ANSWER"]:
                    print(f"status {status}: {raw[:3_000]!r}", file=sys.stderr)
                    break
            tally.end()
        served.get("/health")
    return tally.finish()


@contextmanager
def _tiny_server(folder: Path) -> Iterator[Served]:
    """A server of a random two-layer model, with a history and a folder of saved runs."""
    from checkpoints import write_tiny_checkpoint
    from serving import started

    from qwq_mlx.generate.reasoner import load
    from qwq_mlx.pocket import FOLDER
    from qwq_mlx.serve.history import History
    from qwq_mlx.serve.settings import Settings

    model = write_tiny_checkpoint(folder / "tiny")
    own = json.loads((FOLDER / "tokenizer_config.json").read_text())
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": own["chat_template"]}))
    settings = Settings(port=0, name="tiny", runs_folder=folder)
    history = History(folder / "history.sqlite3", max_bytes=settings.history_bytes)
    with started(lambda: load(model), settings, history=history) as served:
        yield served


if __name__ == "__main__":
    sys.exit(main())
