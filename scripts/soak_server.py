"""Hold a server for hours under a low, steady load, and look at its memory, threads and files each minute.

    python scripts/soak_server.py [--model DIR] [--hours H] [--every SECONDS] [--log FILE]

Starts `python -m qwq_mlx.serve` and sends a small request every so many seconds: the interfaces in turn, runs that are
watched among them; of every six requests one is left midway, one is refused, and one is a connection that is dropped.
Temperature is 0, so each question has to get the same answer from every interface. A line of JSON each minute: the
server's resident memory, threads, files and CPU seconds, and counts.

The exit code is 1 where an answer differed, a request failed, or the server ended, or where threads, files or memory
grew: the last quarter's median is compared with that of the third, after pools and caches have their size.

Does not: run elsewhere than on Linux (/proc), or load a machine; `load_server.py` does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "serve")]

from interfaces import INTERFACES, RUNS, Question, asked, told  # noqa: E402 - the paths must be set first
from measure_server import cpu_seconds, running  # noqa: E402

_NAME = "soak"
_QUESTIONS = [Question(text, 32) for text in ("What is 3 + 4?", "How many r in strawberry.", "What is 12 * 3?")]
_MAX_GROWTH = 1.01  # of resident memory, from the third quarter to the last; of two hours 0.1 MB a minute
_MINUTE_S = 60.0


class Sample(NamedTuple):
    """What a process holds. cpu_s: user and system since it began."""

    rss_kb: int
    threads: int
    files: int
    cpu_s: float


def sample(pid: int) -> Sample:
    """What a process holds now."""
    folder = Path("/proc") / str(pid)
    values = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    return Sample(
        rss_kb=int(values["VmRSS"].split()[0]),
        threads=int(values["Threads"]),
        files=len(list((folder / "fd").iterdir())),
        cpu_s=cpu_seconds(pid),
    )


class Load:
    """One request after another, counted in `counts`; names in CAPITALS are of what must not happen."""

    def __init__(self, port: int) -> None:
        self._port, self._known = port, dict[tuple[Question, bool], str]()
        self.counts: dict[str, int] = {}

    def send(self, number: int) -> None:
        """The request of that number, its outcome counted."""
        try:
            outcome = self._send(number)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            print(f"request {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            outcome = "FAILED"
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def _send(self, number: int) -> str:
        interface = INTERFACES[number % len(INTERFACES)]
        question = _QUESTIONS[number // len(INTERFACES) % len(_QUESTIONS)]
        path, body = asked(interface, _NAME, question)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            kind = number % 6
            if kind == 3:
                connection.connect()
                return "dropped"
            if kind == 4:
                body["no_such_field"] = 1
            connection.request("POST", path, json.dumps(body))
            if kind == 5:
                time.sleep(0.05 * (number % 7))
                return "left midway"
            response = connection.getresponse()
            raw = response.read()
            if kind != 4 and interface == "run":
                run = json.loads(raw)["id"]
                connection.request("GET", f"{RUNS}/{run}/steps")
                raw = connection.getresponse().read()
        finally:
            connection.close()
        if kind == 4:
            return "refused" if response.status == 400 else "NOT REFUSED"
        return self._judged(interface, question, raw)

    def _judged(self, interface: str, question: Question, raw: bytes) -> str:
        answer, is_run = told(interface, raw)[1], interface == "run"  # of a run all its text
        return "right" if answer == self._known.setdefault((question, is_run), answer) else "WRONG"


def growth(samples: list[Sample]) -> list[str]:
    """What grew from the third quarter to the last, in words. A connection that is being closed is no growth."""
    n = len(samples) // 4
    if not n:
        return []
    grew = []
    for name, factor, more in (("rss_kb", _MAX_GROWTH, 0), ("threads", 1.0, 0), ("files", 1.0, 2)):
        early, late = (
            statistics.median(getattr(each, name) for each in part) for part in (samples[-2 * n : -n], samples[-n:])
        )
        if late > early * factor + more:
            grew.append(f"{name} grew from {early:,.0f} to {late:,.0f}")
    return grew


def hold(server: subprocess.Popen[bytes], port: int, *, hours: float, every_s: float, log: TextIO) -> int:
    """The load, and a line each minute; returns the exit code."""
    load, samples, number = Load(port), list[Sample](), 0
    began = shown = time.monotonic()
    while time.monotonic() - began < hours * 3_600 and server.poll() is None:
        load.send(number)
        number += 1
        if time.monotonic() - shown >= _MINUTE_S:
            shown = time.monotonic()
            samples.append(sample(server.pid))
            line = {"minutes": round((shown - began) / 60, 1), **samples[-1]._asdict(), **load.counts}
            print(json.dumps(line), file=log, flush=True)
        time.sleep(max(0.0, began + number * every_s - time.monotonic()))
    bad = growth(samples) + [f"{n} {what}" for what, n in load.counts.items() if what.isupper()]
    if server.poll() is not None:
        bad.append(f"the server ended with {server.returncode}")
    print(f"{number:,} requests in {(time.monotonic() - began) / 60:.0f} minutes: {load.counts}; {bad or 'all good'}")
    return 1 if bad else 0


def main() -> int:
    """Start a server and hold it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder (default: as the commands)")
    parser.add_argument("--hours", type=float, default=2.0, metavar="H")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two requests")
    parser.add_argument("--log", type=Path, metavar="FILE", help="for the lines of JSON (default: stdout)")
    options = parser.parse_args()
    log = options.log.open("w") if options.log else sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        command = ["qwq_mlx.serve", "--name", _NAME, "--quiet", "--history", f"{folder}/history.sqlite3"]
        with running(*command, *(["--model", options.model] if options.model else [])) as (server, port):
            return hold(server, port, hours=options.hours, every_s=options.every, log=log)


if __name__ == "__main__":
    sys.exit(main())
