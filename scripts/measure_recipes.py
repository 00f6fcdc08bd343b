"""What each recipe loses on the pocket model, and what it makes of QwQ-32B-Preview: docs/benchmarks.md, Recipes.

    python scripts/measure_recipes.py [--tokens 2048] [--problems 0] [--only min-max-4 ...] [--mlx-lm [GPTQ ...]]

2, 3 and 4 bits in groups of 64 by min/max, least squares and calibrated fits, then the recipes of conversions/. For
each: bits per weight, relative error of the weights, mean KL to bfloat16 and top-1 agreement on held-out traces, and
with --problems how many held-out equations of 9 numbers it solves; the size of the 32B and the smallest Mac that the
memory plan gives 8,192 positions on. The calibration text is drawn as training text is, never held-out problems.
--mlx-lm runs mlx-lm's own GPTQ, AWQ and DWQ (scripts/mlx_lm_methods.py): GPTQ and AWQ on the ids that the
calibrated fit reads, DWQ on a million more; what does not run has a row that says why. Rows go to stderr as they come,
one JSON object to stdout. On a CPU, preload OpenBLAS's libblas.so.3: float32 products are then some 50 times faster.

The pocket was trained with steps on the min/max grid of 4 bits in groups of 64 (scripts/pocket/quantization.py): there
min/max looks better than on other models. --off-grid measures on a checkpoint of the same function that is not on that
grid: input channels are scaled by random factors that the norms and neighbouring matrices take back. Nothing of this is
measured on the 32B itself.

Does not: time anything, or run on Metal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pocket import data  # noqa: E402

from qwq_mlx import facts  # noqa: E402
from qwq_mlx.convert import convert_checkpoint  # noqa: E402
from qwq_mlx.convert.calibration.text import read_calibration  # noqa: E402
from qwq_mlx.model.architecture import tensor_shapes  # noqa: E402
from qwq_mlx.model.folder import open_model_folder  # noqa: E402
from qwq_mlx.model.memory.advice import MACS_GIB  # noqa: E402
from qwq_mlx.model.memory.plan import Workload, metal_limit_bytes, plan_memory, shape_of_recipe  # noqa: E402
from qwq_mlx.model.memory.sizes import weights_bytes  # noqa: E402
from qwq_mlx.model.memory.workload import FLOAT_BYTES  # noqa: E402
from qwq_mlx.model.tokenizer import load_tokenizer  # noqa: E402
from qwq_mlx.pocket import FOLDER  # noqa: E402
from qwq_mlx.pocket.problems import is_held_out  # noqa: E402
from qwq_mlx.quality.measure import measure  # noqa: E402
from qwq_mlx.quality.result import summarise  # noqa: E402
from qwq_mlx.quality.text import read_text  # noqa: E402
from qwq_mlx.quant.modes import FITS  # noqa: E402
from qwq_mlx.quant.recipe import Recipe, load_recipe, recipe_names  # noqa: E402

CONTEXT = 8192
ROW = 512  # ids of mlx-lm's calibration rows; its own default
METHODS = ("GPTQ", "AWQ", "DWQ")
N_DISTILLED = 2052  # rows of ROW ids that DWQ learns from: 512 steps of 4, as mlx-lm's default has, and 4 to watch


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of held-out traces (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=0, help="equations to solve with each (default: %(default)s)")
    parser.add_argument("--off-grid", action="store_true", help="on a pocket of the same function, off the 4-bit grid")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument(
        "--conversations", type=int, default=40, help="to calibrate with, 410 ids each (default: %(default)s)"
    )
    parser.add_argument(
        "--mlx-lm", nargs="*", choices=METHODS, metavar="METHOD", help=f"mlx-lm's {', '.join(METHODS)} (no name: all)"
    )
    parser.add_argument("--bits", type=int, nargs="*", default=(4, 3, 2), help="of those (default: 4 3 2)")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one of those (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure_all(Path(temporary), options)
    print(json.dumps({"text_positions": options.tokens, "rows": rows}))
    return 0


def measure_all(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every form of the pocket."""
    chosen = () if options.mlx_lm is None else options.mlx_lm or METHODS
    texts = write_texts(work, options.conversations, n_distilled=N_DISTILLED if "DWQ" in chosen else 0)
    held_out = write_held_out(work / "held-out.jsonl")
    source = off_grid(work / "off-grid") if options.off_grid else FOLDER
    rows: list[dict[str, Any]] = []
    folders: dict[str, Path] = {}
    for name, recipe, fit in forms(work):
        if options.only and name not in options.only:
            continue
        folder = work / name
        text = texts["calibration"] if fit == "calibrated" else None
        done = convert_checkpoint(source, folder, recipe=recipe, calibrate=text, quality=False)
        rows.append(
            {
                "name": name,
                "bits_per_weight": round(done.bits_per_weight, 3),
                "relative_error": round(done.relative_error or 0.0, 4),
                **of_the_32b(load_recipe(recipe)),
            }
        )
        folders[name] = folder
    add_divergence(source, rows, list(folders.values()), held_out, options.tokens)
    for row in rows:
        add_solved(row, folders[row["name"]], options.problems)
        say(row)
    for bits, method in itertools.product(options.bits if chosen else (), chosen):
        row, folder = by_mlx_lm(method, bits, source, work, texts, options.limit)
        if "not_run" not in row:
            add_divergence(source, [row], [folder], held_out, options.tokens)
            add_solved(row, folder, options.problems)
        say(row)
        rows.append(row)
    return rows


