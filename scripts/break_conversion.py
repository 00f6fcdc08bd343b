"""Break a conversion at every operation in every way, finish it, compare the bytes, and print the counts.

    python scripts/break_conversion.py [--every N] [--ways WAY ...] [--seed N] [--budget SECONDS]

At each file operation of a small conversion: a kill before it, a torn write, a full disk, a broken disk, a power cut
that loses everything not synced, and one that loses a random part of it. A run is good when the final name never held
a damaged folder, the rerun ended with the bytes of an undisturbed run, and at most one tensor was written twice; and,
where the disk is full, when the message has the path and the bytes that are needed and free.

The tests do the same at a few points (tests/convert/test_convert_crashes.py). Whole processes are broken by
scripts/break_processes.py, sources by scripts/break_source.py.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "convert"), str(ROOT / "scripts")]

from checkpoints import write_tiny_checkpoint  # noqa: E402 - the paths must be set first
from faulty_disk import FaultyDisk  # noqa: E402
from tally import Tally, add_budget  # noqa: E402

from qwq_mlx.convert import convert_checkpoint, plan  # noqa: E402
from qwq_mlx.convert.write import ShardWriter  # noqa: E402
from qwq_mlx.errors import QwqError  # noqa: E402
from qwq_mlx.files.manifest import MANIFEST_NAME, read_manifest, verify_full  # noqa: E402

WAYS = ("kill", "torn", "full", "broken", "power cut", "power cut, by lot")
_FULL = re.compile(r"out(\.partial/\S+)?: the disk is full: writing [\d,]+ bytes failed, [\d,]+ are free")
N_TOKENS = 160  # of text that the quality is measured on: the page and its numbers must come out the same, too
_KINDS = {"power cut": "torn", "power cut, by lot": "torn"}


def main() -> int:
    """Run everything; 1 if anything was not good."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="take every N-th operation (default: 1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    add_budget(parser)
    options = parser.parse_args()
    tally = Tally(options.budget).stop_at_interrupt()
    plan.BLOCK_BYTES = 8192
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        source = write_tiny_checkpoint(home / "source", n_layers=1)
        with FaultyDisk(_folder(home / "count")) as disk:
            convert_checkpoint(source, home / "count" / "out", n_workers=2, quality=True, quality_tokens=N_TOKENS)
        expected = content(home / "count" / "out")
        for way in options.ways:
            tally.begin(way)
            break_everywhere(
                way, source, home, expected, range(0, disk.n_operations, options.every), tally, options.seed
            )
            tally.end()
    return tally.finish()


def break_everywhere(
    way: str, source: Path, home: Path, expected: dict[str, object], operations: range, counts: Tally, seed: int
) -> None:
    """One fault of a kind at each of these operations."""
    lot = random.Random(seed)
    for number in counts.until("runs", len(operations)):
        at = operations[number]
        folder = _folder(home / "run")
        output = folder / "out"
        with watched() as first, FaultyDisk(folder, at=at, kind=_KINDS.get(way, way)) as disk:
            try:
                convert_checkpoint(source, output, n_workers=2, quality=True, quality_tokens=N_TOKENS)
            except QwqError as error:
                counts["refused with a message"] += 1
                if way == "full" and not _FULL.search(str(error)):
                    counts["A MESSAGE WITHOUT PATH AND BYTES"] += 1
        if way.startswith("power cut"):
            disk.lose_power(lot if "lot" in way else None)
        counts[outcome(source, output, expected, first)] += 1
        counts["runs"] += 1
        shutil.rmtree(folder)


def outcome(source: Path, output: Path, expected: dict[str, object], first: list[str]) -> str:
    """What a broken run left, and what the rerun made of it."""
    if output.exists():
        try:
            verify_full(output)
        except QwqError:
            return "DAMAGED UNDER THE FINAL NAME"
        return "published before the fault" if content(output) == expected else "OTHER BYTES"
    with watched() as second:
        convert_checkpoint(source, output, n_workers=2, quality=True, quality_tokens=N_TOKENS)
    if content(output) != expected:
        return "OTHER BYTES AFTER THE RERUN"
    return "finished by the rerun" if len(set(first) & set(second)) <= 1 else "REPEATED MORE THAN ONE TENSOR"


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; the manifest without the figures of the run."""
    found: dict[str, object] = {each.name: each.read_bytes() for each in folder.iterdir() if each.name != MANIFEST_NAME}
    return {**found, MANIFEST_NAME: replace(read_manifest(folder), run={})}


@contextmanager
def watched() -> Iterator[list[str]]:
    """Names of the tensors whose first bytes are written meanwhile."""
    started: list[str] = []
    write = ShardWriter.write

    def noted(writer: ShardWriter, packed: object) -> None:
        if packed.block.first_row == 0:
            started.append(packed.block.tensor.source.name)
        write(writer, packed)

    ShardWriter.write = noted
    try:
        yield started
    finally:
        ShardWriter.write = write


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
