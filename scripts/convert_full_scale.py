"""QwQ-32B-Preview from a Hub on loopback to a verified conversion, at full size, with a little disk; and with kill -9.

    python scripts/convert_full_scale.py [--layers 64] [--kills 3] [--work FOLDER] [--load] [--tiny]

The Hub is tests/hub_server.py with the real huggingface_hub client before it; it offers all 771 tensors in 17 shards
(65.5 GB of random weights), made as they are asked for (scripts/qwq_shaped.py). The converter is the command that a
user types, with nothing but HF_ENDPOINT changed. Meanwhile the bytes of the work folder on the disk are added up every
second. --kills N ends it with SIGKILL at N points between 10 and 90 % of what there is to fetch, and runs the same
command again. At the end every size is compared with the plan, the folder is verified at two depths, and a table and,
as the last line, one JSON object go to stdout; the exit code is 1 if anything was not as promised.

Does not: measure a network, or the quality of random weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from hub_server import Blob, HubServer, Repository  # noqa: E402 - the paths must be set first
from qwq_shaped import SHARD_BYTES, SyntheticCheckpoint, SyntheticShard, synthetic_checkpoint  # noqa: E402

from qwq_mlx.facts import QWQ_32B_PREVIEW  # noqa: E402
from qwq_mlx.verify import verify_conversion  # noqa: E402

NAME = str(QWQ_32B_PREVIEW.repository)
MAX_TWICE_BYTES = 16_000_000  # fetched again after a kill
MAX_PEAK_BYTES = 1_200_000_000
_HEADER_BYTES = 256 << 10  # what a plan asks of each shard
_HASH_BYTES = 8 << 20
_LOAD = (
    "import sys, mlx_lm; model, tokenizer = mlx_lm.load(sys.argv[1]);"
    "print(len(list(mlx_lm.stream_generate(model, tokenizer, prompt='1 + 1', max_tokens=8))))"
)


@dataclass(slots=True)
class Seen:
    """What was watched: the most of each, and what the process said."""

    disk_bytes: int = 0
    memory_bytes: int = 0
    wall_s: list[float] = field(default_factory=list)
    n_kills: int = 0
    result: dict[str, object] = field(default_factory=dict)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=64, metavar="N", help="of QwQ's 64 (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill -9 and run again (default: none)")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="default: %(default)s")
    parser.add_argument("--recipe", default="qwq-32b-preview-4bit", help="default: %(default)s")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where the conversion goes, on the disk to measure")
    parser.add_argument("--load", action="store_true", help="load the result with mlx-lm at the end and take 8 tokens")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    options = parser.parse_args()
    checkpoint = synthetic_checkpoint(n_layers=options.layers, shard_bytes=options.shard_bytes, is_tiny=options.tiny)
    with tempfile.TemporaryDirectory(prefix="full-scale-", dir=options.work) as temporary, HubServer() as hub:
        hub.repositories[NAME] = Repository()
        started = time.monotonic()
        hub.repositories[NAME].push({**checkpoint.files, **blobs(checkpoint)})
        note(f"{checkpoint.size_bytes:,} bytes hashed in {time.monotonic() - started:.0f} s; converting")
        result = convert(checkpoint, hub, Path(temporary), options)
    print(table(result))
    print(json.dumps(result))
    return 0 if result["faults"] == [] else 1


def blobs(checkpoint: SyntheticCheckpoint) -> dict[str, Blob]:
    """Each shard with its sha256, which takes one pass over all bytes."""

    def blob(shard: SyntheticShard) -> Blob:
        sha256 = hashlib.sha256()
        for start in range(0, shard.size_bytes, _HASH_BYTES):
            sha256.update(shard.read(start, min(start + _HASH_BYTES, shard.size_bytes)))
        return Blob(shard.size_bytes, sha256.hexdigest(), shard.read)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((shard.name for shard in checkpoint.shards), pool.map(blob, checkpoint.shards), strict=True))


def convert(
    checkpoint: SyntheticCheckpoint, hub: HubServer, home: Path, options: argparse.Namespace
) -> dict[str, object]:
    """Run the command to its end, kills included, and everything that is checked afterwards."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "cache")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    output, seen = home / "out", Seen()
    command = [sys.executable, "-m", "qwq_mlx.convert", "--source", NAME, "--output", str(output)]
    command += ["--recipe", options.recipe, "--json", "--no-quality"]
    fractions = [0.1 + 0.8 * k / max(options.kills - 1, 1) for k in range(options.kills)]
    for fraction in [*fractions, math.inf]:
        if not seen.result:  # a small one may be through before its kill
            watch(
                command, environment, home, seen, lambda at=fraction: fetched_bytes(hub) >= at * checkpoint.size_bytes
            )
    planned, faults = seen.result["output_bytes"], []
    sizes = {path.name: path.stat().st_size for path in output.iterdir()}
    output_bytes = sum(size for name, size in sizes.items() if name != "manifest.json")
    largest = sorted((shard.size_bytes for shard in checkpoint.shards), reverse=True)[:2]
    twice = fetched_bytes(hub) - checkpoint.size_bytes
    if output_bytes != planned:
        faults.append(f"output has {output_bytes:,} bytes, the plan said {planned:,}")
    if twice > max(1, seen.n_kills) * MAX_TWICE_BYTES:
        faults.append(f"{twice:,} bytes were fetched twice in {seen.n_kills} kills")
    if seen.disk_bytes > 1.01 * (planned + sum(largest)) + 100_000_000:
        faults.append(f"{seen.disk_bytes:,} bytes were on the disk, expected the output and two shards")
    if seen.memory_bytes > MAX_PEAK_BYTES:
        faults.append(f"{seen.memory_bytes:,} bytes of memory, expected at most {MAX_PEAK_BYTES:,}")
    if left := sorted({path.name for path in home.iterdir()} - {"out", "cache"}):
        faults.append(f"left beside the output: {', '.join(left)}")
    verified = {"headers": verify_conversion(output), "every byte": verify_conversion(output, full=True)}
    loaded = {"load_and_8_tokens_s": load_in_mlx_lm(output, environment)} if options.load else {}
    return {
        "layers": options.layers,
        "n_shards": len(checkpoint.shards),
        "n_tensors": sum(len(shard.entries) for shard in checkpoint.shards),
        "source_bytes": checkpoint.size_bytes,
        "planned_bytes": planned,
        "output_bytes": output_bytes,
        "wall_s": [round(each, 1) for each in seen.wall_s],
        "source_bytes_s": round(checkpoint.size_bytes / sum(seen.wall_s)),
        "peak_memory_bytes": seen.memory_bytes,
        "peak_disk_bytes": seen.disk_bytes,
        "output_and_two_shards_bytes": planned + sum(largest),
        "n_kills": seen.n_kills,
        "fetched_twice_bytes": twice,
        "resumed_bytes": seen.result.get("resumed_bytes"),
        "verify_s": {depth: round(each.wall_s, 3) for depth, each in verified.items()},
        **loaded,
        "faults": faults,
    }


