"""Folders of one model, compared: size, bits per weight, and what each lost against a reference on a text.

All checks come before the first layer: every folder's headers, that they are forms of one model with one tokenizer, and
the text. Then all run together, layer by layer, so that the reference is read once.

Does not: print, or compare different models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.folder import ModelFolder, opened_model
from qwq_mlx.model.tokenizer import check_same_tokenizer, load_tokenizer
from qwq_mlx.quality.measure import MeasureProgress, check_comparable, measure
from qwq_mlx.quality.result import Quality, summarise
from qwq_mlx.quality.text import DEFAULT_POSITIONS, bundled_text, read_text

__all__ = ["Comparison", "Row", "compare_models", "comparison_text"]

_NAME_WIDTH = 40
_MAX_COLUMNS = 12  # of the table by layer; names become letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One folder. size_bytes: of its tensors. quality: against the reference; None for the reference itself."""

    folder: Path
    weights: str
    size_bytes: int
    bits_per_weight: float
    quality: Quality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows in the order given, the reference first. text: file name, n_tokens measured in n_positions run."""

    text: str
    n_tokens: int
    n_positions: int
    rows: tuple[Row, ...]


def compare_models(
    folders: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    n_positions: int = DEFAULT_POSITIONS,
    progress: MeasureProgress | None = None,
) -> Comparison:
    """Measure folders against a reference on a text.

    folders: conversions, checkpoints or GGUFs. reference: what they are measured against; None is the first of them.
    text: a file (see quality.text), None for the bundled one. n_positions: of it, at most. progress: see
    quality.measure.
    Raises OptionError (too few folders, different models or tokenizers, a text that is empty or too short), LoadError
    and SourceError for a folder that is missing or damaged.
    """
    others = list(folders) if reference is not None else list(folders[1:])
    if not folders or not others:
        raise OptionError(
            f"{len(folders)} folders to compare, expected at least two, or one and a `reference`. "
            "Give a checkpoint and a conversion of it."
        )
    first = reference if reference is not None else folders[0]
    with ExitStack() as opened:
        files = [opened.enter_context(opened_model(folder)) for folder in (first, *others)]
        return _compare(files, text, n_positions, progress)


def _compare(
    files: Sequence[ModelFolder], text: str | Path | None, n_positions: int, progress: MeasureProgress | None
) -> Comparison:
    """files: the reference, and what is measured against it."""
    tokenizers = [load_tokenizer(each.checkpoint.folder, vocab_size=each.config.vocab_size) for each in files]
    for each, tokenizer in zip(files[1:], tokenizers[1:], strict=True):
        check_comparable(files[0], each)
        check_same_tokenizer(files[0].path, tokenizers[0], each.path, tokenizer)
    quality_text = read_text(
        bundled_text(files[0].config) if text is None else text, tokenizers[0], files[0].config, n_positions=n_positions
    )
    measured = measure(files[0], files[1:], quality_text, progress=progress)
    qualities = [None, *(summarise(each, quality_text, tokenizers[0]) for each in measured)]
    return Comparison(
        text=quality_text.name,
        n_tokens=quality_text.n_tokens,
        n_positions=quality_text.n_positions,
        rows=tuple(_row(each, quality) for each, quality in zip(files, qualities, strict=True)),
    )


def _row(files: ModelFolder, quality: Quality | None) -> Row:
    n_weights = sum(math.prod(shape) for shape in tensor_shapes(files.config).values())
    size_bytes = files.checkpoint.tensor_bytes
    return Row(
        folder=files.path,
        weights=files.weights,
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / n_weights,
        quality=quality,
    )


def comparison_text(comparison: Comparison) -> str:
    """The comparison as two tables: one line a folder, then the drift by layer, in percent."""
    head = (
        f"{'':<3}{'model':<{_NAME_WIDTH}}{'size':>10}{'bits':>7}{'KL':>11}{'p99':>9}{'same top':>10}{'perplexity':>12}"
    )
    lines = [head]
    for letter, row in zip(_letters(), comparison.rows, strict=False):
        start = f"{letter:<3}{_short(row.folder):<{_NAME_WIDTH}}{_size(row.size_bytes):>10}{row.bits_per_weight:>7.2f}"
        quality = row.quality
        if quality is None:
            first = next(each.quality for each in comparison.rows if each.quality is not None)
            lines.append(f"{start}{'reference':>11}{'':>9}{'':>10}{first.reference_perplexity:>12.4f}")
        else:
            lines.append(
                f"{start}{quality.kl:>11.3e}{quality.kl_p99:>9.1e}{100 * quality.top1_agreement:>8.2f} %"
                f"{quality.perplexity:>12.4f}"
            )
    lines.append(
        f"KL in nats a token, mean and 99th percentile, of {comparison.n_tokens:,} tokens of {comparison.text} "
        f"({comparison.n_positions:,} run); bits: per weight, scales included."
    )
    qualities = [row.quality for row in comparison.rows if row.quality is not None][:_MAX_COLUMNS]
    lines += ["", "drift, %  " + "".join(f"{letter:>9}" for letter in _letters()[1 : len(qualities) + 1])]
    for layer in range(len(qualities[0].drift)):
        name = "embedding" if layer == 0 else f"layer {layer}"
        lines.append(f"{name:<10}" + "".join(f"{100 * each.drift[layer]:>9.3f}" for each in qualities))
    return "\n".join(lines)


def _letters() -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + " " * 1000


def _short(folder: Path) -> str:
    """The end of a path, which tells more than its start."""
    name = str(folder)
    limit = _NAME_WIDTH - 1
    return name if len(name) <= limit else f"…{name[-limit + 1 :]}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"
