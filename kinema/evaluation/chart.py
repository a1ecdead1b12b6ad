"""Curves of a run as SVG inside HTML: lines, round ticks, both axes, and the points that its tooltip reads."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal, NamedTuple

POINTS = 600  # the most points drawn per curve: about one per pixel


class Series(NamedTuple):
    """A curve: `values[i]` after `steps[i]` steps. Values that are not finite are gaps, and counted in the legend."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """Series on shared axes; `log` starts with a logarithmic one (the reader can switch if all values are positive).

    Long series are also drawn smoothed. Curves that follow each other in a report share a line of it if there is room.
    """

    title: str
    series: Sequence[Series]
    log: bool = False


def chart(section: Curves) -> str:
    """A chart whose lines stretch with the page while its texts keep their size: the SVG is a square of 1000."""
    lines = [_line(series) for series in section.series]
    values = [v for line in lines for v in line.raw if v is not None]
    if not values:
        return f'<section><h2>{escape(section.title)}</h2><p class="none">Nothing was logged.</p></section>'
    first = min(step for line in lines for step in line.steps)
    last = max(step for line in lines for step in line.steps)
    first = 0 if 0 < first < 0.1 * last else first
    width = (last - first) or 1
    axes = [_linear(values), *([_logarithmic(values)] if min(values) > 0 else [])]
    layers = "".join(_layer(axis, lines, first, width) for axis in axes)
    ticks = "".join(
        f'<span class="y {axis.kind}" style="top:{axis.y(m) / 10:.1f}%">{_number(m)}</span>'
        for axis in axes
        for m in axis.marks
    ) + "".join(
        f'<span class="x" style="left:{100 * (m - first) / width:.1f}%">{_number(m)}</span>'
        for m in round_marks(first, last, 5)
        if first <= m <= last
    )
    legend = "".join(
        f'<span><i style="--c:var(--c{i % 6})"></i>{escape(series.name)}{_gaps(series)}</span>'
        for i, series in enumerate(section.series)
    )
    switch = f'<label><input type="checkbox"{" checked" * section.log}> log</label>' if len(axes) > 1 else ""
    points = {"first": first, "last": first + width, "series": [line._asdict() for line in lines]}
    data = json.dumps(points, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<section class="chart"><header><h2>{escape(section.title)}</h2>{switch}</header>'
        f'<div class="legend">{legend}</div><div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(section.title)}">{layers}</svg>{ticks}'
        f'<div class="cursor" hidden></div><div class="tip" hidden></div></div><div class="axis">step</div>'
        f'<script type="application/json">{data}</script></section>'
    )


class _Axis(NamedTuple):
    """A vertical axis: its ends (warped), the values of its ticks, and the warp."""

    kind: Literal["lin", "log"]
    low: float
    high: float
    marks: list[float]
    warp: Callable[[float], float]

    def y(self, value: float) -> float:
        """Down from the top, of 1000."""
        return 1000 * (self.high - self.warp(value)) / (self.high - self.low)


class _Line(NamedTuple):
    """A series as it is drawn: None where it is not finite, `smooth` empty where nothing needs smoothing."""

    name: str
    steps: list[float]
    raw: list[float | None]
    smooth: list[float | None]


def _layer(axis: _Axis, lines: Sequence[_Line], first: float, width: float) -> str:
    """Everything that is drawn on one vertical axis."""
    paths = [f'<path class="grid" d="M0 {axis.y(m):.1f}H1000"/>' for m in axis.marks]
    for i, line in enumerate(lines):
        x = [1000 * (step - first) / width for step in line.steps]
        color = f'style="--c:var(--c{i % 6})"'
        faint = ' class="raw"' if line.smooth else ""
        paths.append(f'<path{faint} {color} d="{_path(x, line.raw, axis)}"/>')
        if line.smooth:
            paths.append(f'<path {color} d="{_path(x, line.smooth, axis)}"/>')
    return f'<g class="{axis.kind}">{"".join(paths)}</g>'


def _gaps(series: Series) -> str:
    gaps = sum(not math.isfinite(v) for v in series.values)
    return f' <em class="bad">{gaps} not finite</em>' if gaps else ""


def _line(series: Series) -> _Line:
    """At most POINTS points of a series: the extremes of each stretch, so that spikes stay."""
    values = [float(f"{v:.6g}") if math.isfinite(v) else None for v in series.values]
    smooth = _smoothed(values)
    keep: Sequence[int] = range(len(values))
    if len(values) > POINTS:
        chosen = {0, len(values) - 1}
        for i in range(POINTS // 2):
            part = range(i * len(values) // (POINTS // 2), (i + 1) * len(values) // (POINTS // 2))
            finite = [(v, j) for j in part if (v := values[j]) is not None]
            chosen |= {min(finite)[1], max(finite)[1]} if finite else {part[0]}
        keep = sorted(chosen)
    steps = [series.steps[i] for i in keep]
    return _Line(series.name, steps, [values[i] for i in keep], [smooth[i] for i in keep] if smooth else [])


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """The exponential mean over a fortieth of the curve, to both sides so that nothing lags; empty if it is calm."""
    finite = [v for v in values if v is not None]
    if len(values) < 30 or len(finite) < 2:
        return []
    way = sum(abs(b - a) for a, b in pairwise(finite))
    if way < 4 * (max(finite) - min(finite)):
        return []
    decay = 1 - 1 / max(2, len(values) / 40)
    forth, back = _sums(values, decay), _sums(values[::-1], decay)[::-1]
    return [
        None if v is None else float(f"{(a + b) / (m + n):.6g}")
        for v, (a, m), (b, n) in zip(values, forth, back, strict=True)
    ]


def _sums(values: Sequence[float | None], decay: float) -> list[tuple[float, float]]:
    """What came so far, summed with weights that decay, and the sum of the weights."""
    total = weight = 0.0
    sums = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def _path(x: Sequence[float], values: Sequence[float | None], axis: _Axis) -> str:
    parts, pen = [], "M"
    for at, value in zip(x, values, strict=True):
        if value is None:
            pen = "M"
        else:
            # A line of no length makes a lone point a dot, by its round ends.
            parts.append(f"{pen}{at:.1f} {axis.y(value):.1f}{'h0' if pen == 'M' else ''}")
            pen = "L"
    return "".join(parts)


def _linear(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if 0 < low < 0.4 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    marks = round_marks(low, high, 5)
    return _Axis("lin", min(low, marks[0]), max(high, marks[-1]), marks, float)


def _logarithmic(values: Sequence[float]) -> _Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = min(max(0.03 * (high - low), 0.02), 0.5)
    low, high = low - margin, high + margin
    decades = range(math.floor(low), math.floor(high) + 1)
    digits = (1,) if high - low > 3 else (1, 2, 5)
    marks = [d * 10.0**e for e in decades[:: max(1, len(decades) // 6)] for d in digits]
    if sum(low <= math.log10(m) <= high for m in marks) < 2:
        marks = [m for m in round_marks(10**low, 10**high, 5) if m > 0]
    return _Axis("log", low, high, [m for m in marks if low <= math.log10(m) <= high], math.log10)


def round_marks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    raw = (high - low) / about or 1
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _number(x: float) -> str:
    if x and (abs(x) < 1e-3 or abs(x) >= 1e6):
        mantissa, exponent = f"{x:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