def forms(work: Path) -> list[tuple[str, str | Path, str]]:
    """(name, recipe, fit): fits at 2, 3 and 4 bits, then every other recipe of the package."""
    found: list[tuple[str, str | Path, str]] = []
    for bits in (4, 3, 2):
        for fit in FITS:
            path = work / f"{fit}-{bits}.toml"
            kept = "least-squares" if fit == "calibrated" else fit
            path.write_text(f'[weights]\nbits = {bits}\ngroup_size = 64\nfit = "{kept}"\n', encoding="utf-8")
            found.append((path.stem, path, fit))
    done = {"2bit", "3bit", "4bit", "4bit-min-max", "pocket-4bit", "qwq-32b-preview-4bit"}
    return found + [(name, name, "as it says") for name in recipe_names() if name not in done]


def write_held_out(path: Path, *, seed: int = 21) -> Path:
    """Held-out traces to measure on, drawn by `seed`; returns the path."""
    rng = random.Random(0)
    held_out = [
        problem
        for kind, n in (("parentheses", 9), ("letters", None), ("arithmetic", None), ("game24", None))
        for problem in data.held_out_problems(kind, 4, seed=seed, n=n)
    ]
    assert all(map(is_held_out, held_out))
    rng.shuffle(held_out)
    lines = [{"question": problem.question, "reply": data.solve(problem, rng)} for problem in held_out]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def write_texts(work: Path, n_conversations: int, *, n_distilled: int) -> dict[str, Path]:
    """Conversations as training draws them to calibrate with: "calibration".

    "ids" has what `calibrated` reads of them, cut into rows for mlx-lm, and "distilled" n_distilled rows more for DWQ.
    """
    texts = {"calibration": work / "calibration.jsonl"}
    drawn = data.conversations(seed=22)
    talks = list(itertools.islice(drawn, n_conversations))
    texts["calibration"].write_text("\n".join(json.dumps({"messages": talk}) for talk in talks), encoding="utf-8")
    pocket = open_model_folder(FOLDER)
    read = read_calibration(texts["calibration"], pocket.checkpoint, pocket.config)
    texts["ids"] = work / "ids.json"
    texts["ids"].write_text(json.dumps(in_rows(itertools.chain(*read.texts))), encoding="utf-8")
    tokenizer = load_tokenizer(FOLDER, vocab_size=facts.POCKET.vocab_size)
    more = (id_ for talk in drawn for message in talk for id_ in tokenizer.hf.encode(message["content"]))
    texts["distilled"] = work / "distilled.json"
    texts["distilled"].write_text(json.dumps(in_rows(itertools.islice(more, n_distilled * ROW))), encoding="utf-8")
    return texts


def in_rows(ids: Iterable[int]) -> list[list[int]]:
    """Rows of ROW ids; the rest is left out."""
    whole = list(ids)
    return [whole[start : start + ROW] for start in range(0, len(whole) - ROW + 1, ROW)]