def watch(
    command: Sequence[str], environment: dict[str, str], home: Path, seen: Seen, is_over: Callable[[], bool]
) -> None:
    """Run the command until it ends, or is_over says that it is to be killed; what it took goes to `seen`."""
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        while child.poll() is None:
            seen.disk_bytes = max(seen.disk_bytes, disk_bytes(home))
            seen.memory_bytes = max(seen.memory_bytes, memory_bytes(child.pid))
            if is_over():
                child.send_signal(signal.SIGKILL)
                child.wait()
                seen.n_kills += 1
                note(f"killed after {time.monotonic() - started:.0f} s")
            else:
                with_patience(child)
        said = child.stdout.read() if child.stdout else b""
    seen.wall_s.append(time.monotonic() - started)
    if child.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the converter ended with {child.returncode}")
    if child.returncode == 0:
        seen.result = json.loads(said)
        seen.memory_bytes = max(seen.memory_bytes, int(seen.result["peak_memory_bytes"]))


def with_patience(child: subprocess.Popen[bytes]) -> None:
    """Wait a second, or until the process ends."""
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        return


def fetched_bytes(hub: HubServer) -> int:
    """Bytes of shards that were sent, without the headers that each plan asks for."""
    requests = [each for each in list(hub.requests) if each.what == "cdn"]
    return sum(each.n_sent for each in requests if not (each.start == 0 and (each.end or 0) <= _HEADER_BYTES))


def disk_bytes(folder: Path) -> int:
    """What the folder's files take on the disk; files with holes count by their blocks."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # renamed or dropped meanwhile
            continue
    return total


def memory_bytes(pid: int) -> int:
    """The most resident memory of a process so far, where the system tells (Linux); 0 elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def load_in_mlx_lm(output: Path, environment: dict[str, str]) -> float:
    """Seconds that mlx-lm takes to load the folder and make a few tokens, in a process of its own; it must succeed."""
    started = time.monotonic()
    command = [sys.executable, "-c", _LOAD, str(output)]
    subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - started, 2)


def table(result: dict[str, object]) -> str:
    """For people. GB is 1e9 bytes."""

    def gb(key: str) -> str:
        return f"{result[key] / 1e9:.3f} GB"

    rows = [
        ("source", f"{result['n_tensors']} tensors, {result['n_shards']} shards, {gb('source_bytes')}"),
        ("output", f"{result['output_bytes']:,} bytes, planned {result['planned_bytes']:,}"),
        ("wall", f"{sum(result['wall_s']):.0f} s in {len(result['wall_s'])} runs, {gb('source_bytes_s')}/s of source"),
        ("peak memory", gb("peak_memory_bytes")),
        ("peak disk", f"{gb('peak_disk_bytes')}; output and two shards are {gb('output_and_two_shards_bytes')}"),
        ("kill -9", f"{result['n_kills']}, {result['fetched_twice_bytes']:,} bytes fetched twice"),
        ("verify", ", ".join(f"{depth} {seconds} s" for depth, seconds in result["verify_s"].items())),
    ]
    if "load_and_8_tokens_s" in result:
        rows.append(("mlx-lm", f"loads it and makes 8 tokens, {result['load_and_8_tokens_s']} s"))
    rows.append(("faults", "; ".join(result["faults"]) or "none"))
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def note(text: str) -> None:
    """What runs now, for who waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
