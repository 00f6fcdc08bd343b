"""`python -m qwq_mlx.cli.follow`: what `--hosts` starts for each rank but the first, here or over ssh.

Its stdin tells it what it is, and then a line every half second that it is still wanted, or that nobody will say so
for a while; its stdout takes the signs of life. When stdin ends, or a machine at the other end of a broken network says
nothing for 30 s, it ends itself.

Does not: take arguments; nobody starts it by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading

from qwq_mlx.cli.rank import PAUSED, RankSetup, join
from qwq_mlx.errors import QwqError

__all__ = ["main"]


def main() -> int:
    """Follow rank 0 until it ends; returns the exit code."""
    with contextlib.suppress(OSError):  # it is one already where it was started here
        os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signs = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no sign of life
    setup = RankSetup(**(json.loads(sys.stdin.readline()) | {"signs": signs}))
    threading.Thread(
        target=_end_when_unwanted, args=(sys.stdin.fileno(), setup.unwanted_s), daemon=True, name="wanted"
    ).start()
    try:
        group = join(setup)
        from qwq_mlx.generate.following import follow

        follow(group)
    except QwqError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _end_when_unwanted(descriptor: int, unwanted_s: float | None) -> None:
    patience = unwanted_s
    while select.select([descriptor], [], [], patience)[0] and (said := os.read(descriptor, 4096)):
        patience = None if said.endswith(PAUSED) else unwanted_s
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
