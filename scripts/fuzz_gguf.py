"""Look for a GGUF header that our reader takes and the gguf package reads otherwise, or that makes ours fail or grow.

    python scripts/fuzz_gguf.py [--headers N] [--seed N] [--budget SECONDS]

Starts from files of the gguf package's writer and mutates bytes, numbers of 32 and 64 bits, and pieces. What our reader
takes goes into a file that the package reads, and tensors, types, places and scalars must be the same. (What ours
refuses is not shown to the package, which loops as often as a header says.) Prints the counts, on stderr as it goes;
the first input that breaks a promise is written to --save and the exit code is 1.

Does not: look into tensor data.
"""

from __future__ import annotations

import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tally import Tally, fuzz_headers  # noqa: E402 - the paths must be set first

from qwq_mlx.errors import SourceError  # noqa: E402
from qwq_mlx.files.gguf.header import GgufHeader, read_gguf_header_by  # noqa: E402

_NUMBERS = (0, 1, 2, 3, 4, 8, 9, 13, 31, 32, 33, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
_MAX_GROWTH_BYTES = 64 << 20


def seeds(folder: Path) -> list[bytes]:
    """Good files: one tensor, several of several types, another alignment."""
    files = []
    for alignment, kinds in ((32, ("F32",)), (32, ("Q4_0", "F16", "Q6_K", "F32")), (64, ("Q8_0", "F32"))):
        path = folder / "seed.gguf"
        writer = GGUFWriter(path, "qwen2")
        if alignment != 32:
            writer.add_custom_alignment(alignment)
        writer.add_uint32("qwen2.block_count", 2)
        writer.add_uint64("a.number", 1 << 40)
        writer.add_float32("qwen2.rope.freq_base", 1e6)
        writer.add_bool("a.flag", True)
        writer.add_string("general.name", "a name")
        writer.add_array("a.list", ["x", "yz", "Ġthe"])
        writer.add_array("a.ids", [1, 2, 3])
        for index, kind in enumerate(kinds):
            number = GGMLQuantizationType[kind]
            if kind in ("F32", "F16"):
                writer.add_tensor(f"blk.{index}.weight", np.zeros((2, 8), "<f4" if kind == "F32" else "<f2"))
            else:
                raw = np.zeros((2, {"Q4_0": 36, "Q8_0": 34, "Q6_K": 210}[kind]), np.uint8)
                writer.add_tensor(f"blk.{index}.weight", raw, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(path.read_bytes())
    return files


def mutate(content: bytes, choose: random.Random, pool: list[bytes]) -> bytes:
    """One to three changes, mostly in the header."""
    raw = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        at, kind = choose.randrange(len(raw) + 1), choose.randrange(8)
        if kind < 3 and at < len(raw):
            raw[at] = choose.choice((0, 1, 255, raw[at] ^ (1 << choose.randrange(8)), choose.randrange(256)))
        elif kind < 5:
            width = choose.choice((4, 8))
            number = (choose.choice(_NUMBERS) + choose.choice((0, 0, -1, 1))) % (1 << 8 * width)
            raw[at : at + width] = number.to_bytes(width, "little")
        elif kind == 5:
            del raw[at : at + choose.randint(1, 40)]
        elif kind == 6:
            other = choose.choice(pool)
            cut = choose.randrange(len(other) + 1)
            raw[at : at + choose.randint(0, 20)] = other[cut : cut + choose.randint(1, 60)]
        else:
            raw[at:at] = bytes(choose.randint(1, 40))
    return bytes(raw)


def differences(header: GgufHeader, path: Path) -> list[str]:
    """What the gguf package reads otherwise in the file."""
    try:
        reader: Any = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        return [f"the package refuses it: {type(error).__name__}: {error}"]
    theirs = {
        each.name: (each.tensor_type.name, [*map(int, reversed(each.shape))], each.data_offset, each.n_bytes)
        for each in reader.tensors
    }
    ours = {e.name: (e.type.name, [*e.shape], e.start, e.end - e.start) for e in header.tensors.values()}
    wrong = [] if ours == theirs else [f"tensors are {theirs}, ours {ours}"]
    for key, value in header.metadata.items():
        said = reader.fields[key].contents()
        if struct.pack("<d", value) != struct.pack("<d", said) if isinstance(value, float) else value != said:
            wrong.append(f"{key} is {said!r}, ours {value!r}")
    return wrong


def run(n_headers: int, seed: int, save: Path, tally: Tally) -> int:
    """Fuzz; 0 when every promise held."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        pool, path = seeds(Path(temporary)), Path(temporary) / "mutated.gguf"
        slowest_s, began_bytes = 0.0, _peak_bytes()
        tally.begin("fuzz")
        for _ in tally.until("headers", n_headers):
            content = mutate(choose.choice(pool), choose, pool)
            began = time.process_time()
            tally["headers"] += 1
            try:
                header = read_gguf_header_by(_reader(content), path, len(content))
            except SourceError as error:
                if "\n" in str(error):
                    tally["ERRORS OF SEVERAL LINES"] += 1
                continue
            except BaseException:
                save.write_bytes(content)
                print(f"the reader failed on {save}", file=sys.stderr)
                raise
            finally:
                slowest_s = max(slowest_s, time.process_time() - began)
            path.write_bytes(content)
            tally["taken"] += 1
            if wrong := differences(header, path):
                tally["READ OTHERWISE"] += 1
                save.write_bytes(content)
                print(f"{save}: {wrong[0][:300]}", file=sys.stderr)
                break
            if choose.random() < 0.001 and len(content) < 4_000:
                pool.append(content)
        grown = _peak_bytes() - began_bytes
        if grown > _MAX_GROWTH_BYTES:
            tally["GREW BEYOND 64 MIB"] += 1
        tally.end()
    print(f"{len(pool):,} seeds, slowest header {1e3 * slowest_s:.0f} ms, memory grew by {grown / 1e6:.1f} MB")
    return tally.finish()


def _reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda start, n_bytes: content[start : start + n_bytes]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    raise SystemExit(fuzz_headers(run, description=__doc__.splitlines()[0], suffix="gguf"))
