"""Mutate each kind of file that qwq_mlx reads, and look for what is not one of its own errors.

    python scripts/fuzz_files.py [--files N] [--seed N] [--only KIND]

Half of the mutations change bytes, half change values of the JSON (another type, a field more or less) and put the
digest right again, as somebody who forges a file would. Prints one line a kind; the exit code is 1 where a
reader raised anything but a QwqError, and the first such file of each kind is left under --save.

Does not: run what a changed file says. A receipt is only held against the model, a saved run only taken up.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from qwq_mlx import Limits, QwqError, Sampling, Trace, load  # noqa: E402
from qwq_mlx.chat.conversation import Conversation  # noqa: E402
from qwq_mlx.convert.journal import FinishedTensor, Journal  # noqa: E402
from qwq_mlx.convert.journal import _encode as _encode_line  # noqa: E402
from qwq_mlx.files.checkpoint import INDEX_NAME, read_weight_map  # noqa: E402
from qwq_mlx.files.digest import sha256_json  # noqa: E402
from qwq_mlx.files.manifest import _encode, read_manifest  # noqa: E402
from qwq_mlx.generate.checkpoint import file as run_file  # noqa: E402
from qwq_mlx.generate.question_file.questions import read_questions  # noqa: E402
from qwq_mlx.generate.question_file.results import read_traces, result_line  # noqa: E402
from qwq_mlx.generate.reasoner import Reasoner  # noqa: E402
from qwq_mlx.generate.receipt import read_receipt  # noqa: E402
from qwq_mlx.quant.recipe import load_recipe  # noqa: E402
from qwq_mlx.replay.compare import check_model  # noqa: E402

_POCKET = ROOT / "qwq_mlx" / "pocket" / "checkpoint"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, -1e308, "", "x", "\u2028", "../x", [], {}, [[]], {"a": 1}),
    *(["x"], [0], "9" * 5000, "\x00", "a" * 70_000),
)
_BYTES = (
    *(b"[" * 50_000, b'{"a":' * 50_000, b"\\ud800", b"\xff", b"\0", b"1" * 5000),
    *(b"NaN", b"\n", b"\xe2\x80\xa8", b'"', b"}"),
)
_DESCRIPTION: dict[str, Any] = {"format": 2, "source": {"sha256": "0" * 64, "files": ["a"]}, "recipe": {"bits": 4}}
_FINISHED = FinishedTensor(
    name="a.weight",
    sha256=("0" * 64,),
    source_sha256="1" * 64,
    source_ctime_ns=5,
    error2=0.5,
    weight2=2.0,
    zero_pages=0,
)


class Kind(NamedTuple):
    """name: of the file. good: its bytes. values: the JSON in it, one a line. seal: makes bytes of changed values, with
    digests put right. read: the reader."""

    name: str
    good: bytes
    values: list[Any]
    seal: Callable[[list[Any]], bytes]
    read: Callable[[Path], object]


def kinds(reasoner: Reasoner, folder: Path) -> dict[str, Kind]:
    """Every kind of file with a good one of it, made in `folder`."""
    run = reasoner.stream("What is 2 + 3?", sampling=Sampling(seed=1), limits=Limits(max_tokens=12))
    list(run)
    trace = run.trace()
    trace.save(folder / "trace.jsonl")
    reasoner.receipt(trace).save(folder / "receipt.json")
    talk = Conversation(reasoner, limits=Limits(max_tokens=4))
    asked = talk.ask("hi")
    list(asked)
    talk.close(asked)
    talk.save(folder / "talk.json")
    head = {"index": 0, "id": "a", "expected": None, "question_sha256": "0" * 64, "run": {"settings": {}}}
    questions = [{"question": "a", "id": "first"}, {"messages": [{"role": "user", "content": "b"}], "expected": [1]}]
    recipe = '[weights]\nmode = "affine"\nbits = 4\ngroup_size = 64\n[[override]]\nmatch = ["*.v_proj"]\nbits = 6\n'
    manifest = json.loads((_manifest_of(folder)).read_bytes())

    journal = [_DESCRIPTION, *(asdict(replace(_FINISHED, name=name)) for name in ("a.weight", "b.weight"))]

    def of_file(name: str, seal: Callable[[list[Any]], bytes], read: Callable[[Path], object]) -> Kind:
        content = (folder / name).read_bytes()
        pieces = [content] if name.endswith(".json") else content.splitlines()
        return Kind(name, content, [json.loads(piece) for piece in pieces], seal, read)

    def of_values(name: str, values: list[Any], seal: Callable[[list[Any]], bytes], read: Any) -> Kind:
        return Kind(name, seal(values), values, seal, read)

    made = [
        of_file("receipt.json", _sealed, lambda path: check_model(reasoner, read_receipt(path))),
        of_file("trace.jsonl", _sealed_trace, Trace.load),
        of_file("talk.json", _lines, talk.load),
        of_values("questions.jsonl", questions, _lines, read_questions),
        of_values("results.jsonl", [result_line(head, trace)], _lines, lambda path: list(read_traces(path))),
        Kind("recipe.toml", recipe.encode(), [], _lines, load_recipe),
        of_values("manifest.json", [manifest], _sealed_manifest, lambda path: read_manifest(path.parent)),
        of_values(INDEX_NAME, [json.loads((_POCKET / INDEX_NAME).read_bytes())], _lines, read_weight_map),
        of_values("journal.jsonl", journal, _checked, _resume_journal),
        of_values("run", *_saved_run(run, folder), lambda path: reasoner.resume(path, max_tokens=20)),
    ]
    return {each.name: each for each in made}


def _resume_journal(path: Path) -> None:
    if (journal := Journal.resume(path, _DESCRIPTION)) is not None:
        journal.close()


def _checked(values: list[Any]) -> bytes:
    """Lines of a journal, each behind its checksum."""
    return b"".join(_encode_line(each) for each in values)


def _manifest_of(folder: Path) -> Path:
    from qwq_mlx import convert_checkpoint

    convert_checkpoint(_POCKET, folder / "converted", quality=False)
    return folder / "converted" / "manifest.json"


def _saved_run(run: Any, folder: Path) -> tuple[list[Any], Callable[[list[Any]], bytes]]:
    run.save(folder / "run")
    state, arrays = run_file.read_checkpoint(folder / "run")

    def seal(lines: list[Any]) -> bytes:
        run_file.write_checkpoint(folder / "forged", lines[0], arrays)
        return (folder / "forged").read_bytes()

    return [state], seal


def _lines(values: list[Any]) -> bytes:
    return b"".join((json.dumps(each) + "\n").encode() for each in values)


def _sealed_manifest(values: list[Any]) -> bytes:
    if not isinstance(values[0], dict):
        return _lines(values)
    value = {name: each for name, each in values[0].items() if name not in ("digest", "schema")}
    return _encode(value, values[0].get("schema", 3))


def _sealed(values: list[Any]) -> bytes:
    if not isinstance(values[0], dict):
        return _lines(values)
    value = {name: each for name, each in values[0].items() if name != "sha256"}
    return _lines([{**value, "sha256": sha256_json(value)}])


def _sealed_trace(values: list[Any]) -> bytes:
    body = _lines(values[:-1])
    return body + _lines([{"end": len(values) - 2, "sha256": hashlib.sha256(body).hexdigest()}])


def mutated(kind: Kind, choose: random.Random) -> bytes:
    """A good file with one to three changes."""
    if kind.values and choose.random() < 0.5:
        values = copy.deepcopy(kind.values)
        for _ in range(choose.randint(1, 3)):
            _change(values, choose)
        return kind.seal(values) if values else b""
    content = bytearray(kind.good)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(content) + 1)
        n_removed = choose.choice((0, 0, 1, 3, 20))
        content[at : at + n_removed] = choose.choice((*_BYTES, bytes([choose.randrange(256)]), b""))
    return bytes(content)


def _change(value: Any, choose: random.Random) -> None:
    """Change something somewhere below a list or an object."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = choose.choice(places)
        if isinstance(value[place], (dict, list)) and value[place] and choose.random() < 0.7:
            value = value[place]
            continue
        if choose.random() < 0.15:
            del value[place]
        elif choose.random() < 0.15 and isinstance(value, dict):
            value["more"] = copy.deepcopy(choose.choice(_VALUES))
        else:
            value[place] = copy.deepcopy(choose.choice(_VALUES))
        return


