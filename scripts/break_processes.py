"""Break whole processes: signals at random times, two converters on one output, kill -9 in the middle of a download.

    python scripts/break_processes.py [--kills N] [--signals N] [--races N] [--downloads N] [--seed N]
        [--budget SECONDS]

kills: kill -9 at random times, again and again until the conversion is through; it has the bytes of an undisturbed one.
signals: SIGINT and SIGTERM at random times; the command ends within two seconds with 130 or 143, says how to go on,
shows no traceback, and the same command finishes. races: two commands at once on one output; one proceeds, the other is
told which process is writing. downloads: kill -9 at random bytes of a shard that comes from a Hub on loopback; what was
fetched twice is counted, and nothing is left beside the file.

Prints the counts, on stderr as it goes; the exit code is 1 if anything was not good. At the end of the budget, or at
Ctrl-C, what is under way ends and the counts so far are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "convert"), str(ROOT / "scripts")]

from break_conversion import content  # noqa: E402 - the paths must be set first
from checkpoints import write_tiny_checkpoint  # noqa: E402
from hub_server import Blob, Handler, HubServer, Repository, Request  # noqa: E402
from tally import Tally, add_budget  # noqa: E402

from qwq_mlx.default_model import pocket_checkpoint  # noqa: E402
from qwq_mlx.errors import QwqError  # noqa: E402
from qwq_mlx.files.manifest import verify_full  # noqa: E402

MAX_TWICE_BYTES = 16_000_000
MAX_STOP_S = 2.0
_SETTINGS = "tokenizer_config.json"
_DOWNLOAD_BYTES = 64_000_000
_MOST_TWICE = "bytes fetched twice a kill at most"
_CHILD = """
import sys
from pathlib import Path
from qwq_mlx.files.hub.download import Fetcher, RemoteFile
from qwq_mlx.files.hub.retry import RetryPolicy
endpoint, url, size, sha256, to = sys.argv[1:]
file = RemoteFile(name="s.safetensors", url=url, size_bytes=int(size), sha256=sha256, blob_id=None)
Fetcher(endpoint, token=None, retry=RetryPolicy()).fetch_file(file, Path(to))
"""


def main() -> int:
    """Run everything; 1 if anything was not good."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kill -9 of conversions (default: 200)")
    parser.add_argument("--signals", type=int, default=50, help="SIGINT and SIGTERM, in turn (default: 50)")
    parser.add_argument("--races", type=int, default=50, help="two converters at once (default: 50)")
    parser.add_argument("--downloads", type=int, default=100, help="kill -9 of downloads (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    add_budget(parser)
    options = parser.parse_args()
    lot, tally = random.Random(options.seed), Tally(options.budget).stop_at_interrupt()
    with tempfile.TemporaryDirectory() as temporary:
        work = _Work(Path(temporary))
        for part in (work.kill, work.send_signals, work.race, download):
            tally.begin(part.__name__)
            part(options, lot, tally)
            tally.end()
    return tally.finish()


class _Work:
    """A small source, the command that converts it, and what an undisturbed run makes of it and how long it takes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.source = write_tiny_checkpoint(home / "source", n_layers=2)
        settings, known = (json.loads((each / _SETTINGS).read_text()) for each in (self.source, pocket_checkpoint()))
        settings["chat_template"] = known["chat_template"]  # an unknown one is warned of, in every run
        (self.source / _SETTINGS).write_text(json.dumps(settings))
        self.start(home / "whole").wait()  # the first one reads Python and MLX from the disk, so it is not timed
        self.expected = content(home / "whole")
        started = time.monotonic()
        self.start(home / "timed").wait()
        self.whole_s = time.monotonic() - started

    def start(self, output: Path, *, said: bool = False) -> subprocess.Popen[str]:
        script, pipe = str(ROOT / "scripts" / "convert.py"), subprocess.PIPE if said else None
        command = [sys.executable, script, "--quiet", "--source", str(self.source), "--output", str(output)]
        command += ["--quality-tokens", "400"]  # kills fall into the measurement, too, and it stays short
        # a session of its own: Ctrl-C at the terminal is for this script alone
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=nowhere, stderr=pipe, text=True, start_new_session=True)

    def wait_at_random(self, child: subprocess.Popen[str], lot: random.Random) -> bool:
        """Wait for a random part of a run's time, not the first: there Python and MLX start. Whether it still runs.

        The time follows the load of the machine: nearly two of three runs are caught, whatever else it does.
        """
        try:
            child.wait(lot.uniform(0.4, 1.05) * self.whole_s)
        except subprocess.TimeoutExpired:
            self.whole_s *= 1.03
            return True
        self.whole_s *= 0.95
        return False

    def check(self, output: Path, counts: Tally) -> None:
        """The folder is there and is what it should be."""
        is_same = output.exists() and content(output) == self.expected
        counts["same bytes in the end" if is_same else "OTHER BYTES"] += 1

    def kill(self, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
        for _ in counts.until("kills", options.kills):
            output = _folder(self.home / f"kills-{counts['conversions']}") / "out"
            counts["conversions"] += 1
            while not output.exists():
                child = self.start(output)
                if not counts.is_over and self.wait_at_random(child, lot):
                    child.send_signal(signal.SIGKILL)
                    counts["kills"] += 1
                child.wait()
                if child.returncode > 0:
                    counts["FAILED"] += 1
                    break
                if output.exists() and not _is_whole(output):
                    counts["DAMAGED"] += 1
            self.check(output, counts)
            shutil.rmtree(output.parent)

    def send_signals(self, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
        for _ in counts.until("stopped by a signal", options.signals):
            output = _folder(self.home / f"signals-{counts['conversions']}") / "out"
            counts["conversions"] += 1
            kind = (signal.SIGINT, signal.SIGTERM)[counts["conversions"] % 2]
            child = self.start(output, said=True)
            if self.wait_at_random(child, lot):
                child.send_signal(kind)
            sent = time.monotonic()
            _, said = child.communicate(timeout=60)
            took_s = time.monotonic() - sent
            if child.returncode == 0:
                counts["through before the signal"] += 1
            elif child.returncode < 0:
                counts["ended by the system: Python was still starting"] += 1
            else:
                counts["stopped by a signal"] += 1
                if child.returncode != {signal.SIGINT: 130, signal.SIGTERM: 143}[kind]:
                    counts[f"EXIT CODE {child.returncode}"] += 1
                if took_s > MAX_STOP_S:
                    counts["SLOWER THAN TWO SECONDS"] += 1
                if "Traceback" in said or not re.search(
                    r"interrupted: (nothing was kept|what is finished is kept)", said
                ):
                    counts["SAID SOMETHING ELSE"] += 1
                    print(said, file=sys.stderr)
            if not output.exists():
                self.start(output).wait()
            self.check(output, counts)
            shutil.rmtree(output.parent)

    def race(self, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
        for number in counts.until("races", options.races):
            output = _folder(self.home / f"race-{number}") / "out"
            children = [self.start(output, said=True)]
            time.sleep(lot.uniform(0, 0.15) * self.whole_s)
            children.append(self.start(output, said=True))
            said = [child.communicate()[1] for child in children]
            codes = sorted(child.returncode for child in children)
            counts["races"] += 1
            if codes != [0, 1]:
                counts[f"EXIT CODES {codes}"] += 1
            loser = said[[child.returncode for child in children].index(1)] if 1 in codes else ""
            pids = [child.pid for child in children if child.returncode == 0]
            if pids and re.search(rf"out: process {pids[0]} on .* is writing it", loser):
                counts["the other told which process is writing"] += 1
            elif "exists already" in loser:
                counts["the other came when it was finished"] += 1
            else:
                counts["SAID SOMETHING ELSE"] += 1
                print(loser, file=sys.stderr)
            self.check(output, counts)
            shutil.rmtree(output.parent)


def download(options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
    """D1: kill -9 when a random byte of a shard was sent; each round goes on until the shard is there."""
    content = lot.randbytes(_DOWNLOAD_BYTES)
    blob, environment = Blob.of(content), {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as temporary, HubServer() as hub:
        hub.repositories["a/b"] = Repository()
        commit = hub.repositories["a/b"].push({"s.safetensors": blob})
        url = f"{hub.endpoint}/a/b/resolve/{commit}/s.safetensors"
        for _ in counts.until("kills", options.downloads):
            to = _folder(Path(temporary) / f"round-{counts['files']}") / "s.safetensors"
            command = [sys.executable, "-c", _CHILD, hub.endpoint, url, str(len(content)), blob.sha256, str(to)]
            hub.requests.clear()
            n_kills = 0
            for _ in range(min(10, options.downloads - counts["kills"])):
                stalled, killed = threading.Event(), threading.Event()
                part = to.with_name(f".{to.name}.part")
                at = (part.stat().st_size if part.exists() else 0) + lot.randrange(1, 12_000_000)
                if at >= len(content):
                    break
                hub.faults = [_stall(blob, at, stalled, killed)]
                with subprocess.Popen(command, env=environment, start_new_session=True) as child:
                    stalled.wait(60)
                    child.kill()
                killed.set()
                n_kills += 1
            hub.faults = []
            subprocess.run(command, env=environment, check=True, start_new_session=True)
            twice = hub.n_bytes_sent - len(content)
            counts[_MOST_TWICE] = max(counts[_MOST_TWICE], twice // max(n_kills, 1))
            counts["kills"] += n_kills
            counts["files"] += 1
            if twice > n_kills * MAX_TWICE_BYTES:
                counts["FETCHED TOO MUCH TWICE"] += 1
            if to.read_bytes() != content:
                counts["OTHER BYTES"] += 1
            if [path.name for path in to.parent.iterdir()] != [to.name]:
                counts["SOMETHING LEFT BESIDE THE FILE"] += 1
            shutil.rmtree(to.parent)


def _stall(
    blob: Blob, at: int, stalled: threading.Event, killed: threading.Event
) -> Callable[[Handler, Request], bool]:
    """Send the file up to a byte, say so, and wait until the client is dead."""

    def read(start: int, end: int) -> bytes:
        if end > at:
            stalled.set()
            killed.wait(60)
            raise ConnectionResetError
        return blob.read(start, end)

    def fault(handler: Handler, asked: Request) -> bool:
        if asked.what != "cdn" or stalled.is_set():
            return False
        handler.send_blob(Blob(blob.size_bytes, blob.sha256, read), asked)
        return True

    return fault


def _is_whole(folder: Path) -> bool:
    try:
        verify_full(folder)
    except QwqError:
        return False
    return True


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
