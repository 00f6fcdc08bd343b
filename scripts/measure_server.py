"""How fast a server is for many clients at once, beside mlx_lm.server with the same weights.

    python scripts/measure_server.py [--model DIR] [--clients 1 4 8 16] [--tokens N] [--words N] [--peer]

For each number of clients: tokens a second of all together, tokens a second of the server's CPU time, the median time
to the first text (all begin at once), and the longest gap between two texts of a stream while a long prompt of another
client is fed. The server runs in a process of its own, as its peer does, so that the clients take no time of its
interpreter.

Does not: measure a busy machine truly (run it alone; of the CPU time a busy one says more), or the network.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "serve")]

from serving import free_port, until  # noqa: E402 - the paths must be set first

from qwq_mlx.default_model import ready_model  # noqa: E402

_NAME = "measured"
_START_S = 180.0  # a busy machine takes its time


class Rates(NamedTuple):
    """Tokens of all clients together, by second and CPU second; seconds to the first text (median); the longest gap."""

    tok_s: float
    tok_cpu_s: float
    first_s: float
    gap_s: float


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since it began, user and system."""
    ticks = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def rates(pid: int, port: int, model: str, n_clients: int, *, n_tokens: int, n_words: int) -> Rates:
    """For so many clients; beside them one long prompt is fed once all write."""
    times: list[list[float]] = [[] for _ in range(n_clients)]
    n_written = [0] * n_clients

    def client(number: int) -> None:
        question = f"Write {n_tokens + number} words."
        n_written[number] = _stream(port, model, question, n_tokens, times[number])

    began, began_cpu = time.monotonic(), cpu_seconds(pid)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    for each in threads:
        each.start()
    while not all(len(each) >= 3 for each in times) and any(each.is_alive() for each in threads):
        time.sleep(0.01)
    _stream(port, model, "word " * n_words, 1, [])
    for each in threads:
        each.join()
    end = max(each[-1] for each in times)
    firsts = sorted(each[0] - began for each in times)
    gap = max(late - early for each in times for early, late in itertools.pairwise(each))
    n = sum(n_written)
    return Rates(n / (end - began), n / (cpu_seconds(pid) - began_cpu), firsts[len(firsts) // 2], gap)


def _stream(port: int, model: str, question: str, max_tokens: int, times: list[float]) -> int:
    """Note when each text of a stream comes; returns the tokens of its usage."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    n_tokens = 0
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        n_tokens = (chunk.get("usage") or {}).get("completion_tokens", n_tokens)
        delta = (chunk["choices"] or [{}])[0].get("delta", {})
        if delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"):
            times.append(time.monotonic())
    connection.close()
    return n_tokens


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a server, a module with its arguments, until the block ends; yields it and its port once it is ready."""
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _answers(port), within_s=_START_S)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _show(name: str, measure: Callable[[int], Rates], clients: list[int]) -> None:
    measure(clients[0])  # the first compiles and fills pools
    for n in clients:
        got = measure(n)
        print(
            f"{name}, {n} clients: {got.tok_s:,.1f} tok/s together, {got.tok_cpu_s:,.1f} a CPU second, "
            f"first text after {got.first_s:.2f} s (median), longest gap {got.gap_s:.2f} s",
            flush=True,
        )


def main() -> int:
    """Measure both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder (default: as the commands)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="of each client")
    parser.add_argument("--words", type=int, default=300, metavar="N", help="of the long prompt")
    parser.add_argument("--peer", action="store_true", help="measure mlx_lm.server as well")
    options = parser.parse_args()
    folder = str(ready_model(options.model))
    sizes = {"n_tokens": options.tokens, "n_words": options.words}
    own = ["qwq_mlx.serve", "--model", folder, "--name", _NAME, "--quiet", "--no-history", "--prefixes", "0"]
    width = max(options.clients) + 1  # so that the long prompt waits for no row
    with running(*own, "--width", str(width)) as (server, port):
        _show("qwq_mlx.serve", lambda n: rates(server.pid, port, _NAME, n, **sizes), options.clients)
    if options.peer:
        with running("mlx_lm", "server", "--model", folder) as (server, port):
            _show("mlx_lm.server", lambda n: rates(server.pid, port, folder, n, **sizes), options.clients)
    return 0


if __name__ == "__main__":
    sys.exit(main())