def run(n_files: int, seed: int, only: str | None, save: Path) -> int:
    """Mutate and read; the exit code."""
    reasoner, n_bad = load(_POCKET), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = kinds(reasoner, folder)
        for kind in known.values():
            if only not in (None, kind.name):
                continue
            choose, counts, faults = random.Random(seed), [0, 0], {}
            path = folder / "here" / kind.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(kind.good)
            kind.read(path)
            for _ in range(n_files):
                path.write_bytes(content := mutated(kind, choose))
                try:
                    kind.read(path)
                    counts[0] += 1
                except QwqError:
                    counts[1] += 1
                except Exception as error:  # noqa: BLE001 - what is looked for
                    where = error.__traceback__
                    while where is not None and where.tb_next is not None:
                        where = where.tb_next
                    line = type(error).__name__
                    if where is not None:
                        line += f" {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
                    if line not in faults:
                        (save / kind.name).write_bytes(content)
                        print(f"  {line}: {str(error)[:150]}", file=sys.stderr, flush=True)
                    faults[line] = faults.get(line, 0) + 1
            n_bad += sum(faults.values())
            n_faults = sum(faults.values())
            print(f"{kind.name}: {counts[0]:,} read, {counts[1]:,} refused, {n_faults:,} OTHER ERRORS", flush=True)
    return int(n_bad > 0)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--only", metavar="KIND", help="this file name alone")
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()), help="folder for files that broke it")
    options = parser.parse_args()
    return run(options.files, options.seed, options.only, options.save)


if __name__ == "__main__":
    raise SystemExit(main())
