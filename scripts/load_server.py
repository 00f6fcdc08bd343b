"""Put a server under load and look for what stays behind: connections, mixed requests, and how fast many clients are.

    python scripts/load_server.py [--model DIR] [--connections N] [--requests N] [--clients 1 4 8] [--peer]

1. Opens and drops connections, half of them within a request; then threads, sockets and rows must be as before.
2. Sends requests of two interfaces with known seeds from 8 threads and leaves a third of them midway; every answer
   that comes must be the text that `Reasoner.generate` writes for that seed, and no row may stay taken.
3. Measures tokens a second of 1, 4 and 8 clients, their time to the first text, and the longest gap between two texts
   of a stream while another client's long prompt is fed. --peer measures mlx_lm.server with the same weights as well.

Prints counts and figures on stdout; the exit code is 1 where something stayed behind or an answer differed.

Does not: run for hours (repeat it), or measure the network.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "serve")]

from serving import Served, free_port, started, until  # noqa: E402 - the paths must be set first
from tally import Tally  # noqa: E402

from qwq_mlx.default_model import ready_model  # noqa: E402
from qwq_mlx.generate.reasoner import Reasoner, load  # noqa: E402
from qwq_mlx.options import Limits, Sampling  # noqa: E402
from qwq_mlx.serve.settings import Settings  # noqa: E402

QUESTIONS = ("What is 3 + 4?", "How many r in strawberry.", "What is 12 * 3?")
_THREADS = 8
_MAX_TOKENS = 40
_WIDTH = 7  # on the CPU, from 8 rows on passes are multiplied otherwise, so near-ties may fall otherwise


class Case(NamedTuple):
    """A question with its seed, and the text that the engine writes for it."""

    question: str
    seed: int
    thinking: str
    answer: str


def cases(reasoner: Reasoner, n_seeds: int) -> list[Case]:
    """Every question with every seed."""
    limits, known = Limits(max_tokens=_MAX_TOKENS), []
    for question in QUESTIONS:
        for seed in range(n_seeds):
            trace = reasoner.generate(question, sampling=Sampling(seed=seed, temperature=1.0), limits=limits)
            known.append(Case(question, seed, trace.thinking, trace.conclusion))
    return known


def state() -> dict[str, int]:
    """What may stay behind in this process."""
    status = Path("/proc/self/status")
    rss = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS")), "0")
    files = Path("/proc/self/fd")
    return {"threads": threading.active_count(), "files": len(list(files.iterdir())), "rss_kb": int(rss)}


def drop_connections(served: Served, n: int, tally: Tally) -> None:
    """Part 1."""
    tally.begin("connections")
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 1.0}
    before: dict[str, int] = {}
    for number in tally.until("dropped", n):
        connection = served.connect()
        if number % 2:
            connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": number % 4 == 1}))
            if number % 4 == 1:
                connection.getresponse().close()
        else:
            connection.connect()
        connection.close()
        tally["dropped"] += 1
        if number == min(20, n // 2):  # the pools of threads and buffers have their size by then
            until(lambda: served.is_idle)
            before = state()
    until(lambda: served.is_idle)
    time.sleep(1.0)  # the sockets' ends close behind the rows
    after = state()
    print(f"before {before}, after {after}", file=sys.stderr)
    tally["STAYED BEHIND"] += after["threads"] > before["threads"] or after["files"] > before["files"] + 2
    tally["kB of memory more"] = max(0, after["rss_kb"] - before["rss_kb"])
    tally.end()


def _ask(served: Served, case: Case, interface: str, leaves: bool) -> str:
    """What became of one request: "right", "WRONG" or "left"."""
    messages = [{"role": "user", "content": case.question}]
    common: dict[str, Any] = {"temperature": 1.0, "seed": case.seed}
    path, body = "/v1/chat/completions", {"messages": messages, "max_tokens": _MAX_TOKENS, **common}
    if interface == "ollama":
        path = "/api/chat"
        body = {"model": served.get("/v1/models")["data"][0]["id"], "messages": messages, "stream": leaves}
        body["options"] = {**common, "num_predict": _MAX_TOKENS}
    elif interface == "stream":
        body["stream"] = True
    connection = served.connect()
    try:
        connection.request("POST", path, json.dumps(body))
        if leaves:
            time.sleep(random.random() * 0.3)
            return "left"
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    if response.status == 429:
        return "turned away"
    if interface == "stream":
        chunks = [json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        answer = "".join(delta.get("content", "") for delta in deltas)
        return "right" if answer == case.answer else "WRONG"
    message = json.loads(raw)["message" if interface == "ollama" else "choices"]
    message = message if interface == "ollama" else message[0]["message"]
    thinking = message.get("thinking", "") if interface == "ollama" else message["reasoning"]
    return "right" if (thinking, message["content"]) == (case.thinking, case.answer) else "WRONG"


def mix(served: Served, known: list[Case], n: int, tally: Tally) -> None:
    """Part 2."""
    tally.begin("mixed requests")
    choose = random.Random(1)
    jobs = [(choose.choice(known), choose.choice(("chat", "stream", "ollama")), number % 3 == 0) for number in range(n)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for outcome in pool.map(lambda job: _ask(served, *job), jobs):
            tally[outcome] += 1
    until(lambda: served.is_idle)
    tally.end()


class Rates(NamedTuple):
    """Tokens a second of all clients together; seconds to the first text, the median; the longest gap in a stream."""

    tok_s: float
    first_s: float
    gap_s: float


def rates(host: str, port: int, model: str, n_clients: int, *, n_tokens: int, n_words: int) -> Rates:
    """Part 3 for so many clients; beside them one long prompt is fed once all write."""
    texts: list[list[float]] = [[] for _ in range(n_clients)]

    def client(number: int) -> None:
        body = {"model": model, "max_tokens": n_tokens, "temperature": 1.0, "stream": True}
        body["messages"] = [{"role": "user", "content": f"Write {n_tokens + number} words."}]
        for at in _stream(host, port, body):
            texts[number].append(at)

    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    for each in threads:
        each.start()
    while not all(len(each) >= 3 for each in texts) and any(each.is_alive() for each in threads):
        time.sleep(0.01)
    long = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "word " * n_words}]}
    for _ in _stream(host, port, {**long, "stream": True}):
        pass
    for each in threads:
        each.join()
    end = max(each[-1] for each in texts)
    firsts = sorted(each[0] - began for each in texts)
    gap = max(late - early for each in texts for early, late in itertools.pairwise(each))
    return Rates(sum(map(len, texts)) / (end - began), firsts[len(firsts) // 2], gap)


def _stream(host: str, port: int, body: dict[str, Any]) -> Iterator[float]:
    """When each text of a stream came."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            delta = choices[0].get("delta", {})
            if delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"):
                yield time.monotonic()
    connection.close()


