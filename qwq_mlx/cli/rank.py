"""A process that `--hosts` started: it joins MLX's group of all of them, and writes signs of life.

A sign says more than that the process is there: what it has finished, how long it waits for others, whom it has not
heard over the network, and how often memory was read from disk. Who is not read any more has nobody who would end it,
and ends itself.

Does not: judge signs (`watch` does), or start processes (`launch` does).
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwq_mlx.engine.ranks import ADDRESSES_VARIABLE

__all__ = ["BEAT_S", "PAUSED", "RANK_VARIABLE", "RankSetup", "join", "joined_group", "snapshot_path"]

RANK_VARIABLE = "QWQ_MLX_RANK"  # tells rank 0, which has its user's arguments, what it is
BEAT_S = 0.5
PAUSED = b"paused\n"  # told to the others before whoever watches them is stopped by Ctrl-Z
_joining = threading.Event()  # this process looks for the others, or has found them


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What a process has to know of the group.

    rank: its own. addresses: "IP:port" of each rank, one or more of them. backend: MLX's, as its hostfiles name it.
    rdma: devices of a jaccl hostfile, by rank. environment: further variables.
    signs: open file that takes the signs of life. snapshots: file in which rank 0 keeps its run; "" for none.
    unwanted_s: after which it ends itself where nobody says that it is wanted; None where a closed stdin tells that.
    """

    rank: int
    addresses: list[list[str]]
    backend: str = "ring"
    rdma: list[list[Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    signs: int = 1
    snapshots: str = ""
    unwanted_s: float | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def snapshot_path() -> Path | None:
    """Where this process is to keep its run while it goes on; None where nobody would read it."""
    value = os.environ.get(RANK_VARIABLE)
    path = "" if value is None else json.loads(value)["snapshots"]
    return Path(path) if path else None


@functools.cache
def joined_group() -> Any | None:
    """The group of processes that `--hosts` started this one in, as rank 0; None where it did not."""
    value = os.environ.get(RANK_VARIABLE)
    return None if value is None else join(RankSetup(**json.loads(value)))


def join(setup: RankSetup) -> Any:
    """Write signs of life from now on, and wait for all others. Raises what MLX raises where one cannot be reached."""
    with tempfile.TemporaryDirectory(prefix="qwq-mlx-rank-") as folder:
        os.environ.update(setup.environment | _environment(setup, Path(folder)))
        threading.Thread(target=_write_signs, args=(setup.signs,), daemon=True, name="signs of life").start()
        import mlx.core as mx

        _joining.set()
        _say(setup.signs)  # MLX keeps the other thread from it until all are there
        return mx.distributed.init(strict=True, backend=setup.backend.removesuffix("-ring"))


def _environment(setup: RankSetup, folder: Path) -> dict[str, str]:
    """The variables that MLX's backends read, as mlx.launch sets them; files that they name are read once."""
    hosts = [",".join(each.rpartition(":")[0] for each in addresses) for addresses in setup.addresses]
    variables = {"MLX_RANK": str(setup.rank), ADDRESSES_VARIABLE: ";".join(hosts)}
    if setup.backend == "ring":
        variables["MLX_HOSTFILE"] = _written(folder / "hosts.json", setup.addresses)
    elif setup.backend == "nccl":
        host, _, port = setup.addresses[0][0].rpartition(":")
        variables |= {"NCCL_HOST_IP": host, "NCCL_PORT": port, "MLX_WORLD_SIZE": str(len(setup.addresses))}
    else:
        devices = _written(folder / "devices.json", setup.rdma)
        variables |= {"MLX_JACCL_COORDINATOR": setup.addresses[0][0], "MLX_IBV_DEVICES": devices}
        if setup.backend == "jaccl-ring":
            variables["MLX_JACCL_RING"] = "1"
    return variables


def _written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def _write_signs(descriptor: int) -> None:
    try:
        while True:
            _say(descriptor)
            time.sleep(BEAT_S)
    except OSError:  # whoever started and watched this process is gone
        os.kill(os.getpid(), signal.SIGKILL)


def _say(descriptor: int) -> None:
    os.write(descriptor, (json.dumps(_sign()) + "\n").encode())


def _sign() -> dict[str, Any]:
    import resource  # Windows has none; there no rank is started

    from qwq_mlx.engine.ranks.activity import activity
    from qwq_mlx.engine.ranks.link import open_links

    return {
        "pid": os.getpid(),
        "done": activity.n_done,
        "passes": activity.n_passes,
        "waiting_s": activity.waiting_s,
        "is_loading": activity.is_loading,
        "is_asking": activity.is_asking,
        "is_joining": _joining.is_set(),
        "silent_s": {str(link.peer): link.silent_s for link in list(open_links)},
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "peak_bytes": sys.modules["mlx.core"].get_peak_memory() if "mlx.core" in sys.modules else 0,
    }
