"""Break what a conversion reads, and what it made: at every read, between kill and rerun, in any weight, in any bit.

    python scripts/break_source.py [--every N] [--changes N] [--poisons N] [--flips N] [--seed N]
        [--budget SECONDS]

Reads: at each read of a shard an I/O error, a short file, a vanished shard. Changes: after a kill at a random operation
the source gets a flipped bit (its time put back), another config, another length, or the recipe or MLX is another; the
rerun refuses, or what changed had not been read and the result is that of the changed source alone. Poisons: NaN and
infinity in any weight are named by tensor, row and column; zeroed tensors and pages are warned of. Flips: one bit in
every region of a conversion; the full check finds all of them, the check of every load those outside the weights.

Small versions of all of these are tests; this prints the counts of many.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "convert"), str(ROOT / "scripts")]

from break_conversion import content  # noqa: E402 - the paths must be set first
from checkpoints import write_tiny_checkpoint  # noqa: E402
from faulty_disk import FaultyDisk  # noqa: E402
from tally import Tally, add_budget  # noqa: E402

from qwq_mlx.convert import convert_checkpoint, plan, read  # noqa: E402
from qwq_mlx.convert import finalize as finish  # noqa: E402
from qwq_mlx.errors import QwqError  # noqa: E402
from qwq_mlx.files.header import TensorEntry, read_header  # noqa: E402
from qwq_mlx.files.manifest import check_sizes, verify_full  # noqa: E402


def main() -> int:
    """Run everything; 1 if anything was not good."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="take every N-th read (default: 1)")
    parser.add_argument("--changes", type=int, default=100, help="changed sources (default: 100)")
    parser.add_argument("--poisons", type=int, default=200, help="poisoned weights (default: 200)")
    parser.add_argument("--flips", type=int, default=60, help="flipped bits per region of 12 (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    add_budget(parser)
    options = parser.parse_args()
    plan.BLOCK_BYTES = 8192
    lot, tally = random.Random(options.seed), Tally(options.budget).stop_at_interrupt()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        source = write_tiny_checkpoint(home / "source", n_layers=1)
        for part in (break_reads, change_sources, poison, flip):
            tally.begin(part.__name__)
            part(source, home, options, lot, tally)
            tally.end()
    return tally.finish()


def break_reads(source: Path, home: Path, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
    """C5: an error, an early end and a vanished shard at every read; each is named, and the rerun is whole."""
    expected = _converted(source, home / "whole")
    real, n_reads = read._pread, 0

    def counted(fd: int, view: memoryview, position: int) -> int:
        nonlocal n_reads
        n_reads += 1
        return real(fd, view, position)

    read._pread = counted
    _converted(source, home / "count")
    faults = [(way, at) for way in ("error", "short", "half") for at in range(0, n_reads, options.every)]
    for number in counts.until("runs", len(faults)):
        way, at = faults[number]
        output, n = home / "out", 0

        def broken(fd: int, view: memoryview, position: int, at: int = at, way: str = way) -> int:
            nonlocal n
            n += 1
            if n <= at:
                return real(fd, view, position)
            if way == "error":
                raise OSError(5, "Input/output error")
            return 0 if way == "short" else real(fd, view[: max(1, len(view) // 2)], position)

        read._pread = broken
        try:
            convert_checkpoint(source, output, n_workers=2, quality=False)
            counts["read to the end by halves" if way == "half" else "A FAULT UNNOTICED"] += 1
        except QwqError as error:
            is_named = ".safetensors: tensor " in str(error)
            counts["refused, shard and tensor named" if is_named and not output.exists() else "NOT NAMED"] += 1
        read._pread = real
        if not output.exists():
            convert_checkpoint(source, output, n_workers=2, quality=False)
        counts["runs"] += 1
        counts["same bytes in the end" if content(output) == expected else "OTHER BYTES"] += 1
        shutil.rmtree(output)
    read._pread = real


def change_sources(source: Path, home: Path, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
    """C8: the source, the recipe or MLX changes between a kill and the rerun."""
    with FaultyDisk(_folder(home / "operations")) as disk:
        convert_checkpoint(source, home / "operations" / "out", n_workers=2, quality=False)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    version = finish.package_version
    for number in counts.until("changes", options.changes):
        counts["changes"] += 1
        folder = _folder(home / f"change-{number}")
        changed = Path(shutil.copytree(source, folder / "source"))
        with FaultyDisk(folder, at=lot.randrange(16, disk.n_operations - 16), kind="kill"):
            convert_checkpoint(changed, folder / "out", n_workers=2, quality=False)
        way, recipe = ("bit", "bit", "config", "length", "recipe", "mlx")[number % 6], "qwq-32b-preview-4bit"
        if way == "bit":
            _flip_weight(changed / lot.choice(shards), lot)
        elif way == "config":
            config = json.loads((changed / "config.json").read_text())
            (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 10_000.0}))
        elif way == "length":
            _lengthen(changed / lot.choice(shards))
        elif way == "recipe":
            recipe = "pocket-4bit"
        else:
            finish.package_version = lambda name: "99"
        fresh = _converted(changed, folder / "fresh", recipe=recipe)
        try:
            convert_checkpoint(changed, folder / "out", recipe=recipe, n_workers=2, quality=False)
            is_fresh = content(folder / "out") == fresh
            counts[f"{way}: of the changed source alone" if is_fresh else f"{way}: MIXED".upper()] += 1
        except QwqError:
            counts[f"{way}: refused"] += 1
        finish.package_version = version
        shutil.rmtree(folder)


def poison(source: Path, home: Path, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
    """C10: what is no number is refused by name and place; what is all zeros is named in a warning."""
    for number in counts.until("poisons", options.poisons):
        counts["poisons"] += 1
        folder = _folder(home / f"poison-{number}")
        damaged = Path(shutil.copytree(source, folder / "source"))
        path = lot.choice(sorted(damaged.glob("*.safetensors")))
        entries = list(read_header(path).tensors.values())
        way = ("NaN", "infinity", "zero tensor", "zero page")[number % 4]
        if way in ("NaN", "infinity"):
            entry = lot.choice(entries)
            index = lot.randrange((entry.end - entry.start) // 2)
            sign = lot.choice((0, 0x8000))
            _put(path, entry.start + 2 * index, struct.pack("<H", sign | (0x7FC0 if way == "NaN" else 0x7F80)))
            row, column = divmod(index, entry.shape[-1])
            place = f"row {row:,}, column {column:,}" if len(entry.shape) == 2 else f"position {column:,}"
            expected = f"{path}: tensor {entry.name}: the weight at {place} is NaN or infinite"
        else:
            entry = lot.choice([each for each in entries if each.end - each.start >= 8192])
            start, end = (entry.start, entry.end) if way == "zero tensor" else (entry.start + 4096, entry.start + 8192)
            _put(path, start, bytes(end - start))
            expected = f"{entry.name} is zero" if way == "zero tensor" else f"{entry.name} has 1 pages (4,096 bytes)"
        try:
            said = "\n".join(convert_checkpoint(damaged, folder / "out", n_workers=2, quality=False).warnings)
            is_right = way.startswith("zero") and expected in said
        except QwqError as error:
            is_right = not way.startswith("zero") and str(error).startswith(expected) and not (folder / "out").exists()
        counts[f"{way}: named" if is_right else f"{way}: NOT NAMED".upper()] += 1
        shutil.rmtree(folder)


def flip(source: Path, home: Path, options: argparse.Namespace, lot: random.Random, counts: Tally) -> None:
    """D5: one bit, in twelve regions of the folder."""
    folder = home / "flipped"
    convert_checkpoint(source, folder, quality=False)
    shard = next(folder.glob("*.safetensors"))
    entries, head = read_header(shard).tensors, read_header(shard).data_start
    regions: dict[str, tuple[Path, list[tuple[int, int]]]] = {
        path.name: (path, [(0, path.stat().st_size)]) for path in sorted(folder.iterdir()) if path != shard
    }
    regions["shard header"] = (shard, [(0, head)])
    for kind, belongs in _PARTS.items():
        regions[kind] = (shard, [(each.start, each.end) for each in entries.values() if belongs(each)])
    tries = [name for name in regions for _ in range(options.flips)]
    for number in counts.until("flips", len(tries)):
        name = tries[number]
        path, spans = regions[name]
        before = path.read_bytes()
        start, end = lot.choice(spans)
        position, bit = lot.randrange(start, end), lot.randrange(8)
        _put(path, position, bytes([before[position] ^ 1 << bit]))
        counts["flips"] += 1
        counts["found by verify --full" if _refuses(verify_full, folder) else "NOT FOUND BY VERIFY --FULL"] += 1
        if name not in _PARTS:
            counts["outside the weights"] += 1
            key = "of these found by every load" if _refuses(check_sizes, folder) else "NOT FOUND BY A LOAD"
            counts[key] += 1
        path.write_bytes(before)
    counts["regions"] = len(regions)
    for path in sorted(folder.iterdir()):  # and every file cut short
        before = path.read_bytes()
        for cut in (1, len(before) // 2, len(before)):
            path.write_bytes(before[: len(before) - cut])
            counts["truncations found by every load" if _refuses(check_sizes, folder) else "CUT NOT FOUND"] += 1
        path.write_bytes(before)


_PARTS: dict[str, Callable[[TensorEntry], bool]] = {
    "codes": lambda entry: entry.dtype == "U32",
    "scales": lambda entry: entry.name.endswith(".scales"),
    "zero points": lambda entry: entry.name.endswith(".biases"),
    "norms": lambda entry: entry.name.endswith("norm.weight"),
    "biases": lambda entry: entry.name.endswith("proj.bias"),
}


def _refuses(check: Callable[[Path], object], folder: Path) -> bool:
    try:
        check(folder)
    except QwqError:
        return True
    return False


def _converted(source: Path, output: Path, **options: str) -> dict[str, object]:
    convert_checkpoint(source, output, n_workers=2, quality=False, **options)
    return content(output)


def _flip_weight(path: Path, lot: random.Random) -> None:
    """The lowest bit of a weight: still a number, so that only a comparison can tell. The file's time is put back."""
    status, header = path.stat(), read_header(path)
    position = header.data_start + 2 * lot.randrange((header.size_bytes - header.data_start) // 2)
    _put(path, position, bytes([path.read_bytes()[position] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _lengthen(path: Path) -> None:
    """The same tensors behind a header that is eight spaces longer."""
    raw = path.read_bytes()
    (n,) = struct.unpack_from("<Q", raw)
    path.write_bytes(struct.pack("<Q", n + 8) + raw[8 : 8 + n] + b" " * 8 + raw[8 + n :])


def _put(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
