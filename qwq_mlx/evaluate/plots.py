"""A plot of ranges as inline SVG text: a line for each name, from low to high, with a dot at its middle.

Colours and type come from the page's style sheet, as those of `quality.svg`; numbers are rounded before they are
written, so the same data give the same text.

Does not: choose what is plotted.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qwq_mlx.quality.report import printable
from qwq_mlx.quality.svg import tick_step

__all__ = ["ranges"]

_WIDTH, _LEFT, _RIGHT = 460, 150, 24
_ROW, _TOP, _BOTTOM = 26, 8, 38
_N_TICKS = 4
_MAX_NAME = 22


def ranges(rows: Sequence[tuple[str, float, float, float]], *, title: str, high: float | None = None) -> str:
    """rows: (name, low, middle, high), from 0 up. title: of the axis. high: its end; None is a round number.

    Returns "" where there are no rows.
    """
    if not rows:
        return ""
    step = high / _N_TICKS if high is not None else tick_step(max(row[3] for row in rows))
    end, height = step * _N_TICKS, _TOP + _ROW * len(rows) + _BOTTOM

    def place(value: float) -> float:
        return _LEFT + value / end * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in range(_N_TICKS + 1):
        x = place(step * tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{step * tick:,.4g}</text>')
    for index, (name, low, middle, top) in enumerate(rows):
        y = _TOP + _ROW * (index + 0.5)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(name))}</text>')
        parts.append(f'<line class="line s0" x1="{place(low):.1f}" y1="{y:.1f}" x2="{place(top):.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<circle class="dot s0" cx="{place(middle):.1f}" cy="{y:.1f}" r="4"><title>{escape(printable(name))}: '
            f"{middle:,.4g} ({low:,.4g} to {top:,.4g})</title></circle>"
        )
    middle_x = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle_x:.1f}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>')
    label = escape(f"{title} of each model")
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _MAX_NAME else f"…{shown[1 - _MAX_NAME :]}"
