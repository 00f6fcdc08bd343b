"""What forms of a real model lose against its bf16 weights on recorded outputs, as in docs/benchmarks.md.

    python scripts/measure_real.py SOURCE TRACES.jsonl FORM... [--traces N] [--tokens N] [--calibration-traces 17]

FORM: a folder of converted weights, or what to convert SOURCE by: a recipe's name or file, RECIPE+calibrate (fitted to
the calibration text), RECIPE+calibrate=FILE (to another), size-of-RECIPE (a target size of exactly that recipe's bytes,
from 4bit), size-of-RECIPE+calibrate, or mlx-lm:METHOD:BITS (GPTQ, AWQ, DWQ or DYNAMIC of `mlx_lm_methods`, with the ids
of the calibration text). The first form is the one that the others are compared with.

TRACES is as `recorded` says. Every 16th output, --calibration-traces of them, is calibration text and is not measured;
--calibrate FILE calibrates on another text instead. Of the others each is run whole, behind its prompt, and its
response is measured. All forms are run side by side, a chunk of traces at a time, layer by layer in float32 with
unpacked weights, so that in memory are one layer and a chunk's hidden states, and no logits beyond one block of ids.

A row has means over all tokens with standard errors over traces: KL(bf16 || form) in nats; the share of tokens with the
same first choice; the loss, in nats a token, of the log-probability of the recorded text. "paired" are the differences
from the first form with the standard errors of these differences: traces differ far more than forms do on one trace.
Rows go to stderr, one JSON object to stdout. On MLX's CUDA backend set MLX_ENABLE_TF32=0, or products are rounded.

Does not: time anything, or say what is good enough.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from recorded import read_rows  # noqa: E402

from qwq_mlx.convert import convert_checkpoint  # noqa: E402
from qwq_mlx.convert.calibration.text import read_calibration  # noqa: E402
from qwq_mlx.files.checkpoint import open_checkpoint  # noqa: E402
from qwq_mlx.model.folder import ModelFolder, open_model_folder  # noqa: E402
from qwq_mlx.model.prompt import encode_text, prompt_ids  # noqa: E402
from qwq_mlx.model.tokenizer import load_tokenizer  # noqa: E402
from qwq_mlx.quality.divergence import Positions  # noqa: E402
from qwq_mlx.quality.measure import measure  # noqa: E402
from qwq_mlx.quality.text import QualityText, Window  # noqa: E402

MEASURES = ("kl", "same_first_choice", "loss")
CALIBRATE_EVERY = 16
ROW = 512  # ids of mlx-lm's calibration rows; its own default


def main() -> int:
    """Convert, measure, print."""
    options = parse()
    rows = read_rows(options.traces)
    calibrating = rows[::CALIBRATE_EVERY][: options.calibration_traces]
    measured = [row for row in rows if row not in calibrating]
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = Path(temporary)
        text = options.calibrate or write_calibration(work / "calibration.jsonl", calibrating)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
        folders = [form_folder(form, options.source, options.keep or work, text) for form in options.forms]
        if options.convert_only:
            return 0
        forms = [open_model_folder(folder) for folder in folders]
        reference = open_model_folder(options.source)
        windows = read_windows(measured[:: options.every], reference, options.context)
        windows = bounded(windows, options.n_traces, options.tokens)
        tallies = measure_forms(reference, forms, windows, chunk=options.chunk)
    table = rows_of(tallies)
    if options.sums:
        write_sums(options.sums, measured[:: options.every], options.forms, tallies)
    for name, form, row in zip(options.forms, forms, table, strict=True):
        row |= {"bytes": form.checkpoint.tensor_bytes}
        say({"form": name, **row})
    named = [{"form": name, **row} for name, row in zip(options.forms, table, strict=True)]
    print(json.dumps({"source": options.source.name, "calibration": Path(text).name, "rows": named}))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the bf16 checkpoint")
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response")
    parser.add_argument("forms", nargs="+", metavar="FORM", help="folder, RECIPE, RECIPE+calibrate, size-of-RECIPE")
    parser.add_argument("--traces", dest="n_traces", type=int, metavar="N", help="measured at most (default: all)")
    parser.add_argument("--every", type=int, default=1, help="measure every Nth of them (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="measured at most; the last trace is cut (default: all)")
    parser.add_argument("--context", type=int, default=8192, help="ids of a trace, at most (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=32_768, help="positions side by side (default: %(default)s)")
    parser.add_argument("--calibration-traces", type=int, default=17, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="a calibration text in their place")
    parser.add_argument("--sums", type=Path, metavar="FILE", help="write every trace's sums there, as JSON lines")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where converted forms of this SOURCE stay, and are found again"
    )
    parser.add_argument("--convert-only", action="store_true", help="with --keep: measure nothing")
    parser.add_argument("--work", type=Path, help="where converted forms go (default: the system's folder)")
    options = parser.parse_args()
    if options.convert_only and options.keep is None:
        parser.error("--convert-only needs --keep, or nothing is left of what it converts")
    return options


def write_calibration(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The outputs as a calibration text: conversations."""
    lines = (json.dumps({"messages": [*_prompt(r), {"role": "assistant", "content": r["response"]}]}) for r in rows)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def form_folder(form: str, source: Path, work: Path, calibration: Path) -> Path:
    """The folder of a form, converted now where it is no folder yet."""
    output = work / re.sub(r"[/:+=]", "-", form)
    if Path(form).is_dir() or output.is_dir():
        return output if output.is_dir() else Path(form)
    started = time.monotonic()
    if form.startswith("mlx-lm:"):
        by_mlx_lm(form, source, output, calibration)
    else:
        convert(form, source, output, calibration)
    say({"form": form, "converted_s": round(time.monotonic() - started, 1)})
    return output