def off_grid(folder: Path) -> Path:
    """The pocket with its channels scaled by 0.7 to 1.4; what comes out is the same but for bfloat16's rounding.

    A norm's weights take back the factors of the matrices behind it, up_proj's rows those of down_proj's columns.
    """
    rng = np.random.default_rng(7)
    shutil.copytree(FOLDER, folder)
    parts = {path: dict(mx.load(str(path))) for path in sorted(folder.glob("*.safetensors"))}
    tensors = {name: array.astype(mx.float32) for part in parts.values() for name, array in part.items()}

    def factors(n: int) -> mx.array:
        return mx.array(np.exp2(rng.uniform(-0.5, 0.5, n)).astype(np.float32))

    for layer in range(facts.POCKET.num_hidden_layers):
        at = f"model.layers.{layer}."
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            by = factors(facts.POCKET.hidden_size)
            tensors[f"{at}{norm}.weight"] *= by
            for name in names:
                tensors[f"{at}{name}.weight"] /= by
        by = factors(facts.POCKET.intermediate_size)
        tensors[f"{at}mlp.up_proj.weight"] *= by[:, None]
        tensors[f"{at}mlp.down_proj.weight"] /= by
    by = factors(facts.POCKET.hidden_size)
    tensors["model.norm.weight"] *= by
    tensors["lm_head.weight"] /= by
    for path, part in parts.items():
        mx.save_safetensors(str(path), {name: tensors[name].astype(mx.bfloat16) for name in part}, {"format": "pt"})
    return folder


def by_mlx_lm(
    method: str, bits: int, source: Path, work: Path, texts: dict[str, Path], limit_s: float
) -> tuple[dict[str, Any], Path]:
    """mlx-lm's own method in a process of its own; a row that says why, where it does not run."""
    name, output = f"mlx-lm {method} {bits}", work / f"{method}-{bits}"
    ids = texts["distilled" if method == "DWQ" else "ids"]
    command = [
        sys.executable,
        str(HERE / "mlx_lm_methods.py"),
        method,
        *map(str, (source, output, bits, ids)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"name": name, "not_run": f"over {limit_s:g} s"}, output
    if done.returncode:
        return {"name": name, "not_run": (done.stderr.strip().splitlines() or ["killed"])[-1]}, output
    made = open_model_folder(output)
    n_weights = sum(math.prod(shape) for shape in tensor_shapes(made.config).values())
    return {"name": name, "bits_per_weight": round(8 * made.checkpoint.tensor_bytes / n_weights, 3)}, output


def add_divergence(source: Path, rows: list[dict[str, Any]], folders: list[Path], path: Path, n_positions: int) -> None:
    """KL and agreement of all forms with bfloat16, in one pass of the reference."""
    reference = open_model_folder(source)
    tokenizer = load_tokenizer(FOLDER, vocab_size=reference.config.vocab_size)
    text = read_text(path, tokenizer, reference.config, n_positions=n_positions)
    for row, measured in zip(rows, measure(reference, [open_model_folder(f) for f in folders], text), strict=True):
        quality = summarise(measured, text, tokenizer)
        row["kl"], row["top1_agreement"], row["n_tokens"] = quality.kl, quality.top1_agreement, quality.n_tokens


def add_solved(row: dict[str, Any], folder: Path, count: int) -> None:
    """Held-out equations of 9 numbers that greedy decoding solves."""
    if not count:
        return
    from pocket.evaluate import Job, _run

    problems = data.held_out_problems("parentheses", count, seed=3, n=9)
    job = Job(place=folder, weights="", task="", greedy=True, problems=problems)
    row["solved"], row["n_problems"] = _run(job)[1], count


def of_the_32b(recipe: Recipe) -> dict[str, Any]:
    """Size in GB, and the smallest Mac's memory in GiB on which the plan gives 8,192 positions."""
    model = shape_of_recipe(facts.QWQ_32B_PREVIEW, recipe)
    fits = (
        gib
        for gib in MACS_GIB
        if plan_memory(model, Workload(context=CONTEXT), limit_bytes=metal_limit_bytes(gib << 30)).fits
    )
    n_bytes = weights_bytes(model.config, model.packed, FLOAT_BYTES["bfloat16"])
    return {"gb_32b": round(n_bytes / 1e9, 2), "smallest_mac_gib": next(fits, None)}


def say(row: dict[str, Any]) -> None:
    """A row of the table."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
