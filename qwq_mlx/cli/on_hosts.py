"""A command with --hosts: what is wrong is told before a process starts, all run, and a failure keeps what was written.

Does not: know what the command does; rank 0 is the same command without these flags.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwq_mlx.cli.command import Command
from qwq_mlx.cli.host_check import checked_hosts
from qwq_mlx.cli.hosts import parse_hosts, read_hostfile, without_flags
from qwq_mlx.cli.launch import Launch
from qwq_mlx.cli.rank import RANK_VARIABLE, joined_group
from qwq_mlx.errors import OptionError, QwqError, RankError

__all__ = ["or_on_hosts"]

_FLAGS = {"--hosts", "--hostfile", "--hosts-backend", "--hosts-port"}


def or_on_hosts(work: Callable[[Command], int]) -> Callable[[Command], int]:
    """The work of a command, or where --hosts is given several processes that do it together."""

    def on_hosts_or_here(command: Command) -> int:
        if _is_for_hosts(command.options):
            return _work_on_hosts(command)
        group = joined_group()
        if group is not None:  # this is rank 0, which is watched from here on, whatever it does before it loads
            from qwq_mlx.generate.following import lead

            lead(group)
        return work(command)

    return on_hosts_or_here


def _is_for_hosts(options: Any) -> bool:
    """Whether several processes are to hold the model. Raises OptionError for flags that do not go together."""
    values = vars(options)
    named = [name for name in ("hosts", "hostfile") if values.get(name) is not None]
    if len(named) == 2:
        raise OptionError("`hosts` and `hostfile` exclude each other.")
    is_started = bool(named) or RANK_VARIABLE in os.environ  # by this command, or as its rank 0
    for name in ("hosts_backend", "hosts_port", "hosts_split"):
        if values.get(name) is not None and not is_started:
            raise OptionError(f"`{name}` needs `hosts` or `hostfile`.")
    return bool(named)


def _work_on_hosts(command: Command) -> int:
    """Check all machines, run the command as rank 0 with the others behind it; returns its exit code."""
    options = command.options
    backend, port = options.hosts_backend, options.hosts_port
    if port is not None and not 1 <= port <= 65_000:
        raise OptionError(f"hosts_port is {port}, expected from 1 to 65,000.")
    if options.hosts is not None:
        hosts = parse_hosts(options.hosts, backend=backend)
    else:
        hosts = read_hostfile(Path(options.hostfile), backend=backend)
    folders = _checked_models(command, len(hosts.ranks))
    hosts = checked_hosts(hosts, folders, port=port)
    command.note(
        f"{len(hosts.ranks)} processes hold the model together: {', '.join(each.name for each in hosts.ranks)}"
    )
    module = command.parser.prog.rpartition(" ")[2]
    launch = Launch(
        module,
        without_flags(list(command.arguments), _FLAGS),
        hosts,
        warn=command.warn,
        on_failure=lambda error: command.fail(str(error), error.exit_code),
    )
    command.interruption.run = launch
    try:
        return launch.work()
    except KeyboardInterrupt:  # rank 0 waited inside MLX, where it hears no signal
        _keep_run(command, launch.snapshots)
        raise
    except RankError as error:
        _keep_run(command, launch.snapshots)
        return error.exit_code
    finally:
        command.interruption.run = None
        launch.close()


def _checked_models(command: Command, n_ranks: int) -> list[Path]:
    """The folders of the command's models, converted where that is due.

    Raises OptionError for more processes than layers, and for --hosts-split tensor where something does not divide.
    """
    from qwq_mlx.default_model import choose_model, ready_model
    from qwq_mlx.model.folder import open_model_folder
    from qwq_mlx.model.split import check_split, tensor_split

    named = command.options.model
    folders = []
    for name in named if isinstance(named, list) else [named]:
        files = open_model_folder(
            ready_model(choose_model(name), command.note), follow_links=command.options.follow_links
        )
        if n_ranks > files.config.num_hidden_layers:
            raise OptionError(
                f"`hosts` has {n_ranks} processes, expected at most {files.config.num_hidden_layers}, the layers of "
                f"{files.path}."
            )
        if command.options.hosts_split == "tensor":
            check_split(tensor_split(files.config, n_ranks), files.config, files.packed)
        folders.append(files.path)
    return folders


def _keep_run(command: Command, snapshot: Path) -> None:
    """Save what rank 0 had written, in the file of --save or one of its own."""
    options = vars(command.options)
    if not snapshot.exists() or (options.get("no_save") and options.get("save") is None):
        return
    from qwq_mlx.generate.checkpoint.snapshot import save_snapshot

    path = options.get("save") or f"{time.strftime('qwq-run-%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        n_tokens = save_snapshot(snapshot, Path(path))
    except QwqError as error:
        command.warn(f"warning: not saved: {error}")
    else:
        command.warn(f"saved: {n_tokens:,} tokens; go on with `resume` {path}, in one process or in several")
