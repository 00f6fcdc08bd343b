"""Asks each machine of `--hosts` whether it can take a part of the model, all at once, before anything is started.

Does not: start processes of the model, or read a weight.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwq_mlx.cli.host_report import report
from qwq_mlx.cli.hosts import Hosts, RankHost, ssh_command
from qwq_mlx.errors import LoadError
from qwq_mlx.files.model_identity import how_to_copy, model_identity, other_versions, possible_folders, versions

__all__ = ["checked_hosts"]

_Ranks = dict[str | None, list[int]]  # of each machine, by how ssh calls it
_Replies = dict[str | None, dict[str, Any]]

_ANSWER_S = 40.0  # of a machine that wakes up
_NO_PACKAGE = 97
_KEYS = {"versions", "machine", "models", "ports", "taken", "there", "here", "python"}  # of a report
_NOT_REACHED = 255  # of ssh itself


def checked_hosts(hosts: Hosts, folders: Sequence[Path], *, port: int | None) -> Hosts:
    """The hosts with addresses, ports and interpreters filled in.

    folders: of the models, on this machine. port: the first of those that the processes listen at; None takes any.
    Raises LoadError naming every machine that does not answer, lacks something or has other versions or another model.
    """
    groups: _Ranks = {}
    for rank, host in enumerate(hosts.ranks):
        groups.setdefault(host.ssh, []).append(rank)
    asked = {
        ssh: {
            "folders": [possible_folders(folder) for folder in folders],
            "ports": [
                0 if port is None else port + rank * _n_addresses(hosts.ranks[rank]) + place
                for rank in ranks
                for place in range(_n_addresses(hosts.ranks[rank]))
            ],
        }
        for ssh, ranks in groups.items()
    }
    with ThreadPoolExecutor(len(groups)) as threads:
        replies = dict(zip(groups, threads.map(lambda ssh: _asked(ssh, asked[ssh]), groups), strict=True))
    faults = _faults(hosts, groups, replies, folders)
    if faults:
        raise LoadError("\n".join([*faults, "Nothing was started."]))
    return _filled(hosts, groups, replies)


def _n_addresses(host: RankHost) -> int:
    return max(1, len(host.ips))


def _asked(ssh: str | None, question: dict[str, Any]) -> dict[str, Any]:
    """What a machine says, or {"error": why it says nothing}."""
    if ssh is None:
        return report(question)
    interpreters = _interpreters(Path(sys.executable), Path.home())
    script = (
        f"for p in {' '.join(interpreters)}; do "
        'if "$p" -c "import qwq_mlx" 2>/dev/null; then exec "$p" -m qwq_mlx.cli.host_report; fi; done; '
        f"exit {_NO_PACKAGE}"
    )
    try:
        done = subprocess.run(
            [*ssh_command(), ssh, script],
            input=json.dumps(question) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {_ANSWER_S:.0f} s"}
    except OSError as error:
        return {"error": f"ssh cannot be run ({error.strerror}); install OpenSSH's client"}
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode == _NO_PACKAGE:
        return {"error": f"has no python with qwq_mlx ({', '.join(interpreters)}). Install it there"}
    if done.returncode == _NOT_REACHED:
        return {
            "error": f"does not answer `ssh {ssh}` without a password: {last[0] or f'exit code {done.returncode}'}. "
            "Try that, and docs/machines.md"
        }
    if done.returncode:
        return {"error": f"cannot say what it has: {last[0] or f'exit code {done.returncode}'}"}
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"answers with {done.stdout[:80]!r}, expected JSON. Is another qwq_mlx installed there?"}
    if not isinstance(answer, dict) or not answer.keys() >= _KEYS:
        return {"error": f"answers with {done.stdout[:80]!r}, expected a report. Is another qwq_mlx installed there?"}
    return answer


def _interpreters(executable: Path, home: Path) -> list[str]:
    """Where another machine may have this one's Python, as words of a shell; a tilde is that machine's home."""
    words = [shlex.quote(str(executable))]
    if executable.is_relative_to(home):
        words.append(f"~/{shlex.quote(str(executable.relative_to(home)))}")
    return [*words, "python3"]


def _faults(hosts: Hosts, groups: _Ranks, replies: _Replies, folders: Sequence[Path]) -> list[str]:
    own, machines, faults = versions(), dict[str, str](), list[str]()
    for ssh, ranks in groups.items():
        name, reply = hosts.ranks[ranks[0]].name, replies[ssh]
        if "error" in reply:
            faults.append(f"{name}: {reply['error']}.")
            continue
        if differing := other_versions(reply["versions"], own, where="here"):
            faults.append(f"{name}: has other versions ({differing}). Install the same.")
        for folder, model in zip(folders, reply["models"], strict=True):
            if model is None:
                places = " or ".join(possible_folders(folder))
                faults.append(f"{name}: has no folder {places}. {how_to_copy(folder)}")
            elif model["identity"] != model_identity(folder):
                faults.append(f"{name}: {model['folder']} holds another model than {folder} here. Copy that one there.")
        if reply["taken"]:
            faults.append(f"{name}: port {reply['taken'][0]} is taken. Give another --hosts-port, or leave it out.")
        if reply["machine"] in machines:
            faults.append(
                f"{name}: is the same machine as {machines[reply['machine']]}. Name it once, as "
                f"{machines[reply['machine']]}*2."
            )
        machines[reply["machine"]] = name
    return faults


def _filled(hosts: Hosts, groups: _Ranks, replies: _Replies) -> Hosts:
    """Addresses are those over which ssh went, where no hostfile has others."""
    remote = [reply for ssh, reply in replies.items() if ssh is not None]
    here = remote[-1]["here"] if remote else ""
    ranks: list[RankHost] = list(hosts.ranks)
    ports: list[tuple[int, ...]] = [()] * len(ranks)
    missing = [
        hosts.ranks[own[0]].name
        for ssh, own in groups.items()
        if ssh is not None and not (hosts.ranks[own[0]].ips or replies[ssh]["there"])
    ]
    if missing:
        raise LoadError(
            f"{missing[0]}: its sshd does not say which addresses it uses (SSH_CONNECTION is not set). Make a hostfile "
            "with mlx.distributed_config (docs/machines.md). Nothing was started."
        )
    for ssh, own in groups.items():
        free = iter(replies[ssh]["ports"])
        for rank in own:
            host = hosts.ranks[rank]
            ips = host.ips
            if not ips or (ips == ("127.0.0.1",) and remote):
                ips = (here if ssh is None else replies[ssh]["there"],)
            python = None if ssh is None else replies[ssh]["python"]
            ranks[rank] = replace(host, ips=ips, python=python)
            ports[rank] = tuple(next(free) for _ in ips)
    return replace(hosts, ranks=tuple(ranks), ports=tuple(ports))
