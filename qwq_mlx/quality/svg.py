"""Two kinds of plots as inline SVG text: lines over layers, and bars over decades.

Colours come from the page's style sheet (classes s0, s1 ...), so that a plot follows a dark page. Every number is
rounded before it is written: the same data give the same text.

Does not: choose what is plotted, or need a library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "lines", "tick_step"]

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 38
_N_TICKS = 4


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, x_title: str, y_title: str) -> str:
    """One line a name through its (x, y) points; y from 0, in percent where y_title says so. At least one point."""
    points = [point for each in series.values() for point in each]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    step = tick_step(max(y for _, y in points))
    y_high = step * _N_TICKS
    span = (x_high - x_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / span * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / y_high * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_y_axis([step * tick for tick in range(_N_TICKS + 1)], y_high, y_title)]
    stride = max(1, math.ceil(span / 8))
    for x in range(math.ceil(x_low), math.floor(x_high) + 1, stride):
        parts.append(_text(place(x, 0)[0], _HEIGHT - _BOTTOM + 16, f"{x}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_title, "middle"))
    for index, each in enumerate(series.values()):
        at = [place(x, y) for x, y in each]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
        if len(at) <= 80:
            parts += [f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in at]
    return _svg(parts, f"{y_title} by {x_title}") + (_legend(series) if len(series) > 1 else "")


def bars(counts: Sequence[int], labels: Sequence[str], *, x_title: str, y_title: str) -> str:
    """A bar a count. labels: one under each bar; an empty one is left out."""
    step = max(1.0, tick_step(max(counts)))
    y_high = step * _N_TICKS
    width = (_WIDTH - _LEFT - _RIGHT) / len(counts)
    parts = [_y_axis([step * tick for tick in range(_N_TICKS + 1)], y_high, y_title)]
    for index, (count, label) in enumerate(zip(counts, labels, strict=True)):
        height = count / y_high * (_HEIGHT - _TOP - _BOTTOM)
        x = _LEFT + index * width
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}"><title>{count:,}</title></rect>'
        )
        parts.append(_text(x + width / 2, _HEIGHT - _BOTTOM + 16, label, "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_title, "middle"))
    return _svg(parts, f"{y_title} by {x_title}")


def tick_step(largest: float) -> float:
    """A round distance of ticks, four of which hold the largest value."""
    if largest <= 0:
        return 0.25
    rough = largest / _N_TICKS
    scale = float(10 ** math.floor(math.log10(rough)))
    return next(scale * each for each in (1, 2, 2.5, 5, 10) if scale * each >= rough * (1 - 1e-9))


def _y_axis(ticks: Sequence[float], y_high: float, title: str) -> str:
    parts = []
    for tick in ticks:
        y = _HEIGHT - _BOTTOM - tick / y_high * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:.4g}", "end"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(title)}</text>'
    )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _legend(names: Mapping[str, object]) -> str:
    items = "".join(
        f'<span><svg width="18" height="8"><line class="line s{index}" x1="0" y1="4" x2="18" y2="4"/></svg>'
        f"{escape(name)}</span>"
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
