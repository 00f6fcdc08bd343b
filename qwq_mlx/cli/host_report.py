"""`python -m qwq_mlx.cli.host_report`: what a machine says of itself before it takes a part of a model.

It reads a question as one line of JSON and answers with one: versions, where the model is, what machine it is, and free
ports.

Does not: compare anything (`host_check` does), or import MLX.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from qwq_mlx.files.model_identity import found_folder, machine_name, model_identity, versions

__all__ = ["report"]


def report(asked: dict[str, Any]) -> dict[str, Any]:
    """asked: folders, lists of places of each model, the first that is there counts; ports, those that are needed, 0
    for any."""
    models = []
    for places in asked["folders"]:
        folder = found_folder(places)
        models.append(None if folder is None else {"folder": str(folder), "identity": model_identity(folder)})
    ports, taken = _free_ports(asked["ports"])
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "versions": versions(),
        "machine": machine_name(),
        "models": models,
        "ports": ports,
        "taken": taken,
        "there": connection[2] if len(connection) == 4 else "",
        "here": connection[0] if len(connection) == 4 else "",
        "python": sys.executable,
    }


def _free_ports(asked: Sequence[int]) -> tuple[list[int], list[int]]:
    """A port for each that is asked for, and those that are taken."""
    ports, taken = [], []
    with contextlib.ExitStack() as stack:
        for port in asked:
            bound = stack.enter_context(socket.socket())
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bound.bind(("", port))
                bound.listen(1)
            except OSError:
                taken.append(port)
                continue
            ports.append(bound.getsockname()[1])
    return ports, taken


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(json.loads(sys.stdin.readline()))) + "\n")
