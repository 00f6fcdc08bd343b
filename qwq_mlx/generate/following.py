"""The processes of a group before they compute: rank 0 leads (`load`), the others `follow` and load what it names.

Nothing here waits inside a collective, so what is wrong on one machine (no folder, another model, too little memory) is
told by rank 0 with that machine's name, before a weight is read.

Does not: start processes (`--hosts` and mlx.launch do).
"""

from __future__ import annotations

import atexit
import gc
import platform
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.engine.ranks.follower import Follower
from qwq_mlx.engine.ranks.leader import Leader
from qwq_mlx.engine.ranks.link import Link, connect_all
from qwq_mlx.engine.ranks.neighbours import connect_neighbours
from qwq_mlx.errors import LoadError, OptionError, QwqError
from qwq_mlx.files.background_verification import BackgroundVerification
from qwq_mlx.files.model_identity import (
    found_folder,
    how_to_copy,
    machine_name,
    model_identity,
    other_versions,
    possible_folders,
    versions,
)
from qwq_mlx.model.device import backend_name, limit_bytes, wired
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import ComputeType, load_model
from qwq_mlx.model.split import Split
from qwq_mlx.model.upstream import import_mlx

__all__ = [
    "begin_loading",
    "follow",
    "lead",
    "limits_of_ranks",
    "wait_until_loaded",
]

_wiring = ExitStack()
_leaders: list[Leader] = []  # the last one: MLX has one group of all processes, which hold one model


def lead(group: Any) -> Leader:
    """The leader of a group for the next model, in its rank 0. Raises OptionError in any other rank, and RankError."""
    if group.rank() != 0:
        raise OptionError(f"group is that of process {group.rank()}; rank 0 alone loads. Call qwq_mlx.follow(group).")
    if _leaders:
        _leaders[:] = [_leaders[0].successor()]
    else:
        _leaders.append(Leader(group, connect_all(group)))
        connect_neighbours(group)
        atexit.register(_leaders[0].close)
    return _leaders[0]


def limits_of_ranks(leader: Leader, folder: Path, own_bytes: int | None, *, follow_links: bool) -> list[int | None]:
    """Ask all ranks whether they have the model, and how much memory each gives: None for all where own_bytes is.

    Ranks of one machine have its memory together, except on CUDA, where each has a device.
    Raises LoadError naming the machine that lacks the model, or has another one or other versions.
    """
    asked = {
        "folders": possible_folders(folder),
        "identity": model_identity(folder),
        "versions": versions(),
        "follow_links": follow_links,
    }
    replies = leader.ask("plan", asked)
    for link, reply in zip(leader.links, replies, strict=True):
        _check(link, reply)
    if own_bytes is None:
        return [None] * leader.size
    limits = [own_bytes, *(int(reply["limit_bytes"]) for reply in replies)]
    if backend_name() == "cuda":
        return [*limits]
    machines = [machine_name(), *(reply["machine"] for reply in replies)]
    return [limit // machines.count(machine) for limit, machine in zip(limits, machines, strict=True)]


def begin_loading(
    leader: Leader,
    split: Split,
    *,
    compute_type: ComputeType,
    follow_links: bool,
    reproducible: bool,
    verify: bool,
    peak_bytes: Sequence[int],
) -> None:
    """Let all ranks load their parts while this one loads its own; the settings are those of `load`.

    peak_bytes: that are planned for each rank.
    """
    settings = {
        "split": asdict(split),
        "compute_type": compute_type,
        "follow_links": follow_links,
        "reproducible": reproducible,
        "verify": verify,
        "peak_bytes": list(peak_bytes),
    }
    leader.tell("load", settings)


def wait_until_loaded(leader: Leader, peak_bytes: int) -> None:
    """peak_bytes: that are planned for this process. Raises LoadError naming the machine that could not."""
    with activity.loading():
        for link in leader.links:
            _check(link, link.receive())
    _wire(peak_bytes)


def _wire(n_bytes: int) -> None:
    """Until the next model, whoever runs: a process that others wait for must not be paged out."""
    _wiring.close()
    _wiring.enter_context(wired(n_bytes))


def _check(link: Link, reply: Mapping[str, Any]) -> None:
    if "error" in reply:
        raise LoadError(f"Process {link.peer} ({reply.get('host')}): {reply['error']}")


def follow(group: Any, *, folder: str | Path | None = None) -> None:
    """Hold a part of the model that rank 0 loads, and compute with it, until rank 0 ends. For ranks other than 0.

    group: from `mx.distributed.init`.
    folder: of the model on this machine; None looks where rank 0 has it, and there below this user's home.
    A Ctrl-C here reaches rank 0 and ends what runs after the token under way. Raises OptionError in rank 0, RankError
    where rank 0 is gone, and what `load` raises.

    >>> import mlx.core as mx
    >>> group = mx.distributed.init()  # of one process here, which is rank 0
    >>> if group.rank() > 0:
    ...     qwq_mlx.follow(group)
    """
    if group.rank() == 0:
        raise OptionError("group is that of rank 0, which leads the others. Call qwq_mlx.load(folder, group=group).")
    [link] = connect_all(group)
    neighbours = connect_neighbours(group)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: link.ask_to_stop()) if is_main else None
    try:
        _follow(link, group, None if folder is None else Path(folder))
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
        for each in (link, *neighbours):
            each.close()


