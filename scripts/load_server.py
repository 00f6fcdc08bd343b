"""Put a server under load and look for what stays behind, and for answers that are not the engine's.

    python scripts/load_server.py [--model DIR] [--connections N] [--slow N] [--requests N]

1. Opens and drops connections, half of them within a request; then threads, sockets and rows must be as before.
2. Clients that send or read a byte a second, beside others whose answers must come and be right; the server must have
   closed the slow ones within two minutes.
3. Sends requests of seven interfaces with known seeds from 8 threads and leaves a third of them midway; every answer
   that comes must be the text that `Reasoner.generate` writes for that seed, and no row may stay taken.

Prints counts on stdout; the exit code is 1 where something stayed behind or an answer differed.

Does not: run for hours (`soak_server.py`), measure speed (`measure_server.py`), or kill (`kill_server.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "serve")]

from interfaces import INTERFACES, RUNS, Question, asked, told  # noqa: E402 - the paths must be set first
from serving import Served, started, until  # noqa: E402
from tally import Tally  # noqa: E402

from qwq_mlx.default_model import ready_model  # noqa: E402
from qwq_mlx.generate.reasoner import Reasoner, load  # noqa: E402
from qwq_mlx.options import Limits, Sampling  # noqa: E402
from qwq_mlx.serve.settings import Settings  # noqa: E402

QUESTIONS = ("What is 3 + 4?", "How many r in strawberry.", "What is 12 * 3?")
_SLOW_S = 60.0  # after which the server is to have closed a slow client, twice, for a busy machine
_THREADS = 8
_MAX_TOKENS = 40
_WIDTH = 7  # on the CPU, from 8 rows on passes are multiplied otherwise, so near-ties may fall otherwise


class Case(NamedTuple):
    """A question, and what the engine writes for it."""

    question: Question
    thinking: str
    answer: str
    text: str


def cases(reasoner: Reasoner, n_seeds: int) -> list[Case]:
    """Every question with every seed, without a draw, and with a penalty."""
    limits, known = Limits(max_tokens=_MAX_TOKENS), []
    for text in QUESTIONS:
        for seed, penalty in [(None, None), (0, 1.2), *((seed, None) for seed in range(n_seeds))]:
            temperature = 0.0 if seed is None else 1.0
            sampling = Sampling(seed=seed, temperature=temperature, repetition_penalty=penalty)
            trace = reasoner.generate(text, sampling=sampling, limits=limits)
            question = Question(text, _MAX_TOKENS, seed, penalty)
            known.append(Case(question, trace.thinking, trace.conclusion, trace.text))
    return known


def state() -> dict[str, int]:
    """What may stay behind in this process."""
    status = Path("/proc/self/status")
    rss = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS")), "0")
    files = Path("/proc/self/fd")
    return {"threads": threading.active_count(), "files": len(list(files.iterdir())), "rss_kb": int(rss)}


def drop_connections(served: Served, n: int, tally: Tally) -> None:
    """Part 1. As many are dropped before, until pools of threads and buffers have their size."""
    tally.begin("connections")
    for number in range(n):
        _drop_one(served, number)
    until(lambda: served.is_idle)
    before = state()
    for number in tally.until("dropped", n):
        _drop_one(served, number)
        tally["dropped"] += 1
    until(lambda: served.is_idle)
    time.sleep(1.0)  # the sockets' ends close behind the rows
    after = state()
    print(f"before {before}, after {after}", file=sys.stderr)
    tally["STAYED BEHIND"] += after["threads"] > before["threads"] or after["files"] > before["files"] + 2
    tally["kB of memory more"] = max(0, after["rss_kb"] - before["rss_kb"])
    tally.end()


def _drop_one(served: Served, number: int) -> None:
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 1.0}
    connection = served.connect()
    if number % 2:
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": number % 4 == 1}))
        if number % 4 == 1:
            connection.getresponse().close()
    else:
        connection.connect()
    connection.close()


def slow_clients(served: Served, known: list[Case], n: int, tally: Tally) -> None:
    """Part 2."""
    tally.begin("slow clients")
    name = _name(served)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "n": 4, "stream": True, "logprobs": True})
    reader = b"\r\n".join([*head.split(b"\r\n")[:2], b"Content-Length: %d" % len(body), b"", body.encode()])
    begins = (head, head + b"\r\n{", reader)  # a head without end, a body without end, an answer that nobody takes
    is_over = threading.Event()
    for number in range(n):
        _slow_client(served, begins[number % 3], is_over, sends=number % 3 < 2)
    until(lambda: len(_connections(served)) >= n)
    for _ in range(2):
        for case in known:
            tally[_ask(served, name, case, "chat", leaves=False)] += 1
    end = time.monotonic() + 2 * _SLOW_S
    while time.monotonic() < end and _connections(served):
        time.sleep(0.1)
    tally["STILL OPEN"] = len(_connections(served))
    tally["closed"] = n - tally["STILL OPEN"]
    is_over.set()
    until(lambda: served.is_idle)
    tally.end()


def _connections(served: Served) -> set[Any]:
    """Those that the server holds; what the system still has to deliver of closed ones is not its own."""
    return set(served.server._http._server.server_state.connections)


def _slow_client(served: Served, begin: bytes, is_over: threading.Event, *, sends: bool) -> None:
    """A client in a thread that begins a request and goes on with a byte a second until it is over."""

    def run() -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.settimeout(30.0)
            with contextlib.suppress(OSError):
                connection.connect((served.host, served.port))
                connection.sendall(begin)
                while not is_over.wait(1.0):
                    if sends:
                        connection.sendall(b" ")
                    elif not connection.recv(1):
                        return

    threading.Thread(target=run, daemon=True).start()


def _name(served: Served) -> str:
    return str(served.get("/v1/models")["data"][0]["id"])


def _ask(served: Served, name: str, case: Case, interface: str, leaves: bool) -> str:
    """What became of one request: "right", "WRONG", "left" or "turned away"."""
    path, body = asked(interface, name, case.question)
    connection = served.connect()
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True} if leaves and path != RUNS else body))
        if leaves:
            time.sleep(random.random() * 0.3)
            return "left"
        response = connection.getresponse()
        raw = response.read()
        if response.status == 429:
            return "turned away"
        if interface == "run":
            run = json.loads(raw)["id"]
            connection.request("GET", f"{RUNS}/{run}/steps")
            raw = connection.getresponse().read()
    finally:
        connection.close()
    if response.status >= 300:
        return f"STATUS {response.status}"
    thinking, answer = told(interface, raw)
    expected = case.text if interface == "run" else case.answer
    return "right" if answer == expected and thinking in (None, case.thinking) else "WRONG"


def mix(served: Served, known: list[Case], n: int, tally: Tally) -> None:
    """Part 3."""
    tally.begin("mixed requests")
    choose, name = random.Random(1), _name(served)
    pairs = [(case, interface) for case in known for interface in INTERFACES if case.question.has(interface)]
    jobs = [(*choose.choice(pairs), number % 3 == 0) for number in range(n)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for outcome in pool.map(lambda job: _ask(served, name, *job), jobs):
            tally[outcome] += 1
    until(lambda: served.is_idle)
    tally.end()


def main() -> int:
    """Run the three parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder (default: as the commands)")
    parser.add_argument("--connections", type=int, default=200, metavar="N")
    parser.add_argument("--slow", type=int, default=60, metavar="N", help="slow clients")
    parser.add_argument("--requests", type=int, default=1_000, metavar="N")
    options = parser.parse_args()
    folder, tally = ready_model(options.model), Tally(every=100)
    known = cases(load(folder), n_seeds=4)
    if options.connections:  # without caches that are kept, which are more memory
        with started(lambda: load(folder), Settings(port=0, width=_WIDTH, queue=64, prefixes=0)) as served:
            drop_connections(served, options.connections, tally)
    with started(lambda: load(folder), Settings(port=0, width=_WIDTH, queue=64)) as served:
        if options.slow:
            slow_clients(served, known, options.slow, tally)
        if options.requests:
            mix(served, known, options.requests, tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
