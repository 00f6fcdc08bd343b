"""Kill a server at random points, start it again, and look for runs that are lost or not what they were.

    python scripts/kill_server.py [--model DIR] [--kills 100] [--seed N] [--budget SECONDS]

Each server starts two runs with known seeds, goes on with two that were interrupted before, and saves one; SIGKILL
comes within 1.5 times the time that this takes. Good is: every run that a client was told had ended is there after each
restart with the same steps, answer and state; every file whose saving was confirmed can be read; a run that was going
on is "interrupted"; and one that went on ends with the text of its seed.

Does not: cut power (fsync is trusted).
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "serve")]

from interfaces import RUNS, Question, asked  # noqa: E402 - the paths must be set first
from kill_runs import exit_code, forked  # noqa: E402
from serving import free_port, until  # noqa: E402
from tally import Tally, add_budget  # noqa: E402

import qwq_mlx.serve.prepare  # noqa: E402
import qwq_mlx.serve.rows  # noqa: E402
import qwq_mlx.serve.server  # noqa: E402, F401 - imported here, run only in the children
from qwq_mlx.errors import QwqError  # noqa: E402
from qwq_mlx.generate.checkpoint.file import read_checkpoint  # noqa: E402
from qwq_mlx.model.upstream import import_mlx_lm  # noqa: E402
from qwq_mlx.serve.__main__ import main as serve  # noqa: E402

_SEEDS = 6
_QUESTIONS = [Question("What is 3 + 4? Count the letters r in strawberry.", 80, seed) for seed in range(_SEEDS)]
_PER_SERVER = 2


class Client:
    """A client of the server under test, who remembers what it was told.

    ended: digests of the steps and answers of runs that have ended. saved: runs whose file was confirmed.
    running: runs of this server. interrupted: runs that an earlier one left.
    """

    def __init__(self, port: int, tally: Tally) -> None:
        self._port, self._tally = port, tally
        self.ended: dict[str, str] = {}
        self.saved: set[str] = set()
        self.running: set[str] = set()
        self.interrupted: set[str] = set()
        self._texts: dict[int, str] = {}  # by seed

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """One request; raises OSError or HTTPException where the server is gone."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def start(self, question: Question) -> None:
        """A new run."""
        status, raw = self.ask("POST", *asked("run", "", question))
        if status == 201:
            self.running.add(json.loads(raw)["id"])

    def go_on(self, choose: random.Random) -> None:
        """Go on with a run that was interrupted."""
        run = choose.choice(sorted(self.interrupted))
        if self.ask("POST", f"{RUNS}/{run}/resume", {})[0] == 201:
            self.interrupted.discard(run)
            self.running.add(run)
            self._tally["went on"] += 1

    def save_one(self, choose: random.Random) -> None:
        """Save a run that has begun."""
        run = choose.choice(sorted(self.running))
        if self.ask("POST", f"{RUNS}/{run}/save")[0] == 201:
            self.saved.add(run)

    def look(self) -> None:
        """Remember the runs that have ended."""
        for run in sorted(self.running):
            info = json.loads(self.ask("GET", f"{RUNS}/{run}")[1])
            if info.get("state") == "ended":
                self._remember(info)
                self._tally["runs ended"] += 1

    def _remember(self, info: dict[str, Any]) -> None:
        self.ended[info["id"]] = self._digest(info)
        self.running.discard(info["id"])

    def check(self) -> None:
        """Compare what there is after a restart with what was told before."""
        for run, digest in self.ended.items():
            status, raw = self.ask("GET", f"{RUNS}/{run}")
            self._tally["LOST"] += status != 200
            self._tally["CHANGED"] += status == 200 and self._digest(json.loads(raw)) != digest
        for run in sorted(self.running):
            status, raw = self.ask("GET", f"{RUNS}/{run}")
            state = json.loads(raw)["state"] if status == 200 else "gone"
            if state == "ended":  # and nobody was told
                self._remember(json.loads(raw))
            self._tally[
                f"runs {state} after a kill" if state in ("ended", "interrupted") else f"RUN {state.upper()}"
            ] += 1
        self.interrupted |= self.running
        self.running.clear()

    def _digest(self, info: dict[str, Any]) -> str:
        """Of the steps and the answer; the text must be that of its seed."""
        lines = self.ask("GET", f"{RUNS}/{info['id']}/steps")[1].splitlines(keepends=True)[:-1]
        text = "".join(json.loads(line)["text"] for line in lines)
        self._tally["ANOTHER TEXT"] += self._texts.setdefault(info["seed"], text) != text
        facts = [info["state"], info["tokens"], info["summary"]["answer"]]
        return hashlib.sha256(b"".join(lines) + json.dumps(facts).encode()).hexdigest()


@contextmanager
def server(model: str | None, folder: Path, client: Client, port: int) -> Iterator[None]:
    """A server in a process of its own, killed where the block ends."""
    arguments = ["--port", str(port), "--quiet", "--history", str(folder / "history.sqlite3")]
    arguments += ["--runs-folder", str(folder), *(["--model", model] if model else [])]
    child = forked(lambda: serve(arguments))

    def is_ready() -> bool:
        try:
            return client.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    try:
        until(is_ready)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        exit_code(child)


def main() -> int:
    """Run the script; 1 if anything was not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder (default: as the commands)")
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    add_budget(parser)
    options = parser.parse_args()
    for module in ("mlx_lm.models.qwen2", "mlx_lm.models.cache"):
        import_mlx_lm(module)  # MLX does not survive a fork once it computed
    tally, choose, port = Tally(options.budget).stop_at_interrupt(), random.Random(options.seed), free_port()
    client = Client(port, tally)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tally.begin("kills of a server")
        undisturbed_s = _write_texts(options.model, folder, client, port)
        for _ in tally.until("kills", options.kills):
            with server(options.model, folder, client, port):
                client.check()
                for _ in range(_PER_SERVER):
                    client.start(choose.choice(_QUESTIONS))
                    if client.interrupted:
                        client.go_on(choose)
                end = time.monotonic() + choose.uniform(0, 1.5 * undisturbed_s)
                saves_at = time.monotonic() + choose.uniform(0, undisturbed_s)
                while time.monotonic() < end:
                    client.look()
                    if time.monotonic() > saves_at and client.running:
                        client.save_one(choose)
                        saves_at = end
                    time.sleep(0.01)
            tally["kills"] += 1
        with server(options.model, folder, client, port):
            client.check()
        tally["files of saved runs"] = len(client.saved)
        tally["FILES THAT CANNOT BE READ"] = sum(not _is_whole(folder / f"{run}.qwq") for run in client.saved)
        tally.end()
    return tally.finish()


def _write_texts(model: str | None, folder: Path, client: Client, port: int) -> float:
    """Run every question undisturbed; returns the seconds that a server's part of them takes."""
    with server(model, folder, client, port):
        began = time.monotonic()
        for question in _QUESTIONS:
            client.start(question)
        while client.running:
            client.look()
            time.sleep(0.01)
        return (time.monotonic() - began) * 2 * _PER_SERVER / len(_QUESTIONS)


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except (QwqError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
