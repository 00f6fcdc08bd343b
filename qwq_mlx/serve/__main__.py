"""`python -m qwq_mlx.serve`: one model for clients of OpenAI's, Ollama's and Anthropic's interfaces.

Three threads: this one waits and takes signals, one speaks HTTP, one owns the model. Results go to clients; stderr has
the address, a line for each request, and errors.

Does not: stay when the model is broken; whatever keeps it running (launchd, systemd) starts it again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwq_mlx.cli.command import Command, load_reasoner, make_parser, run_command
from qwq_mlx.cli.generate_flags import add_loading, bits
from qwq_mlx.cli.on_hosts import or_on_hosts
from qwq_mlx.errors import BackendError, OptionError, QwqError
from qwq_mlx.files.user_folders import user_data_folder
from qwq_mlx.options import Limits, Thinking
from qwq_mlx.progress import ProgressBar
from qwq_mlx.serve.history import History
from qwq_mlx.serve.settings import NO_THINK, REASONING_FIELDS, SERVED_LOOP_ACTIONS, Settings

if TYPE_CHECKING:
    from qwq_mlx.generate.reasoner import Reasoner

_LOOK_S = 0.5  # between two looks at whether a signal came


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, or_on_hosts(_serve), interrupted=lambda options: "ended at once")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "serve",
        description="Serve one model over HTTP to clients of OpenAI's, Ollama's and Anthropic's interfaces. "
        "docs/clients.md shows them.",
        exit_codes="0 ended by Ctrl-C or SIGTERM, 1 the model or the address failed, 2 wrong usage, 130 and 143 ended "
        "at once by a second signal",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (default: as python -m qwq_mlx.generate)")
    add("--name", metavar="NAME", help="of the model, as clients see it (default: the folder's)")
    _add_doors(add)
    _add_work(add)
    _add_runs(add)
    add_loading(add)
    parser.add_argument("--quiet", action="store_true", help="on stderr only warnings and errors")
    return parser


def _default(name: str) -> Any:
    return next(each.default for each in fields(Settings) if each.name == name)


def _add_doors(add: Any) -> None:
    """Who may ask."""
    add(
        "--host",
        metavar="ADDRESS",
        help=f"address to listen on; others than loopback need a key (default: {_default('host')})",
    )
    add("--port", type=int, metavar="N", help=f"port; 0 takes a free one (default: {_default('port')})")
    add("--api-key", metavar="KEY", help="what clients must send (everybody here can read it in the list of processes)")
    add("--api-key-file", metavar="FILE", help="file whose first line is the key")
    add(
        "--allow-host",
        action="append",
        metavar="NAME",
        dest="allowed_hosts",
        help="name in the Host header; repeatable",
    )
    add(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        dest="allowed_origins",
        help="web page that may use the server, for example https://example.org; repeatable",
    )
    add("--body-bytes", type=int, metavar="N", help=f"largest request body (default: {_default('body_bytes'):,})")


def _add_work(add: Any) -> None:
    """How requests are answered."""
    add("--width", type=int, metavar="N", help=f"requests decoded side by side, at most (default: {_default('width')})")
    add(
        "--queue",
        type=int,
        metavar="N",
        help=f"requests that may wait; more get status 429 (default: {_default('queue')})",
    )
    add(
        "--prefixes",
        type=int,
        metavar="N",
        help="KV caches of ended requests kept for prompts that begin alike, as far as the memory allows (default: "
        f"{_default('prefixes')})",
    )
    add("--context", type=int, metavar="N", help="positions of one request (default: what the memory allows)")
    add("--kv-bits", type=bits, choices=(8, 4, "auto"), help="bits of a quantized KV cache (default: off)")
    add(
        "--prefill-step",
        type=int,
        metavar="N",
        help=f"prompt tokens per pass, which is all that others wait for (default: {_default('prefill_step')})",
    )
    add(
        "--reproducible",
        action="store_true",
        help="a request's tokens are the same whatever runs beside it, to the last near-tie (see generate); slower",
    )
    add("--think-tokens", type=int, metavar="N", help="thinking budget of requests that name none (default: none)")
    add("--on-loop", choices=SERVED_LOOP_ACTIONS, help="as generate's (default: answer)")
    add(
        "--reasoning-field",
        choices=REASONING_FIELDS,
        help=f"where OpenAI's clients find the thinking (default: {_default('reasoning_field')})",
    )
    add(
        "--no-think",
        choices=NO_THINK,
        help="for clients that ask for no thinking: hide it, or ask for the answer at once (default: "
        f"{_default('no_think')})",
    )
    add(
        "--drain",
        type=float,
        metavar="SECONDS",
        dest="drain_s",
        help=f"for requests and runs under way after SIGTERM (default: {_default('drain_s'):g})",
    )


def _add_runs(add: Any) -> None:
    """What is kept of watched runs."""
    add(
        "--runs-folder",
        metavar="DIR",
        type=Path,
        help="where clients of /api/qwq/runs may save runs (default: nowhere)",
    )
    add(
        "--history",
        metavar="FILE",
        type=Path,
        help="where runs of /api/qwq/runs and of the page are kept (default: history.sqlite3 in this user's data "
        "folder)",
    )
    add("--no-history", action="store_true", help="keep runs in memory only")
    add(
        "--history-bytes",
        type=int,
        metavar="N",
        help=f"of runs that are kept, the oldest go first (default: {_default('history_bytes'):,})",
    )


def _settings(options: argparse.Namespace) -> Settings:
    values = {each.name: getattr(options, each.name, None) for each in fields(Settings)}
    values["api_key"] = _key(options)
    values["allowed_hosts"] = tuple(host.lower() for host in options.allowed_hosts or ())
    values["allowed_origins"] = tuple(options.allowed_origins or ())
    thinking = {name: getattr(options, name) for name in ("think_tokens", "on_loop")}
    values["thinking"] = Thinking(**{name: value for name, value in thinking.items() if value is not None})
    return Settings(**{name: value for name, value in values.items() if value is not None})


def _key(options: argparse.Namespace) -> str | None:
    if options.api_key_file is None:
        return str(options.api_key) if options.api_key is not None else None
    if options.api_key is not None:
        raise OptionError("--api-key and --api-key-file exclude each other.")
    try:
        with Path(options.api_key_file).open(encoding="utf-8") as file:
            return file.readline(4_096).strip()
    except (OSError, ValueError) as error:
        raise OptionError(f"--api-key-file {options.api_key_file}: cannot be read ({error}).") from error


def _serve(command: Command) -> int:
    settings = _settings(command.options)
    try:
        from qwq_mlx.serve.server import Server
    except ImportError as error:
        raise BackendError(
            f"The server needs starlette and uvicorn ({error}): pip install 'qwq-mlx[serve]'."
        ) from error
    limits = Limits(context=settings.context, prefill_step=settings.prefill_step, kv_bits=command.options.kv_bits)
    reproducible = command.options.reproducible

    def load() -> Reasoner:
        with ProgressBar(unit="layer", is_shown=not command.is_quiet) as bar:
            return load_reasoner(
                command,
                limits,
                reproducible=reproducible,
                progress=lambda n_done, n_layers: bar.show("loading", n_done, n_layers),
            )

    history = _history(command, settings.history_bytes)
    server = Server(load, settings, history=history, log=command.note, warn=command.warn)
    host, port = server.start()
    command.interruption.run = server
    shown = f"[{host}]" if ":" in host else host
    command.note(f"http://{shown}:{port} loads the model; Ctrl-C ends, and what runs has {settings.drain_s:g} s")
    is_told = False
    try:
        while not server.wait(_LOOK_S):
            if not is_told and server.is_ready:
                command.note(f"ready: {server.description}")
                is_told = True
                # Python looks for cycles among all objects only once a quarter of them is new, and of 200,000 of the
                # libraries that is an hour of requests. Without these it looks often, and pauses for milliseconds.
                gc.collect()
                gc.freeze()
                gc.collect()  # so that the quarter is one of what is left
    except KeyboardInterrupt:  # the second signal
        server.abort()
        raise
    if server.failure is None:
        return 0
    if isinstance(server.failure, QwqError):
        raise server.failure
    raise BackendError(f"The model's thread ended by {type(server.failure).__name__}: {server.failure}")


def _history(command: Command, max_bytes: int) -> History | None:
    """Where runs are kept. A second server with the default file keeps none, and says so."""
    named, is_off = command.options.history, command.options.no_history
    if is_off and named is not None:
        raise OptionError("--history and --no-history exclude each other.")
    if is_off:
        return None
    try:
        path = named or user_data_folder(os.environ) / "history.sqlite3"
        history = History(path, max_bytes=max_bytes)
        command.note(f"runs of the page are kept in {path}; `no_history` keeps none")
        return history
    except OptionError as error:
        if named is not None:
            raise
        command.warn(f"warning: runs are kept in memory only. {command.explain(error)}")
        return None


if __name__ == "__main__":
    sys.exit(main())
