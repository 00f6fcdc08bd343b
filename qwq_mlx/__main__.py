"""`python -m qwq_mlx` lists the commands; `qwq-mlx COMMAND ...` is `python -m qwq_mlx.COMMAND ...` where installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_HELP = ("-h", "--help", "help")


def main() -> int:
    """Run the command that the first argument names, with the arguments after it; returns the exit code."""
    commands = _commands()
    if len(sys.argv) < 2 or sys.argv[1] in _HELP:
        print("usage: qwq-mlx COMMAND [arguments]     (the same as python -m qwq_mlx.COMMAND; --help shows more)\n")
        for command, purpose in commands.items():
            print(f"  {command:<10} {purpose}")
        return 0
    command = sys.argv[1]
    if command not in commands:
        print(f"error: there is no command {command!r}, expected one of {', '.join(commands)}", file=sys.stderr)
        return 2
    sys.argv = [f"qwq-mlx {command}", *sys.argv[2:]]
    runpy.run_module(f"qwq_mlx.{command}", run_name="__main__", alter_sys=True)
    return 0  # the command left with its own code, unless it ended well


def _commands() -> dict[str, str]:
    """Every folder with a __main__ is a command; the first line of its docstring says what it does."""
    commands = {}
    for path in sorted(Path(__file__).parent.glob("*/__main__.py")):
        first = path.read_text(encoding="utf-8").split('"""')[1].split("\n")[0]
        commands[path.parent.name] = first.partition(": ")[2].rstrip(".")
    return commands


if __name__ == "__main__":
    sys.exit(main())
