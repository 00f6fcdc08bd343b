"""`--hosts localhost,b.local` and `--hostfile FILE`: where the processes run that hold a model together.

The first is this machine, which has the terminal, the files and the port; the others are reached by ssh. Before
anything starts, each is asked (`host_report`): does it answer, has it the same versions and the same model, is it
another machine than the rest, are its ports free. A hostfile is what `mlx.distributed_config` writes, with addresses
and Thunderbolt devices that it set up; without one the processes speak over whatever network ssh uses.

Does not: set up networks, or start processes (`launch` does).
"""

from __future__ import annotations

import os
import shlex
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwq_mlx.cli.rank import RankSetup
from qwq_mlx.errors import OptionError
from qwq_mlx.files.json_object import read_json_object

__all__ = ["BACKENDS", "Hosts", "RankHost", "parse_hosts", "read_hostfile", "ssh_command", "without_flags"]

BACKENDS = ("ring", "jaccl", "jaccl-ring", "nccl")
_SSH_VARIABLE = "QWQ_MLX_SSH"
_SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "AddressFamily=inet", "ServerAliveInterval=2")
_MOST = 64
_UNWANTED_S = 30.0  # for a process on another machine: a network that broke closes nothing
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHost:
    """Where one rank runs.

    name: as the user wrote it. ssh: how ssh calls it; None is this machine. ips: by which the others reach it.
    rdma: its Thunderbolt devices, by rank. python: its interpreter; None is this one's.
    """

    name: str
    ssh: str | None = None
    ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()
    python: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Where all ranks run.

    backend: of MLX. environment: further variables of each. ports: of each rank, one for each of its addresses; none
    before they were found.
    """

    ranks: tuple[RankHost, ...]
    backend: str = "ring"
    environment: dict[str, str] = field(default_factory=dict)
    ports: tuple[tuple[int, ...], ...] = ()

    def setup(self, rank: int, *, signs: int, snapshots: str) -> RankSetup:
        """What a rank has to know."""
        pairs = zip(self.ranks, self.ports, strict=True)
        addresses = [[f"{ip}:{port}" for ip, port in zip(host.ips, ports, strict=True)] for host, ports in pairs]
        environment = dict(self.environment)
        if self.backend == "nccl":  # a rank sees one device, the next of its machine
            own = self.ranks[rank]
            before = sum(host.ssh == own.ssh for host in self.ranks[:rank])
            environment["CUDA_VISIBLE_DEVICES"] = str(before)
        return RankSetup(
            rank=rank,
            addresses=addresses,
            backend=self.backend,
            rdma=[list(host.rdma) for host in self.ranks],
            environment=environment,
            signs=signs,
            snapshots=snapshots,
            unwanted_s=None if self.ranks[rank].ssh is None else _UNWANTED_S,
        )


def ssh_command() -> list[str]:
    """ssh with its options, which never asks anybody. $QWQ_MLX_SSH names another command, with its own options."""
    command = shlex.split(os.environ.get(_SSH_VARIABLE, "ssh"))
    return [*command, *(part for option in _SSH_OPTIONS for part in ("-o", option))]


def parse_hosts(text: str, *, backend: str | None = None) -> Hosts:
    """The processes that --hosts asks for: hosts with commas between them, each with *N for N processes there.

    backend: of MLX; None is ring. Raises OptionError for a first host that is not this machine, a host twice, a number
    that is none, or fewer than 2 processes.

    >>> [host.name for host in parse_hosts("localhost*2").ranks]
    ['localhost', 'localhost']
    >>> [host.ssh for host in parse_hosts("localhost,ben@b.local").ranks]
    [None, 'ben@b.local']
    """
    ranks: list[RankHost] = []
    seen: dict[str | None, str] = {}
    for each in text.split(","):
        name, star, number = each.strip().partition("*")
        if not name or name.startswith("-") or any(character.isspace() for character in name):
            raise OptionError(f"`hosts` has {each!r}, expected names with commas between them: localhost,b.local.")
        if star and number not in map(str, range(1, _MOST + 1)):
            raise OptionError(f"`hosts` has {each.strip()!r}, expected a number from 1 to {_MOST} behind the star.")
        ssh = None if is_local(name) else name
        if ssh in seen:
            other = "" if seen[ssh] == name else f", as {seen[ssh]}"
            raise OptionError(f"`hosts` names {name} twice{other}. Write {name}*2 for two processes there.")
        seen[ssh] = name
        ips = ("127.0.0.1",) if ssh is None else ()
        ranks += [RankHost(name=name, ssh=ssh, ips=ips)] * (int(number) if star else 1)
    return _checked(Hosts(ranks=tuple(ranks), backend=backend or "ring"), where="`hosts`")


def read_hostfile(path: Path, *, backend: str | None = None) -> Hosts:
    """The processes of a file that mlx.distributed_config wrote. backend: None takes the file's.

    Raises SourceError where it cannot be read, OptionError for what it holds.
    """
    advice = "Give a file that mlx.distributed_config wrote (docs/machines.md)."
    value = read_json_object(path, limit_bytes=_MAX_BYTES, advice=advice)
    try:
        ranks = tuple(
            RankHost(
                name=str(each["ssh"]),
                ssh=None if is_local(str(each["ssh"])) else str(each["ssh"]),
                ips=tuple(map(str, each["ips"])),
                rdma=tuple(each.get("rdma", ())),
            )
            for each in value["hosts"]
        )
        environment = dict(str(each).split("=", 1) for each in value.get("envs", ()))
        chosen = backend or value.get("backend") or "ring"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"{path}: is no hostfile ({error!r}). {advice}") from error
    if any(not host.ips or host.name.startswith("-") for host in ranks):
        raise OptionError(f"{path}: a host has no IP address, or no name. {advice}")
    if chosen.startswith("jaccl") and any(len(host.rdma) != len(ranks) for host in ranks):
        raise OptionError(f"{path}: `rdma` does not name a device for each of {len(ranks)} hosts. {advice}")
    return _checked(Hosts(ranks=ranks, backend=chosen, environment=environment), where=str(path))


def _checked(hosts: Hosts, *, where: str) -> Hosts:
    n_ranks = len(hosts.ranks)
    if not 2 <= n_ranks <= _MOST:
        raise OptionError(
            f"{where} asks for {n_ranks} process{'es' * (n_ranks != 1)}, expected 2 to {_MOST}: localhost,b.local, or "
            "localhost*2."
        )
    if hosts.ranks[0].ssh is not None:
        raise OptionError(
            f"{where} begins with {hosts.ranks[0].name}, expected this machine: it has the terminal, the files and the "
            "port. Run the command there, or put localhost first."
        )
    if hosts.backend not in BACKENDS:
        raise OptionError(f"{where} asks for the backend {hosts.backend!r}, expected {', '.join(BACKENDS)}.")
    if hosts.backend.startswith("jaccl") and not hosts.ranks[0].rdma:
        raise OptionError(f"The backend {hosts.backend} needs `hostfile`, made by mlx.distributed_config.")
    return hosts


def is_local(name: str) -> bool:
    """Whether a host is this machine: localhost, its own name, or an address of it."""
    if "@" in name:
        return False
    own = socket.gethostname().lower()
    if name.lower() in ("localhost", own, own.partition(".")[0], f"{own.partition('.')[0]}.local"):
        return True
    try:
        address = socket.inet_pton(socket.AF_INET, name) and name
        with socket.socket() as bound:
            bound.bind((address, 0))
    except OSError:
        return False
    return True


def without_flags(arguments: list[str], flags: set[str]) -> list[str]:
    """A command's arguments without some flags that take a value.

    >>> without_flags(["--hosts", "localhost*2", "--temp", "0", "--hostfile=m"], {"--hosts", "--hostfile"})
    ['--temp', '0']
    """
    rest, is_value = [], False
    for each in arguments:
        if is_value or each in flags:
            is_value = not is_value
        elif each.partition("=")[0] not in flags:
            rest.append(each)
    return rest
