"""The quality number of a conversion: decided before anything is written, measured after the last tensor is packed.

Source and conversion run on the same text, layer by layer (`qwq_mlx.quality`). A small source is measured unless that
is switched off; a large one only when it is asked for, since it takes minutes. What is measured lies in the partial
folder, so an interruption there loses the measurement and nothing else.

Does not: decide whether the number is good, or measure a source whose shards are dropped as they are converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_mlx.errors import LoadError, OptionError

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.progress import ConvertProgress
    from qwq_mlx.model.tokenizer import LoadedTokenizer
    from qwq_mlx.quality.result import Quality
    from qwq_mlx.quality.text import QualityText

__all__ = ["SMALL_BYTES", "QualityPlan", "measure_quality", "plan_quality"]

SMALL_BYTES = 2_000_000_000
"""Sources up to this are measured without being asked: about a billion weights, a minute on a small Mac (estimated)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityPlan:
    """What will be measured. text: None where nothing is. note: in words, for the plan. peak_memory_bytes: of the
    process while it is measured, an estimate; 0 where it is not."""

    note: str
    peak_memory_bytes: int = 0
    text: QualityText | None = None
    tokenizer: LoadedTokenizer | None = None


def measure_quality(
    quality_plan: QualityPlan, plan: Plan, folder: Path, progress: Callable[[ConvertProgress], None] | None
) -> Quality | None:
    """Compare a packed model with its source; None where nothing is to be measured. Raises SourceError.

    folder: of the packed model; config and shards are there.
    """
    from qwq_mlx.convert.progress import ConvertProgress
    from qwq_mlx.model.folder import ModelFolder, open_model_folder
    from qwq_mlx.quality.measure import measure
    from qwq_mlx.quality.result import summarise

    text = quality_plan.text
    if text is None:
        return None
    assert quality_plan.tokenizer is not None

    def advance(done_bytes: int, total_bytes: int) -> None:
        if progress is not None:
            what = f"on {text.name}"
            progress(ConvertProgress(phase="quality", what=what, done_bytes=done_bytes, total_bytes=total_bytes))

    if plan.checkpoint.gguf is None:
        source = open_model_folder(plan.checkpoint.shards[0].path.parent, follow_links=True)  # as the plan was told to
    else:
        source = ModelFolder(path=plan.checkpoint.where, checkpoint=plan.checkpoint, config=plan.config, packed={})
    (measured,) = measure(source, [open_model_folder(folder)], text, progress=advance)
    return summarise(measured, text, quality_plan.tokenizer)


def plan_quality(
    plan: Plan, wanted: str | Path | bool | None, *, n_tokens: int | None, keep_source: bool
) -> QualityPlan:
    """Decide what is measured and read the text.

    wanted: False nothing; None the bundled text, where the source is small and stays; True the bundled text; or a file.
    n_tokens: of text, at most; None is quality.text.DEFAULT_POSITIONS.
    Raises OptionError: for a text that cannot be measured, and for whatever was asked for and cannot be honoured.
    """
    if wanted is False:
        if n_tokens is not None:
            raise OptionError(
                "quality_tokens says how much is measured, and `quality=False` that nothing is. Give one of the two."
            )
        return QualityPlan(note="not measured (`quality=False`)")
    is_asked = wanted is not None or n_tokens is not None
    if not is_asked and plan.source_bytes > SMALL_BYTES:
        return QualityPlan(note=_offer(plan, keep_source))
    problem = _problem(plan, keep_source)
    if problem and is_asked:
        raise OptionError(problem)
    if problem:
        return QualityPlan(note=f"not measured: {problem}")
    from qwq_mlx.convert.plan_memory import kernel_bytes, model_peak_bytes
    from qwq_mlx.model.tokenizer import load_tokenizer
    from qwq_mlx.quality.estimate import estimate_memory_bytes
    from qwq_mlx.quality.text import DEFAULT_POSITIONS, bundled_text, read_text

    tokenizer = load_tokenizer(plan.checkpoint.folder, vocab_size=plan.config.vocab_size)
    path = bundled_text(plan.config) if wanted is None or wanted is True else Path(wanted)
    try:
        text = read_text(path, tokenizer, plan.config, n_positions=DEFAULT_POSITIONS if n_tokens is None else n_tokens)
    except OptionError as error:  # a template that fails, an odd tokenizer: a reason not to measure, not to convert
        if is_asked:
            raise
        return QualityPlan(note=f"not measured: {error}")
    bits = {each.packing.bits for each in plan.tensors if each.packing is not None}
    own_bytes = estimate_memory_bytes(plan.config, text, bits=bits)
    kernel = kernel_bytes() if any(each.is_fitted for each in plan.tensors) else 0
    peak_bytes = kernel + model_peak_bytes(own_bytes)
    note = _note(plan, text, own_bytes)
    return QualityPlan(note=note, peak_memory_bytes=peak_bytes, text=text, tokenizer=tokenizer)


def _offer(plan: Plan, keep_source: bool) -> str:
    """That nothing is measured, and what it would take; before any text is read, so of a whole one."""
    from qwq_mlx.quality.text import DEFAULT_POSITIONS

    flags = "`quality` with `keep_source=True`" if plan.origin.is_remote and not keep_source else "`quality`"
    duration = _duration(plan, [DEFAULT_POSITIONS])
    return f"not measured; {flags} measures it on a bundled text, in about {duration} more at most"


def _problem(plan: Plan, keep_source: bool) -> str | None:
    """Why the quality cannot be measured, as a sentence."""
    if plan.origin.is_remote and not keep_source:
        return (
            "quality needs the whole source beside the conversion, and shards from the Hub are dropped as they are "
            "converted. Add `keep_source=True`, or convert with `quality=False` and compare later with python -m "
            "qwq_mlx.compare."
        )
    from qwq_mlx.model.layout import packings

    names = {output.entry.name: None for tensor in plan.tensors for output in tensor.outputs}
    try:
        packings(json.loads(plan.config_json), plan.config, names, where=plan.recipe.name)
    except LoadError as error:
        return f"quality cannot be measured with this recipe: {error}"
    return None


def _note(plan: Plan, text: QualityText, own_bytes: int) -> str:
    from qwq_mlx.convert.plan_text import size_text

    duration = _duration(plan, [len(window.ids) for window in text.windows])
    return (
        f"{text.n_tokens:,} tokens of {text.name}, both models layer by layer: about {duration} more, "
        f"{size_text(own_bytes)} of memory (`quality=False` skips it)"
    )


def _duration(plan: Plan, windows: Sequence[int]) -> str:
    """How long measuring takes on windows of so many ids, for people."""
    from qwq_mlx.convert.plan_text import duration_text
    from qwq_mlx.quality.estimate import estimate_s

    return duration_text(estimate_s(plan.config, windows, weights_bytes=plan.source_bytes + plan.output_bytes))
