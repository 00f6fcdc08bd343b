"""The bundled model's greedy ids on this backend, beside those that a CPU drew (recorded_ids.json).

Backends round differently, so where the two likeliest ids are nearly equal another one may win: a near-tie, which is
named and no failure. The check goes on behind it on the recorded ids, so a near-tie does not hide what follows.

Does not: sample (draws follow from the same logits).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.options import NEUTRAL, Sampling

__all__ = ["NEAR_TIE", "Difference", "check_recorded_ids", "differences", "record"]

NEAR_TIE = {"float32": 0.01, "bfloat16": 0.5}
"""Margin in logits up to which another id may win, by compute type: logits of 16 to 32 are 0.125 apart in bfloat16."""
MARGIN_TOLERANCE = {"float32": 0.05, "bfloat16": 2.0}
"""By how many logits the lead of a recorded id over the next one may differ; most leads are 12 to 20."""

_FILE = Path(__file__).with_name("recorded_ids.json")
_QUESTION = (
    "Please add a pair of parentheses to the incorrect equation: 1 + 2 * 3 + 4 * 5 + 6 * 7 + 8 * 9 = 479, to make the "
    "equation true."
)
_N_IDS = 96
_CHUNK = 64
_SLOW_S = 5.0  # a first pass of this length compiled kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A place where this backend drew another id.

    recorded_margin: by how much the recorded id led there when it was recorded. margin: by how much the drawn id leads
      the recorded one here. Both in logits.
    """

    place: int
    drawn: int
    recorded: int
    recorded_margin: float
    margin: float


def check_recorded_ids(subject: Subject) -> Result:
    """Greedy ids are the recorded ones, up to near-ties; also how long the first pass of this process took."""
    recorded = json.loads(_FILE.read_text())
    model = subject.pocket
    prompt = _prompt(model)
    if prompt != recorded["prompt_ids"]:
        return Result(
            outcome="failed",
            found=f"the prompt became {len(prompt)} ids, others than the recorded ones",
            expected=f"{len(recorded['prompt_ids'])} ids as recorded; the tokenizers package may have changed",
        )
    start = time.perf_counter()
    import_mlx().eval(model.module(import_mlx().array([prompt])))
    first_s = time.perf_counter() - start
    tolerance = NEAR_TIE[model.compute_type]
    seen = differences(model, prompt, recorded["ids"], recorded["margins"])
    wrong = [each for each in seen if max(each.recorded_margin, each.margin) > tolerance]
    n_same = len(recorded["ids"]) - len(seen)
    margin_error = _margin_error(model, recorded)
    found = f"{n_same} of {len(recorded['ids'])} ids are the recorded ones, their margins within {margin_error:.4f}"
    found += "".join(
        f"; at place {each.place} {each.drawn} instead of {each.recorded}, which led by {each.recorded_margin:.3f} "
        f"when recorded and trails by {each.margin:.3f} here"
        for each in (wrong or seen)[:3]
    )
    if seen and not wrong:
        found += " (near-ties)"
    if first_s > _SLOW_S:
        found += f"; the first pass took {first_s:.0f} s, because kernels were compiled"
    return Result(
        outcome="failed" if wrong or not margin_error <= MARGIN_TOLERANCE[model.compute_type] else "ok",
        found=found,
        expected=f"the recorded ids, or others within {tolerance} logits of them, and margins within "
        f"{MARGIN_TOLERANCE[model.compute_type]}",
        values={
            "compute_type": model.compute_type,
            "same": n_same,
            "margin_error": round(margin_error, 5),
            "first_pass_s": round(first_s, 2),
            "differences": [asdict(each) for each in seen],
        },
    )


def differences(
    model: LoadedModel, prompt: Sequence[int], ids: Sequence[int], margins: Sequence[float]
) -> list[Difference]:
    """Where the greedy ids behind the prompt differ; after each difference the run goes on with the recorded id."""
    decoder, row = _started(model, prompt, len(ids))
    seen = []
    for place, (expected, recorded_margin) in enumerate(zip(ids, margins, strict=True)):
        drawn = decoder.draw(row).id
        if drawn == expected:
            continue
        logits = _logits(model, [*prompt, *ids[:place]])[-1]
        seen.append(
            Difference(
                place=place,
                drawn=drawn,
                recorded=expected,
                recorded_margin=recorded_margin,
                margin=round((logits[drawn] - logits[expected]).item(), 4),
            )
        )
        row.rewind(place)
        decoder.force(row, [expected])
    return seen


def record(model: LoadedModel) -> dict[str, Any]:
    """The content of recorded_ids.json as this backend draws it: `scripts/record_greedy_ids.py` writes it."""
    prompt = _prompt(model)
    decoder, row = _started(model, prompt, _N_IDS)
    ids = [decoder.draw(row).id for _ in range(_N_IDS)]
    margins = [round(value, 4) for value in _margins(model, prompt, ids)]
    return {"prompt_ids": prompt, "ids": ids, "margins": margins}


def _margins(model: LoadedModel, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """By how much the likeliest id leads the next one at the place of each id, in logits."""
    top = import_mlx().sort(_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1], axis=-1)[:, -2:]
    margins: list[float] = (top[:, 1] - top[:, 0]).tolist()
    return margins


def _margin_error(model: LoadedModel, recorded: dict[str, Any]) -> float:
    """The largest difference between the recorded margins and those of this backend; NaN where one is NaN."""
    margins = np.array(_margins(model, recorded["prompt_ids"], recorded["ids"]))
    return float(np.abs(margins - recorded["margins"]).max())


def _prompt(model: LoadedModel) -> list[int]:
    return prompt_ids(model.tokenizer, _QUESTION, context=model.config.max_position_embeddings)


def _started(model: LoadedModel, prompt: Sequence[int], n_ids: int) -> tuple[Decoder, Row]:
    """A greedy row behind the prompt."""
    decoder = Decoder(model.module, n_ids=model.tokenizer.n_ids)
    greedy = Sampler(Sampling(temperature=0.0).resolve(NEUTRAL), seed=0)
    row = Row(greedy, cache=new_cache(model.module), max_tokens=n_ids)
    for _ in decoder.prefill(row, prompt, chunk=_CHUNK):
        pass
    return decoder, row


def _logits(model: LoadedModel, ids: Sequence[int]) -> Any:
    """(n, n_ids) float32 logits behind every id, in one pass."""
    mx = import_mlx()
    return model.module(mx.array([list(ids)]))[0, :, : model.tokenizer.n_ids].astype(mx.float32)