@contextmanager
def peer(folder: Path) -> Iterator[int]:
    """Run mlx_lm.server; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status < 500
    except OSError:
        return False


def _show(name: str, measure: Callable[[int], Rates], clients: list[int]) -> None:
    measure(clients[0])  # the first compiles and fills pools
    for n in clients:
        got = measure(n)
        print(
            f"{name}, {n} clients: {got.tok_s:,.1f} tok/s together, first text after {got.first_s:.2f} s (median), "
            f"longest gap {got.gap_s:.2f} s",
            flush=True,
        )


def main() -> int:
    """Run the three parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder (default: as the commands)")
    parser.add_argument("--connections", type=int, default=200, metavar="N")
    parser.add_argument("--requests", type=int, default=1_000, metavar="N")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 8], metavar="N")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="of each client in part 3")
    parser.add_argument("--peer", action="store_true", help="measure mlx_lm.server as well")
    parser.add_argument("--words", type=int, default=300, metavar="N", help="of the long prompt in part 3")
    options = parser.parse_args()
    sizes = {"n_tokens": options.tokens, "n_words": options.words}
    folder, tally = ready_model(options.model), Tally(every=100)
    if options.requests:
        known = cases(load(folder), n_seeds=4)
    with started(lambda: load(folder), Settings(port=0, width=_WIDTH, prefixes=0, queue=64)) as served:
        if options.connections:
            drop_connections(served, options.connections, tally)
        if options.requests:
            mix(served, known, options.requests, tally)
        name = served.get("/v1/models")["data"][0]["id"]
        if options.clients:
            one = lambda n: rates(served.host, served.port, name, n, **sizes)  # noqa: E731
            _show("qwq_mlx.serve", one, options.clients)
    if options.peer and options.clients:
        with peer(folder) as port:
            _show(
                "mlx_lm.server",
                lambda n: rates("127.0.0.1", port, str(folder), n, **sizes),
                options.clients,
            )
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
