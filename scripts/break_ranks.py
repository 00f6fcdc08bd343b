"""End, or stop, one of two processes that hold the pocket together, or cut their network, at random moments.

    python scripts/break_ranks.py [--points 20] [--seed 0]
    sudo python scripts/break_ranks.py --network [--delay-ms 5] [--loss 0.01] [--points 20]

For each rank and each of SIGKILL and SIGSTOP: --points runs, of which every second is hit while it starts, loads or
feeds its prompt, and the others while they decode. With --network (Linux) the processes are in two network namespaces,
joined by a line that delays packets and loses some; there the line is also cut at --points moments, and one run that
nobody hits must write what one process writes. Prints one JSON line: named wrongly or not at all, the longest times
until the process was named and until all had ended, runs that could be saved, and processes that were left. Exits 1 if
there is any of the first or the last.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.cli.host_check import checked_hosts
from qwq_mlx.cli.hosts import parse_hosts
from qwq_mlx.cli.launch import Launch
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import RankError

_START_S, _DECODING_S = 8.0, 5.0  # a hit comes at most so long after the start, or after the first tokens
_SPACES, _ADDRESSES = ("qwq-a", "qwq-b"), ("10.77.1.1", "10.77.1.2")
_TUNSETIFF, _TUN_WITHOUT_HEAD = 0x400454CA, 0x1001
_SSH = """#!/bin/sh
for word; do command=$word; done
export QWQ_MLX_MACHINE=b SSH_CONNECTION="{0} 50000 {1} 22"
exec ip netns exec {2} sh -c "$command"
"""


@dataclass(slots=True)
class Totals:
    """What came of all runs."""

    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    named_s: float = 0.0
    ended_s: float = 0.0
    saved: int = 0
    left: int = 0


def main() -> int:
    """Parse, break, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--delay-ms", type=float, default=5.0)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--line", help=argparse.SUPPRESS)  # within a namespace: the file that cuts the line
    options = parser.parse_args()
    if options.network and options.line is None:
        with tempfile.TemporaryDirectory() as folder, _network(Path(folder), options) as switch:
            ssh = Path(folder) / "ssh"
            ssh.write_text(_SSH.format(*_ADDRESSES, _SPACES[1]))
            ssh.chmod(0o755)
            again = [sys.executable, *sys.argv, "--line", str(switch)]
            environment = {**os.environ, "QWQ_MLX_SSH": str(ssh)}
            return subprocess.run(["ip", "netns", "exec", _SPACES[0], *again], env=environment, check=False).returncode
    rng, totals = random.Random(options.seed), Totals()
    line = None if options.line is None else Path(options.line)
    if line is not None:
        _unhurt(totals)
    hits: list[tuple[int | None, str]] = [(rank, name) for rank in (0, 1) for name in ("SIGKILL", "SIGSTOP")]
    for rank, name in [*hits, *([(None, "line cut")] if line is not None else [])]:
        for point in range(options.points):
            decodes = point % 2 == 1
            while not _break(totals, rank, name, rng.uniform(0.0, _DECODING_S if decodes else _START_S), decodes, line):
                pass  # its answer had ended before its moment came
    times = {"named_s": round(totals.named_s, 1), "ended_s": round(totals.ended_s, 1)}
    print(json.dumps({**asdict(totals), **times}))
    return 1 if totals.wrong or totals.left else 0


def _launch(*more: str, on_failure: Callable[[RankError], object] = lambda error: None) -> Launch:
    model = pocket_checkpoint()
    text = "localhost*2" if "QWQ_MLX_SSH" not in os.environ else "localhost,b"
    hosts = checked_hosts(parse_hosts(text), [model], port=None)
    arguments = ["--model", str(model), "--temp", "0", "--on-loop", "off", "--prompt", "Count.", "--no-save", "--quiet"]
    return Launch("qwq_mlx.generate", [*arguments, *more], hosts, on_failure=on_failure)


def _unhurt(totals: Totals) -> None:
    """A run over the network, and one of one process."""
    texts = []
    for launch in (_launch("--max-tokens", "60"), None):
        with tempfile.TemporaryFile() as file:
            before = os.dup(1)
            os.dup2(file.fileno(), 1)
            try:
                command = [sys.executable, "-m", "qwq_mlx.generate", *_launch("--max-tokens", "60")._command[3:]]
                code = launch.work() if launch is not None else subprocess.run(command, check=False).returncode
            finally:
                os.dup2(before, 1)
                os.close(before)
            file.seek(0)
            texts.append((code, file.read()))
    if texts[0] != texts[1] or not texts[0][1]:
        totals.wrong.append(f"unhurt: {texts}")
    sys.stderr.write(f"unhurt: {'the same text' if texts[0] == texts[1] else texts}\n")


