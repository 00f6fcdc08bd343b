"""Subjects that begin at a folder on disk: load, first token, convert; in seconds, from the page cache.

Imports are outside: the warm-up round has done them. The plain read of the weight files is a contestant too: nobody who
reads them can be faster.

Does not: empty the page cache (it would need root), so a cold disk takes longer by what it is slower.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qwq_mlx.bench.decode import QUESTION
from qwq_mlx.bench.loops import sampling
from qwq_mlx.bench.subject import AS_LOADED, OURS, Bench, Row
from qwq_mlx.bench.timing import seconds_of
from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.load import load_model
from qwq_mlx.model.upstream import import_mlx, import_mlx_lm
from qwq_mlx.options import Limits

__all__ = ["bench_convert", "bench_first_token", "bench_load"]

_THEIR_COMMAND, _READ = "mlx_lm.convert", "reading the files"
_RECIPE = "4bit-min-max"  # what mlx_lm.convert -q does
_BLOCK_BYTES = 8 << 20


def bench_load(bench: Bench) -> list[Row]:
    """From a folder to weights in memory, with the tokenizer."""
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: seconds_of(lambda: load_model(bench.folder)),
        AS_LOADED: lambda: seconds_of(lambda: import_mlx_lm("mlx_lm.utils").load(str(bench.folder))),
        _READ: lambda: seconds_of(lambda: _read(bench.folder)),
    }
    return [_row(bench, "load", bench.name, "weights and tokenizer", contestants)]


def bench_first_token(bench: Bench) -> list[Row]:
    """From a folder to the first token of a short question."""
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: seconds_of(lambda: _our_first(bench.folder)),
        AS_LOADED: lambda: seconds_of(lambda: _their_first(bench)),
        _READ: lambda: seconds_of(lambda: _read(bench.folder)),
    }
    return [_row(bench, "first-token", bench.name, "load, prompt, one token", contestants)]


def bench_convert(bench: Bench) -> list[Row]:
    """A checkpoint packed to 4 bits in a temporary folder; ours also syncs, reads back and hashes."""
    with tempfile.TemporaryDirectory(prefix="qwq-mlx-bench-") as scratch:
        output = Path(scratch) / "converted"
        contestants: dict[str, Callable[[], float]] = {
            OURS: lambda: _seconds_into(output, lambda: _our_conversion(bench.source, output)),
            _THEIR_COMMAND: lambda: _seconds_into(output, lambda: _their_conversion(bench.source, output)),
        }
        return [_row(bench, "convert", bench.source.resolve().name, "4 bits, min/max", contestants)]


def _row(bench: Bench, subject: str, model: str, setting: str, contestants: dict[str, Callable[[], float]]) -> Row:
    runs = bench.turns(contestants, f"{model}, {subject}")
    return Row(subject=subject, model=model, setting=setting, unit="s", runs=runs)


def _read(folder: Path) -> None:
    """Read every weight file to its end."""
    block = bytearray(_BLOCK_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _our_first(folder: Path) -> None:
    reasoner = load(folder, verify=False)
    next(iter(reasoner.stream(QUESTION, sampling=sampling(), limits=Limits(max_tokens=1))))


def _their_first(bench: Bench) -> None:
    module, tokenizer = import_mlx_lm("mlx_lm.utils").load(str(bench.folder))[:2]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    stream = import_mlx_lm("mlx_lm.generate").stream_generate
    next(iter(stream(module, tokenizer, ids, max_tokens=1)))


def _our_conversion(source: Path, output: Path) -> None:
    convert_checkpoint(source, output, recipe=_RECIPE, quality=False)


def _their_conversion(source: Path, output: Path) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # it prints lines of its own, and stdout is ours
        import_mlx_lm("mlx_lm.convert").convert(str(source), str(output), quantize=True)


def _seconds_into(output: Path, work: Callable[[], None]) -> float:
    """Seconds of a conversion; what it wrote is removed outside of them."""
    seconds = seconds_of(work)
    shutil.rmtree(output)
    import_mlx().clear_cache()
    return seconds
