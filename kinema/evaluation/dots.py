"""Scores of several models as dots with their 95 % intervals: a row for each model, a panel for each score.

A panel's axis holds what is near the rest. What lies far out is an arrow at its edge with the number, so that one
student that broke does not flatten all others.
"""

import statistics
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from kinema.evaluation.chart import round_marks
from kinema.evaluation.drift import COLOURS, GREY, GRID, INK, svg

LEFT, PANEL, GAP, ROW, TOP, BOTTOM = 174, 210, 44, 19, 34, 60  # pixels: of names, panels, between them, rows, around
FAR = 3.0  # quartile distances from the quartiles at which a value is far out


class Dot(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


class Panel(NamedTuple):
    """One score of all rows, None of those that have none, and of what they are held to: a dashed line."""

    title: str
    dots: Sequence[Dot | None]
    target: float | None = None
    rate: bool = False  # shown in per cent


def figure(names: Sequence[str], panels: Sequence[Panel], below: str) -> str:
    """An SVG: the first row is the reference, whose interval is shaded in all rows. `below` is the line at the foot."""
    end = TOP + ROW * len(names)
    parts = [
        f'<text x="{LEFT - 12}" y="{_middle(i)}" text-anchor="end" dominant-baseline="middle" '
        f'font-weight="{"normal" if i else "bold"}">{escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, LEFT + i * (PANEL + GAP), end)
    width = LEFT + len(panels) * (PANEL + GAP) - GAP // 2
    parts.append(f'<text x="{width / 2}" y="{end + 46}" text-anchor="middle" fill="{GREY}">{escape(below)}</text>')
    return svg(width, end + BOTTOM, parts)


def bounds(dots: Sequence[Dot], target: float | None = None) -> tuple[float, float]:
    """The ends of what an axis holds: the intervals of the dots that are not far out, and the target."""
    values = [dot.value for dot in dots]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    far = FAR * (third - first)
    near = [dot for dot in dots if first - far <= dot.value <= third + far]
    ends = [*(dot.low for dot in near), *(dot.high for dot in near), *([] if target is None else [target])]
    return min(ends), max(ends)


def _panel(panel: Panel, left: float, end: float) -> list[str]:
    parts = [f'<text x="{left + PANEL / 2}" y="18" text-anchor="middle">{escape(panel.title)}</text>']
    known = [dot for dot in panel.dots if dot is not None]
    if not known:
        return [*parts, f'<text x="{left + PANEL / 2}" y="{_middle(0)}" text-anchor="middle">not measured</text>']
    low, high = bounds(known, panel.target)
    marks = round_marks(low, high if high > low else low + 1, 4)
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        return round(left + PANEL * (min(max(value, low), high) - low) / (high - low), 1)

    if panel.dots[0] is not None and low <= panel.dots[0].value <= high:
        begin, until = at(panel.dots[0].low), at(panel.dots[0].high)
        parts.append(
            f'<rect x="{begin}" y="{TOP}" width="{until - begin:.1f}" height="{end - TOP}" fill="{COLOURS[0]}" '
            f'opacity="0.1"/>'
        )
    for mark in marks:
        x, said = at(mark), f"{mark:.0%}" if panel.rate else f"{mark:g}"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{end}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x}" y="{end + 16}" text-anchor="middle">{said}</text>')
    if panel.target is not None:
        x = at(panel.target)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{end}" stroke="{GREY}" stroke-dasharray="4 4"/>')
    for i, dot in enumerate(panel.dots):
        if dot is None:
            continue
        y, colour = _middle(i), COLOURS[0] if i == 0 else INK
        if low <= dot.value <= high:
            parts.append(
                f'<line x1="{at(dot.low)}" x2="{at(dot.high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.5"/>'
            )
            parts.append(f'<circle cx="{at(dot.value)}" cy="{y}" r="3.5" fill="{colour}"/>')
        else:
            parts += _arrow(dot.value, left if dot.value < low else left + PANEL, y, dot.value < low, panel.rate)
    return parts


def _arrow(value: float, x: float, y: float, down: bool, rate: bool) -> list[str]:
    """At the edge `x` of a panel, to the left where `down`; the number stands inside of the panel."""
    inwards, anchor = (1, "start") if down else (-1, "end")
    said = f"{value:.1%}" if rate else f"{value:.2f}"
    return [
        f'<polygon points="{x},{y} {x + 8 * inwards},{y - 4} {x + 8 * inwards},{y + 4}" fill="{COLOURS[1]}"/>',
        f'<text x="{x + 12 * inwards}" y="{y}" text-anchor="{anchor}" dominant-baseline="middle" '
        f'fill="{COLOURS[1]}">{said}</text>',
    ]


def _middle(row: int) -> float:
    return TOP + ROW * (row + 0.5)
