"""A process that has imported what every command imports, and forks into the command that a test asks for.

Importing takes 1.2 of the 1.4 CPU seconds of a short command. Nothing has been evaluated by MLX when it forks (its
threads would be missing in the child), and the fork runs to the very end of the interpreter, as `python -m` would.
`commands.py` talks to it: a line of JSON and the standard streams come over the socket on stdin.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import warnings
from typing import Any

_MAX_REQUEST = 1 << 20


def _import_all() -> None:
    """Import as loading a model and running it do."""
    from qwq_mlx.model.upstream import import_mlx_lm

    for name in ("utils", "models.qwen2", "models.cache", "sample_utils"):
        import_mlx_lm(f"mlx_lm.{name}")
    import transformers.models.auto.tokenization_auto
    import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

    import qwq_mlx.cli.terminal
    import qwq_mlx.generate.reasoner  # noqa: F401

    gc.freeze()  # what is collected at the end of every command would be all of it


def _next_command(requests: socket.socket) -> dict[str, Any]:
    """Wait for requests and fork for each; returns in the child that is to become the command."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 4)
        while data and not data.endswith(b"\n"):
            data += requests.recv(_MAX_REQUEST)
        if not data:
            os._exit(0)
        if os.fork() == 0:  # tells the test how the command ended, which only its parent can know
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = descriptors.pop()
            pid = os.fork()
            if pid == 0:
                os.close(status)
                requests.close()
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return dict(json.loads(data))
            for descriptor in descriptors:
                os.close(descriptor)
            os.write(status, b"%d " % pid)
            os.write(status, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    command = _next_command(socket.socket(fileno=os.dup(0)))
    if command["on_terminal"]:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # closing it sends SIGHUP, and its keys send signals
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    # Anew, because a stream remembers whether its file can seek.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    warnings.simplefilter("error")
    sys.argv = ["", *command["arguments"]]
    runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
