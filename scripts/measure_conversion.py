"""Conversion beside mlx_lm.convert on one source in one run: wall time, peak memory, bytes; and our peak by layers.

    python scripts/measure_conversion.py [--layers 4] [--rounds 3] [--flat 1,2,4,8] [--work FOLDER] [--tiny]

The source is QwQ-shaped with random weights (scripts/qwq_shaped.py). The two converters take turns, each run a process
of its own into a new folder; each starts with the source in the page cache, as far as that holds it. Ours syncs every
tensor, reads everything back and writes digests within its time; mlx_lm.convert does none of that. Memory is the most
resident memory of the process (getrusage), which for mlx_lm.convert includes the pages of the source that it maps.
A round in which other processes had more than 15 % of a core is measured again, three times at most; what they had is
shown (Linux). The table and, as the last line, one JSON object go to stdout.

Does not: compare quality; that both wrote the same packed bits is checked once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from qwq_mlx.files.digest import sha256_shard  # noqa: E402 - the path must be set first
from qwq_mlx.files.header import read_header  # noqa: E402

MAX_PEAK_BYTES = 1_200_000_000
MAX_WALL_RATIO = 0.7
MAX_OTHERS = 0.15
_STAT = Path("/proc/stat")
OURS, THEIRS = "qwq_mlx.convert", "mlx_lm.convert -q"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process: wall time, CPU time, the most resident memory, and the bytes that it left.

    others: CPU time of everything else on the machine over the wall time, so 1.0 is a core; None where unknown.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output_bytes: int
    others: float | None = None


def main() -> int:
    """Parse, measure, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the contest (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--flat", default="1,2,4,8", metavar="N,N", help="layers for our peak (default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where the checkpoints go, on the disk to measure")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script; the figures mean nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=options.work) as temporary:
        result = measure(Path(temporary), options)
    print(table(result))
    print(json.dumps(result))
    return 0 if result["is_within_bars"] or options.tiny else 1


def measure(home: Path, options: argparse.Namespace) -> dict[str, object]:
    """The contest at --layers, then ours alone at each of --flat."""
    source = make_source(home, options.layers, options)
    recipe = home / "as-mlx-lm.toml"
    recipe.write_text('[weights]\nmode = "affine"\nbits = 4\ngroup_size = 64\nfit = "min-max"\n')
    commands = {OURS: our_command(recipe), THEIRS: [sys.executable, "-m", "mlx_lm", "convert", "-q"]}
    flags = {OURS: ("--source", "--output"), THEIRS: ("--hf-path", "--mlx-path")}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    noisy: dict[str, list[Run]] = {name: [] for name in commands}
    is_same = None
    for number in range(3 * options.rounds):
        note(f"{len(runs[OURS])} of {options.rounds} quiet rounds")
        one: dict[str, Run] = {}
        for name in sorted(commands, reverse=bool(number % 2)):
            output = home / ("ours" if name == OURS else "theirs")
            shutil.rmtree(output, ignore_errors=True)
            warm(source)
            from_flag, to_flag = flags[name]
            one[name] = run([*commands[name], from_flag, str(source), to_flag, str(output)], output)
            note(f"{name}: {one[name]}")
        if is_same is None:
            is_same = packed_digests(home / "ours") == packed_digests(home / "theirs")
        is_quiet = max(each.others or 0.0 for each in one.values()) <= MAX_OTHERS
        for name, each in one.items():
            (runs if is_quiet else noisy)[name].append(each)
        if len(runs[OURS]) == options.rounds:
            break
    is_quiet = len(runs[OURS]) == options.rounds
    runs = runs if is_quiet else {name: runs[name] + noisy[name] for name in commands}
    for folder in (home / "ours", home / "theirs", source):
        shutil.rmtree(folder)
    peaks = {}
    for n_layers in [int(part) for part in options.flat.split(",") if part]:
        source = make_source(home, n_layers, options)
        note(f"{OURS}: {n_layers} layers")
        peaks[n_layers] = run([*commands[OURS], "--source", str(source), "--output", str(home / "ours")], home / "ours")
        shutil.rmtree(source)
        shutil.rmtree(home / "ours")
    ratio = median(runs[OURS], "wall_s") / median(runs[THEIRS], "wall_s")
    peak = max(each.peak_bytes for each in (*runs[OURS], *peaks.values()))
    return {
        "layers": options.layers,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "runs": {name: [asdict(each) for each in of_name] for name, of_name in runs.items()},
        "is_quiet": is_quiet,
        "same_packed_bits": is_same,
        "wall_ratio": round(ratio, 3),
        "peak_ratio": round(median(runs[OURS], "peak_bytes") / median(runs[THEIRS], "peak_bytes"), 3),
        "by_layers": {n: asdict(each) for n, each in peaks.items()},
        "is_within_bars": is_quiet and ratio <= MAX_WALL_RATIO and peak <= MAX_PEAK_BYTES,
    }


def make_source(home: Path, n_layers: int, options: argparse.Namespace) -> Path:
    """In a process of its own: what a child's parent holds counts as the child's memory until it has more."""
    source = home / f"source-{n_layers}"
    tiny = ["--tiny"] if options.tiny else []
    command = [sys.executable, str(ROOT / "scripts" / "qwq_shaped.py"), str(source), "--layers", str(n_layers), *tiny]
    run(command, source)
    return source


def our_command(recipe: Path) -> list[str]:
    """The command as a user gives it, without source and output."""
    return [sys.executable, "-m", "qwq_mlx.convert", "--quiet", "--no-quality", "--recipe", str(recipe)]


def run(command: Sequence[str], output: Path) -> Run:
    """Run a command to its end. Raises RuntimeError with what it said if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as said:
        started, busy_s = time.monotonic(), busy_cpu_s()
        actions = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        child = os.posix_spawn(command[0], list(command), environment, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        wall_s = time.monotonic() - started
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read()[-2000:].decode(errors='replace')}")
        all_s = busy_cpu_s()
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(
        wall_s=round(wall_s, 2),
        cpu_s=round(cpu_s, 2),
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        output_bytes=sum(path.stat().st_size for path in output.rglob("*")),
        others=None if all_s is None or busy_s is None else round(max(0.0, all_s - busy_s - cpu_s) / wall_s, 3),
    )


def busy_cpu_s() -> float | None:
    """CPU time that the whole machine has used since it started, None where the system does not tell."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def warm(folder: Path) -> None:
    """Read every file once, so that all runs find the same page cache."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def packed_digests(folder: Path) -> dict[str, str]:
    """sha256 of each tensor of a conversion."""
    digests: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        digests.update(sha256_shard(read_header(path)).tensors)
    return digests


def median(runs: Sequence[Run], field: str) -> float:
    """The middle value of a field."""
    return statistics.median(getattr(each, field) for each in runs)


def table(result: dict[str, object]) -> str:
    """For people. GB is 1e9 bytes."""
    lines = [f"QwQ-shaped, {result['layers']} layers, {result['cores']} cores"]
    lines.append(f"{'':<22}{'wall s':>9}{'CPU s':>9}{'peak GB':>9}{'output GB':>11}{'others, cores':>15}")
    for name, runs in result["runs"].items():
        of_name = [Run(**each) for each in runs]
        wall, cpu, peak = (median(of_name, field) for field in ("wall_s", "cpu_s", "peak_bytes"))
        others = "unknown" if of_name[0].others is None else f"{max(each.others for each in of_name):.2f}"
        lines.append(
            f"{name:<22}{wall:>9.1f}{cpu:>9.1f}{peak / 1e9:>9.2f}{of_name[0].output_bytes / 1e9:>11.3f}{others:>15}"
        )
    lines.append(f"{'ratio':<22}{result['wall_ratio']:>9}{'':>9}{result['peak_ratio']:>9}")
    if not result["is_quiet"]:
        lines.append("NOT QUIET: other processes ran beside the rounds, so the times are not usable")
    lines.append(f"packed bits are the same: {'yes' if result['same_packed_bits'] else 'NO'}")
    for n_layers, each in result["by_layers"].items():
        lines.append(f"ours, {n_layers} layers: peak {each['peak_bytes'] / 1e9:.3f} GB, {each['wall_s']:.1f} s")
    lines.append(
        f"bars: peak <= {MAX_PEAK_BYTES / 1e9:.1f} GB, wall <= {MAX_WALL_RATIO} of mlx_lm.convert: "
        f"{'reached' if result['is_within_bars'] else 'MISSED'}"
    )
    return "\n".join(lines)


def note(text: str) -> None:
    """What runs now, for who waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