def by_mlx_lm(form: str, source: Path, output: Path, calibration: Path) -> None:
    """Pack by mlx-lm's own method, in a process of its own."""
    _, method, bits = form.split(":")
    texts = read_calibration(calibration, open_checkpoint(source), open_model_folder(source).config).texts
    ids = [token_id for text in texts for token_id in text]
    rows = [ids[first : first + ROW] for first in range(0, len(ids) - ROW + 1, ROW)]
    path, partial = output.with_suffix(".json"), output.with_suffix(".partial")
    path.write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, str(HERE / "mlx_lm_methods.py"), method, *map(str, (source, partial, bits, path))]
    subprocess.run(command, check=True)
    partial.rename(output)  # whole, or it would be found again as a form


def convert(form: str, source: Path, output: Path, calibration: Path) -> None:
    """Convert by this package."""
    recipe, _, suffix = form.partition("+")
    kind, _, file = suffix.partition("=")
    if kind not in ("", "calibrate"):
        raise SystemExit(f"{form}: ends in +{suffix}, expected +calibrate. Give a folder, a recipe or size-of-RECIPE.")
    target_bytes = None
    if recipe.startswith("size-of-"):
        same_as = recipe.removeprefix("size-of-")
        target_bytes = convert_checkpoint(source, output, recipe=same_as, quality=False, dry_run=True).output_bytes
        recipe = "4bit"
    convert_checkpoint(
        source,
        output,
        recipe=recipe,
        target_bytes=target_bytes,
        calibrate=(file or calibration) if suffix else None,
        quality=False,
    )


def read_windows(rows: Sequence[dict[str, Any]], files: ModelFolder, context: int) -> list[Window]:
    """A window for each output: its prompt by the model's template, and its response, which is measured."""
    tokenizer = load_tokenizer(files.path, vocab_size=files.config.vocab_size)
    windows = []
    for row in rows:
        prompt = prompt_ids(tokenizer, _prompt(row), context=context)
        ids = (*prompt, *encode_text(tokenizer, row["response"]))[:context]
        windows.append(Window(ids=ids, first=len(prompt)))
    return windows


