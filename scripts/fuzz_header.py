"""Look for a safetensors header that our reader takes and the reference refuses, or that makes ours fail otherwise.

    python scripts/fuzz_header.py [--headers N] [--seed N] [--budget SECONDS]

Starts from good files and mutates bytes, numbers and whole fields. A mutation that reaches a line of the reader that no
earlier one reached in that state (previous line, this line) joins the seeds: the coverage guides. Prints the counts, on
stderr as it goes; the first input that breaks a promise is written to --save and the exit code is 1.

Does not: look into tensor data, which the reader does not read.
"""

from __future__ import annotations

import random
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, deserialize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tally import Tally, fuzz_headers  # noqa: E402 - the paths must be set first

from qwq_mlx.errors import SourceError  # noqa: E402
from qwq_mlx.files.header import read_header_by  # noqa: E402

_TOKENS = (
    b'0 1 2 4 8 -1 -0 1.0 1e3 9223372036854775807 18446744073709551615 4294967296 null true NaN [] {} [ ] { } : , " \\ '
    b'"U8" "BF16" "F4" "dtype" "shape" "data_offsets" "__metadata__" "a" \\u0000 \\ud800 \\ud83d\\ude00 \xff \xc3\xa9'
).split(b" ")


def seeds() -> list[bytes]:
    """Good files: none, one and several tensors, with and without metadata."""
    texts = (
        (b"{}", 0),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4),
        (
            b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]},'
            b'"c":{"dtype":"F32","shape":[0],"data_offsets":[5,5]}}  ',
            5,
        ),
    )
    return [struct.pack("<Q", len(text)) + text + bytes(n_data) for text, n_data in texts]


def mutate(content: bytes, choose: random.Random, pool: list[bytes]) -> bytes:
    """One to four changes; mostly with the length put right again, so that the JSON is reached."""
    n_data = max(0, len(content) - 8 - struct.unpack_from("<Q", content.ljust(8, b"\0"))[0])
    text = bytearray(content[8 : len(content) - n_data])
    for _ in range(choose.randint(1, 4)):
        at, kind = choose.randrange(len(text) + 1), choose.randrange(6)
        if kind == 0 and text:
            text[at % len(text)] = choose.randrange(256)
        elif kind == 1:
            text[at:at] = choose.choice(_TOKENS)
        elif kind == 2:
            del text[at : at + choose.randint(1, 12)]
        elif kind == 3:
            end = at + choose.randint(1, 40)
            text[at:at] = text[at:end]
        elif kind == 4:
            other = choose.choice(pool)[8:]
            cut = choose.randrange(len(other) + 1)
            text[at : at + choose.randint(0, 20)] = other[cut : cut + choose.randint(1, 60)]
        else:
            digits = [i for i in range(len(text)) if text[i : i + 1].isdigit()]
            if digits:
                where = choose.choice(digits)
                text[where : where + 1] = choose.choice(_TOKENS[:12])
    length = (
        choose.randrange(2**64) if choose.random() < 0.02 else max(0, len(text) + choose.choice((0,) * 30 + (-1, 1)))
    )
    return struct.pack("<Q", length) + bytes(text) + bytes(choose.choice((n_data,) * 5 + (0, 1, 4, 8)))


class Coverage:
    """Pairs of lines that ran one after the other in the reader's two files."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.is_new = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """The function for sys.settrace."""
        name = frame.f_code.co_filename
        if not name.endswith(("files/header.py", "files/json_object.py")):
            return None
        before = 0

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            pair = (name, before, frame.f_lineno)
            before = frame.f_lineno
            if pair not in self.seen:
                self.seen.add(pair)
                self.is_new = True
            return local

        return local


def accepts(content: bytes) -> bool:
    """Whether our reader takes it; what is no SourceError goes through."""
    try:
        read_header_by(lambda start, n_bytes: content[start : start + n_bytes], Path("fuzz.safetensors"), len(content))
    except SourceError:
        return False
    return True


def reference_accepts(content: bytes) -> bool:
    """Whether the safetensors package takes it."""
    try:
        deserialize(content)
    except (SafetensorError, ValueError):
        return False
    return True


def run(n_headers: int, seed: int, save: Path, tally: Tally) -> int:
    """Fuzz; 0 when every promise held."""
    choose, pool, coverage = random.Random(seed), seeds(), Coverage()
    slowest_s, used_s = 0.0, time.process_time()
    tally.begin("fuzz")
    for number in tally.until("headers", n_headers):
        content = mutate(choose.choice(pool), choose, pool)
        coverage.is_new = False
        began = time.process_time()
        sys.settrace(coverage.trace if number % 4 == 0 else None)  # tracing costs most of the time
        try:
            ours = accepts(content)
        except BaseException:
            sys.settrace(None)
            save.write_bytes(content)
            print(f"the reader failed on {save}", file=sys.stderr)
            raise
        sys.settrace(None)
        slowest_s = max(slowest_s, time.process_time() - began)
        theirs = reference_accepts(content)
        tally["headers"] += 1
        if ours or theirs:
            tally["TAKEN BY US ALONE" if not theirs else f"taken by {'both' if ours else 'the reference alone'}"] += 1
        if ours and not theirs:
            save.write_bytes(content)
            print(f"we take {save}, the reference does not", file=sys.stderr)
            break
        if (coverage.is_new or (ours and choose.random() < 0.001)) and len(content) < 2_000:
            pool.append(content)
    tally.end()
    print(
        f"{len(coverage.seen):,} line pairs, {len(pool):,} seeds, slowest {1e3 * slowest_s:.0f} ms, "
        f"{time.process_time() - used_s:.0f} s CPU"
    )
    return tally.finish()


if __name__ == "__main__":
    raise SystemExit(fuzz_headers(run, description=__doc__.splitlines()[0], suffix="safetensors"))
