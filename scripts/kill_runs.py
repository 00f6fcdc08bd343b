"""End a run that saves itself every 3 tokens at random points, and go on from its file every time.

    python scripts/kill_runs.py --model FOLDER [--kills 100] [--tokens 300] [--signals KILL TERM HUP] [--budget SECONDS]

The run is `python -m qwq_mlx.generate --save FILE --save-every 3`, ended by the signals in turns: after a random number
of its checkpoints and a random part of the time that one takes, so that kills spread over the whole run on a busy
machine, too. Good is a file that is whole, goes on to the very ids of an undisturbed run, and, after a signal that can
be caught, an exit code of 128 and its number. Also counted: kills that left a temporary file, which the next run
removes. Every kill prints the counts, so a run that is cut short loses none.

Does not: cut power (fsync is trusted).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from tally import Tally, add_budget  # noqa: E402 - the path must be set first

import qwq_mlx.default_model  # noqa: E402
import qwq_mlx.generate.checkpoint.autosave  # noqa: E402, F401
from qwq_mlx.errors import QwqError  # noqa: E402
from qwq_mlx.generate import __main__ as command  # noqa: E402
from qwq_mlx.generate.checkpoint.file import read_checkpoint  # noqa: E402
from qwq_mlx.generate.reasoner import load  # noqa: E402
from qwq_mlx.model.upstream import import_mlx_lm  # noqa: E402
from qwq_mlx.options import Limits, Sampling  # noqa: E402

_SEED = 4
_EVERY = 3
_OUTCOMES = ("went on to the same ids", "were saved at their end already", "OTHER IDS", "A FILE THAT CANNOT BE RESUMED")


def main() -> int:
    """Run the script; 1 if anything was not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM", "HUP", "INT"), default=["KILL"])
    add_budget(parser)
    options = parser.parse_args()
    for module in ("mlx_lm.models.qwen2", "mlx_lm.models.cache"):
        import_mlx_lm(module)  # imported here, run only in the children: MLX does not survive a fork once it computed
    tally = Tally(options.budget, every=1).stop_at_interrupt()
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        path, undisturbed = Path(folder) / "run", Path(folder) / "undisturbed"
        began_s = time.monotonic()
        if exit_code(forked(lambda: _write_ids(options, undisturbed))):
            sys.exit("the undisturbed run failed")
        n_tokens = len(json.loads(undisturbed.read_text()))
        one_s = (time.monotonic() - began_s) * _EVERY / n_tokens
        tally.begin(f"runs of {n_tokens:,} tokens")
        for _ in tally.until("kills", options.kills):
            path.unlink(missing_ok=True)
            name = options.signals[tally["kills"] % len(options.signals)]
            child = forked(lambda: _run(options, path))
            n_most, delay_s = draws.randint(1, n_tokens // _EVERY), draws.uniform(0.0, one_s)
            code = _killed(child, path, signal.Signals[f"SIG{name}"], n_most=n_most, delay_s=delay_s)
            if code == 0:
                tally["runs that were done before"] += 1
                continue
            tally["kills"] += 1
            tally[f"SIG{name} with exit code {code}" if code == _code_of(name) else f"SIG{name} WITH CODE {code}"] += 1
            tally["kills that left a temporary file"] += any(Path(folder).glob(".*.tmp"))
            tally[_OUTCOMES[exit_code(forked(lambda: _outcome(options, path, undisturbed)))]] += 1
        tally.end()
    return tally.finish()


def _run(options: argparse.Namespace, path: Path) -> int:
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    given = ["--model", options.model, "--prompt", "x", "--temp", "1", "--seed", str(_SEED), "--quiet"]
    return command.main([*given, "--max-tokens", str(options.tokens), "--save", str(path), "--save-every", str(_EVERY)])


def _write_ids(options: argparse.Namespace, path: Path) -> int:
    limits, sampling = Limits(max_tokens=options.tokens), Sampling(temperature=1.0, seed=_SEED)
    path.write_text(json.dumps([step.id for step in load(options.model).stream("x", sampling=sampling, limits=limits)]))
    return 0


def _outcome(options: argparse.Namespace, path: Path, undisturbed: Path) -> int:
    """What a file is worth, as a place in _OUTCOMES."""
    whole = json.loads(undisturbed.read_text())
    try:
        state = read_checkpoint(path)[0]
        saved = [step[0] for step in state["steps"]]
        if state["finish_reason"] == "stop" and saved == whole:
            return 1
        rest = [step.id for step in load(options.model).resume(path)]
    except QwqError as error:
        print(error, file=sys.stderr, flush=True)
        return 3
    return 0 if saved + rest == whole else 2


def _code_of(name: str) -> int:
    number = signal.Signals[f"SIG{name}"]
    return -number if name == "KILL" else 128 + number


def forked(work: Callable[[], int]) -> int:
    """The process that does the work, with all imports done and nothing on stdout; it exits with what work returns."""
    child = os.fork()
    if not child:
        code = 70  # whatever work raises, the child must not go on as its parent
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return child


def exit_code(child: int, flags: int = 0) -> int | None:
    """Its exit code, or minus the signal that ended it; None while it runs."""
    pid, status = os.waitpid(child, flags)
    return os.waitstatus_to_exitcode(status) if pid else None


def _killed(child: int, path: Path, number: int, *, n_most: int, delay_s: float) -> int | None:
    """Signal the run delay_s after its n_most-th checkpoint; its exit code."""
    n_seen, last, code = 0, None, None
    while code is None and n_seen < n_most:
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.is_file() else None
        n_seen, last = n_seen + (now != last), now
        code = exit_code(child, os.WNOHANG)
    if code is not None:
        return code
    time.sleep(delay_s)
    os.kill(child, number)
    return exit_code(child)


if __name__ == "__main__":
    sys.exit(main())
