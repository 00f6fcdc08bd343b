"""report.html: the report as one page with plots. No scripts, nothing loaded from elsewhere.

Names, ids and answers come from models and files, so all of them are escaped and control characters are shown as
symbols. The page follows from the summary alone, without times or dates.

Does not: work anything out (`summary` did).
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from qwq_mlx.evaluate.plots import ranges
from qwq_mlx.evaluate.summary import Summary
from qwq_mlx.evaluate.table import summary_text
from qwq_mlx.quality.report import PAGE_STYLE, printable
from qwq_mlx.quality.svg import lines

__all__ = ["page"]

_MAX_MODELS = 7  # colours of the style sheet


def page(summary: Summary) -> str:
    """The page as HTML text. summary: of at least one model."""
    title = escape(printable(summary.task))
    figures = "".join(
        f"<figure>{plot}<figcaption>{text}</figcaption></figure>\n" for plot, text in _figures(summary) if plot
    )
    return "".join(
        (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}: what was solved</title>\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
            f"<style>{PAGE_STYLE}pre {{ overflow-x: auto; }} pre code {{ white-space: pre; }}</style>\n",
            f"<h1>{title}</h1>\n",
            f'<p class="soft">problems: {summary.n_problems:,}; samples of each: {summary.samples:,}; '
            f"models: {len(summary.models):,}</p>\n",
            f'<div class="plots">{figures}</div>\n',
            f"<h2>Tables</h2>\n<pre><code>{escape(printable(summary_text(summary), keep=chr(10)))}</code></pre>\n",
            _disputed(summary),
            '<p class="soft">The same numbers, and every disputed answer, are in report.json; each sample and its '
            "verdict are in the files of rows.</p>\n</html>\n",
        )
    )


def _figures(summary: Summary) -> list[tuple[str, str]]:
    """Each plot with its caption; "" where there is nothing to plot."""
    models = summary.models
    shown = models[:_MAX_MODELS]
    accuracy = [
        (model.label, 100 * model.interval.low, 100 * model.accuracy, 100 * model.interval.high) for model in models
    ]
    thinking = [
        (f"{model.label}, {kind}", values[1], values[2], values[3])
        for model in models
        for kind, values in (("right", model.thinking_right), ("wrong", model.thinking_wrong))
        if values
    ]
    calibration = {
        model.label: [(100 * each.confidence, 100 * each.accuracy) for each in model.calibration]
        for model in shown
        if model.calibration
    }
    return [
        (ranges(accuracy, title="solved, %", high=100.0), "Samples solved, with 95 % intervals."),
        (
            ranges(thinking, title="tokens of thinking"),
            "Tokens of thinking: the median, and the quarters below and above it, of right and of wrong samples.",
        ),
        (_by_k({model.label: model.pass_at_k for model in shown}, "pass@k, %"), "At least one of k samples is right."),
        (
            _by_k({model.label: model.majority_at_k for model in shown}, "maj@k, %"),
            "The answer that most of k samples give is right.",
        ),
        (
            lines(calibration, x_title="confidence, %", y_title="right, %")
            if any(len(points) > 1 for points in calibration.values())
            else "",
            "Answers by the confidence of their reading.",
        ),
    ]


def _by_k(values: Mapping[str, Mapping[int, float]], title: str) -> str:
    series = {label: [(float(k), 100 * share) for k, share in by_k.items()] for label, by_k in values.items()}
    return lines(series, x_title="k", y_title=title) if any(len(points) > 1 for points in series.values()) else ""


def _disputed(summary: Summary) -> str:
    rows = [row for model in summary.models for row in model.disputed]
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td><code>{_text(row.trace)}</code></td><td>{_text(str(row.problem))}</td>"
        f"<td><code>{_text(row.answer or '')}</code></td><td>{_text(row.reason)}</td>"
        f"<td>{'right' if row.math_verify else 'wrong'}</td></tr>\n"
        for row in rows
    )
    heads = "".join(f"<th>{name}</th>" for name in ("trace", "problem", "answer", "our verdict", "math-verify"))
    return f"<h2>Where math-verify judges otherwise</h2>\n<table><tr>{heads}</tr>\n{cells}</table>\n"


def _text(text: str) -> str:
    return escape(printable(text))