def _follow(link: Link, group: Any, folder: Path | None) -> None:
    follower: Follower | None = None
    planned: Path | None = None
    while True:
        message = link.receive()
        task = message["task"]
        if task == "end":
            return
        if task == "plan":
            _wiring.close()
            follower = None  # of the model before, whose memory is free when this one's is measured
            gc.collect()
            import_mlx().clear_cache()
            reply, planned = _planned(message, folder)
            link.send(reply)
        elif task == "load":
            follower = _told(link, group, planned, message)
        elif follower is not None:
            follower.do(message)


def _planned(message: Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any], Path | None]:
    """What rank 0 is told of this machine, and where it has the model."""
    host = platform.node()
    if differing := other_versions(versions(), message["versions"], where="rank 0"):
        return {"host": host, "error": f"has other versions: {differing}. Install the same."}, None
    places = [str(folder)] if folder is not None else message["folders"]
    found = found_folder(places)
    if found is None:
        return {
            "host": host,
            "error": f"there is no model folder {' or '.join(places)}. {how_to_copy(Path(places[0]))}",
        }, None
    try:
        files = open_model_folder(found, follow_links=message["follow_links"])
    except QwqError as error:
        return {"host": host, "error": str(error)}, None
    if model_identity(files.path) != message["identity"]:
        return {"host": host, "error": f"{found} holds another model than rank 0 has. Copy that one there."}, None
    return {"host": host, "machine": machine_name(), "limit_bytes": limit_bytes()}, found


def _loaded(group: Any, folder: Path | None, message: Mapping[str, Any]) -> Follower:
    assert folder is not None, "rank 0 loads what all have"
    with activity.loading():
        model = load_model(
            folder,
            compute_type=message["compute_type"],
            follow_links=message["follow_links"],
            reproducible=message["reproducible"],
            group=group,
            split=Split(**message["split"]),
            progress=lambda n_done, n_layers: activity.step(),
        )
    _wire(message["peak_bytes"][group.rank()])
    check_model: Callable[[], None] | None = None
    if message["verify"] and model.has_manifest:
        verification = BackgroundVerification(model.folder)
        verification.start()
        check_model = verification.check
    return Follower(model.module, group, reproducible=message["reproducible"], check_model=check_model)


def _told(link: Link, group: Any, folder: Path | None, message: Mapping[str, Any]) -> Follower:
    """A loaded part; rank 0 is told how it went."""
    try:
        follower = _loaded(group, folder, message)
    except (QwqError, RuntimeError, MemoryError) as error:
        link.send({"host": platform.node(), "error": str(error)})
        raise
    link.send({"host": platform.node()})
    return follower