def _break(totals: Totals, rank: int | None, name: str, after_s: float, decodes: bool, line: Path | None) -> bool:
    """One run; whether it still went on at that moment. after_s: since the start, or since the first tokens."""
    hits, named = list[float](), list[float]()
    launch = _launch("--max-tokens", "3000", on_failure=lambda error: named.append(time.monotonic()))

    def later() -> None:
        until = time.monotonic() + 60  # the machine may be busy
        while time.monotonic() < until and not (launch.snapshots.exists() if decodes else launch._watch.pid(1)):
            time.sleep(0.05)
        time.sleep(after_s)
        if launch.processes[0].poll() is None:
            hits.append(time.monotonic())
            if rank is None:
                assert line is not None, "it is cut with a network alone"
                line.write_text("cut")
            else:
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(launch._watch.pid(rank) or launch.processes[rank].pid, signal.Signals[name])

    thread = threading.Thread(target=later)
    thread.start()
    said = "nothing"
    try:
        launch.work()
    except RankError as error:
        said = str(error)
    ended = time.monotonic()
    thread.join()
    if line is not None:
        line.write_text("")
    pids = [launch._watch.pid(each) for each in (0, 1)]
    left = sum(pid is not None and _lives(pid) for pid in pids)
    is_kept = launch.snapshots.exists() and "state" in json.loads(launch.snapshots.read_text())
    launch.close()
    if not hits:
        return False
    named_s, ended_s = max(0.0, (named or [ended])[0] - hits[0]), max(0.0, ended - hits[0])
    is_lost = any(words in said for words in ("not heard each other", "not found each other"))
    is_right = said.startswith(f"process {rank} of") if rank is not None else is_lost
    totals.runs, totals.saved, totals.left = totals.runs + 1, totals.saved + is_kept, totals.left + left
    totals.named_s, totals.ended_s = max(totals.named_s, named_s), max(totals.ended_s, ended_s)
    if not is_right:
        totals.wrong.append(f"{name} of {rank}: {said[:200]}")
    what = f"{name} of process {rank} at {after_s:.1f} s{' of decoding' * decodes}"
    sys.stderr.write(
        f"{what}: {'right' if is_right else 'WRONG'} after {named_s:.1f} s, ended after {ended_s:.1f} s: {said[:110]}\n"
    )
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def _network(folder: Path, options: Any) -> Iterator[Path]:
    """Two namespaces whose line delays and loses packets, and is cut while a file says so; the file."""
    line = folder / "line"
    line.write_text("")
    devices = []
    try:
        for place, space in enumerate(_SPACES):
            device, name = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"qwqtun{place}"
            devices.append(device)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEAD))
            inside = ["ip", "-n", space]
            for command in (
                ["ip", "netns", "add", space],
                ["ip", "link", "set", name, "netns", space],
                [*inside, "addr", "add", f"{_ADDRESSES[place]}/24", "dev", name],
                [*inside, "link", "set", name, "up"],
                [*inside, "link", "set", "lo", "up"],
            ):
                subprocess.run(command, check=True)
        work = (devices, line, options.delay_ms / 1e3, options.loss, random.Random(options.seed))
        threading.Thread(target=_relay, args=work, daemon=True).start()
        yield line
    finally:
        for space in _SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False)


def _relay(devices: list[int], line: Path, delay_s: float, loss: float, rng: random.Random) -> None:
    """Carry packets from each end to the other."""
    waiting: list[tuple[float, int, int, bytes]] = []
    n_packets, is_cut, looked = 0, False, 0.0
    while True:
        now = time.monotonic()
        if now - looked > 0.05:
            is_cut, looked = line.exists() and line.read_text() == "cut", now
        ready, _, _ = select.select(devices, [], [], max(0.0, min(0.05, waiting[0][0] - now)) if waiting else 0.05)
        for device in ready:
            packet = os.read(device, 65_536)
            if not is_cut and rng.random() >= loss:
                n_packets += 1
                other = devices[1 - devices.index(device)]
                heapq.heappush(waiting, (time.monotonic() + delay_s, n_packets, other, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # its queue is full
                os.write(other, packet)


if __name__ == "__main__":
    sys.exit(main())