def bounded(windows: Sequence[Window], n_traces: int | None, n_tokens: int | None) -> list[Window]:
    """The first windows, with n_tokens measured at most; the last is cut."""
    chosen: list[Window] = []
    room = sum(len(each.ids) for each in windows) if n_tokens is None else n_tokens
    for window in windows[:n_traces]:
        if room <= 0:
            break
        cut = Window(ids=window.ids[: window.first + room], first=window.first)
        room -= len(cut.ids) - cut.first
        chosen.append(cut)
    return chosen


@dataclass(slots=True)
class Sums:
    """A form's sums over each trace. n_tokens: (traces,). sums: (traces, MEASURES)."""

    n_tokens: list[int] = field(default_factory=list)
    sums: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, positions: Positions) -> None:
        """Count one trace in."""
        same = positions.top == positions.reference_top
        loss = positions.reference_logprob - positions.logprob
        self.n_tokens.append(len(same))
        self.sums.append((float(positions.kl.sum()), float(same.sum()), float(loss.sum())))


def measure_forms(
    reference: ModelFolder, forms: Sequence[ModelFolder], windows: Sequence[Window], *, chunk: int
) -> list[Sums]:
    """The sums of each form. chunk: positions that are run side by side."""
    tallies = [Sums() for _ in forms]
    for part in chunks(windows, chunk):
        text = QualityText(name="traces", sha256="", windows=tuple(part), n_left_out=0)
        for tally, measured in zip(tallies, measure(reference, forms, text), strict=True):
            for positions in measured.windows:
                tally.add(positions)
        done = tallies[0]
        say({"traces": len(done.n_tokens), "of": len(windows), "kl": [round(row["kl"], 5) for row in rows_of(tallies)]})
    return tallies


def write_sums(path: Path, rows: Sequence[dict[str, Any]], forms: Sequence[str], tallies: Sequence[Sums]) -> None:
    """A line for each measured trace: its id, its tokens, and of each form what MEASURES sum up to."""
    lines = []
    for place, n_tokens in enumerate(tallies[0].n_tokens):
        sums = {form: tally.sums[place] for form, tally in zip(forms, tallies, strict=True)}
        lines.append(json.dumps({"id": rows[place]["id"], "n_tokens": n_tokens, "sums": sums}))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def chunks(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows in order, with `size` positions together at most; a longer one is alone."""
    part: list[Window] = []
    for window in windows:
        if part and sum(len(each.ids) for each in part) + len(window.ids) > size:
            yield part
            part = []
        part.append(window)
    if part:
        yield part


def rows_of(tallies: Sequence[Sums]) -> list[dict[str, Any]]:
    """Means, standard errors, and differences from the first form."""
    n = np.array(tallies[0].n_tokens)
    first = np.array(tallies[0].sums)
    rows = []
    for tally in tallies:
        sums = np.array(tally.sums)
        mean, error = mean_and_error(sums, n)
        difference, difference_error = mean_and_error(sums - first, n)
        rows.append(
            {
                "n_traces": len(n),
                "n_tokens": int(n.sum()),
                **{f"{name}": round(float(mean[i]), 6) for i, name in enumerate(MEASURES)},
                **{f"{name}_se": round(float(error[i]), 6) for i, name in enumerate(MEASURES)},
                **{f"{name}_paired": round(float(difference[i]), 6) for i, name in enumerate(MEASURES)},
                **{f"{name}_paired_se": round(float(difference_error[i]), 6) for i, name in enumerate(MEASURES)},
            }
        )
    return rows


def mean_and_error(sums: NDArray[np.float64], n_tokens: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean over all tokens and its standard error, traces being what was drawn (a ratio of two sums over traces).

    sums: (traces, measures). Returns two (measures,); of one trace the errors are 0 and say nothing.
    """
    mean = sums.sum(axis=0) / n_tokens.sum()
    residuals = sums - n_tokens[:, None] * mean
    count = len(n_tokens)
    variance = (residuals**2).sum(axis=0) * count / max(count - 1, 1)
    return mean, np.sqrt(variance) / n_tokens.sum()


def say(row: dict[str, Any]) -> None:
    """A row, as it comes."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
