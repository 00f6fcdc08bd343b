"""A trace as one picture: entropy and log-probability over its tokens, with thinking, answer, candidates and loops.

Both curves are drawn per token, pale, with their mean over a window on top: single tokens swing from 0 to several nats,
and what a reader looks for is where the model was unsure for a while.

Does not: need a display, or change matplotlib's settings; matplotlib is the extra "plot".
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from qwq_mlx.errors import OptionError, SavingError, system_said
from qwq_mlx.trace.stated_answers import candidates
from qwq_mlx.trace.trace import Trace

__all__ = ["new_figure", "plot_trace", "save_figure", "smoothed"]

_SUFFIXES = (".png", ".pdf", ".svg")
_MAX_LABELS = 12
_THINKING, _ANSWER, _LOOP, _INJECTED = "#dfe7f1", "#dcefdc", "#c0392b", "#8e44ad"


def plot_trace(trace: Trace, path: str | Path) -> None:
    """Draw entropy and log-probability with segments, stated answers and loops into a .png, .pdf or .svg file.

    Raises OptionError for another kind of file, a missing matplotlib or a trace without tokens; SavingError where the
    disk does not take it.

    >>> qwq_mlx.plot_trace(trace, "strawberry.svg")
    >>> qwq_mlx.plot_trace(trace, "strawberry.txt")
    Traceback (most recent call last):
    qwq_mlx.errors.OptionError: strawberry.txt: is no picture's name, expected one that ends in .png, .pdf, .svg.
    """
    if not trace.ids:
        raise OptionError("The trace has no tokens, so there is nothing to draw.")
    figure = new_figure(path, width=12, height=6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _curve(upper, trace.entropies, "entropy (nats)", "#1f4e79")
    _curve(lower, trace.logprobs, "log-probability (nats)", "#7a4b00")
    for axes in (upper, lower):
        _segments(axes, trace)
        _events(axes, trace)
    _candidates(upper, trace)
    lower.set_xlabel("output token")
    name = trace.model.get("name", "")
    upper.set_title(
        f"{name}: {len(trace.ids):,} tokens, {trace.finish_reason}, answer {trace.answer!r:.60}",
        pad=28,
        parse_math=False,
    )
    handles, labels = upper.get_legend_handles_labels()
    lower.legend(handles, labels, loc="lower right", ncols=len(labels) or 1, fontsize=8)
    save_figure(figure, path)


def new_figure(path: str | Path, *, width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, for a file of this name.

    Raises OptionError for another kind of file, or a missing matplotlib.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise OptionError(f"{path}: is no picture's name, expected one that ends in {', '.join(_SUFFIXES)}.")
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise OptionError(f"Drawing needs matplotlib ({error}). Install it: pip install 'qwq-mlx[plot]'.") from error
    return figure_module.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure of `new_figure`. Raises SavingError where the disk does not take it."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise SavingError(
            f"{path}: the picture cannot be saved {system_said(error, 'Make room, or give another place.')}", error
        ) from error


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over up to `window` values around each, without those that are NaN."""
    known = ~np.isnan(values)
    ones = np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), ones)
    counts = np.convolve(known.astype(float), ones)
    half = window // 2
    place = slice(half, half + len(values))
    means: np.ndarray = np.divide(sums[place], counts[place], out=np.full(len(values), np.nan), where=counts[place] > 0)
    return means


def _curve(axes: Any, column: tuple[float | None, ...], label: str, color: str) -> None:
    values = np.array([np.nan if each is None else each for each in column], np.float64)
    window = max(1, min(101, len(values) // 20)) | 1
    places = np.arange(len(values))
    axes.plot(places, values, color=color, alpha=0.25, linewidth=0.6)
    axes.plot(places, smoothed(values, window), color=color, linewidth=1.4, label=f"mean over {window}")
    axes.set_ylabel(label)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.grid(alpha=0.3)


def _segments(axes: Any, trace: Trace) -> None:
    axes.axvspan(*trace.thinking_span, color=_THINKING, zorder=0, label="thinking")
    if trace.conclusion_span is not None:
        axes.axvspan(*trace.conclusion_span, color=_ANSWER, zorder=0, label="answer")


def _events(axes: Any, trace: Trace) -> None:
    loops = [event for event in trace.events if event.get("event") == "loop"]
    for number, event in enumerate(loops):
        end = min(event["end"], len(trace.ids))
        axes.axvspan(
            event["start"],
            end,
            facecolor="none",
            edgecolor=_LOOP,
            alpha=0.35,
            hatch="//",
            label="loop" if number == 0 else None,
        )
    for number, each in enumerate(trace.injections):
        axes.axvline(each.start, color=_INJECTED, linewidth=1.5, label="answer asked for" if number == 0 else None)


def _candidates(axes: Any, trace: Trace) -> None:
    """A mark over each stated answer; its value where it is another than the one before, while there is room."""
    stated = candidates(trace.texts)
    if not stated:
        return
    top = axes.get_xaxis_transform()
    places = [each.index for each in stated]
    axes.plot(
        places,
        [1.02] * len(places),
        "v",
        color="black",
        markersize=5,
        transform=top,
        clip_on=False,
        label="stated answer",
    )
    new = [
        each
        for before, each in zip((None, *stated), stated, strict=False)
        if before is None or before.value != each.value
    ]
    gap, last = len(trace.ids) / _MAX_LABELS, -np.inf
    for each in new:
        if each.index - last >= gap:
            axes.text(
                each.index, 1.05, each.value[:16], fontsize=8, ha="center", va="bottom", transform=top, parse_math=False
            )
            last = each.index
