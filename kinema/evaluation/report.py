"""A run as one HTML file to look at and to send: videos side by side, scores with intervals, curves, how to repeat it.

The file needs nothing else: videos are inside, charts are SVG drawn here, its own policy forbids it to load anything.
A report is a value (`Report` and its sections); `render` turns it into text. All texts given to it are escaped.
"""

import base64
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple

from kinema.errors import UserError

POINTS = 600  # the most points drawn per curve: about one per pixel


@dataclass(frozen=True)
class Cell:
    """One video: its label ("before"), the mp4 or where it lies (None: missing), and verdicts, None where unknown."""

    label: str
    video: bytes | str | Path | None
    chips: Mapping[str, bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoRow:
    """Videos to compare, of one caption."""

    caption: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Videos:
    """Rows of videos that play together. `width` is the least width of a video in CSS pixels."""

    title: str
    rows: Sequence[VideoRow]
    width: int = 132


class Score(NamedTuple):
    """A measured value, the ends of its 95 % interval, and on how many samples. An unknown end is None."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class ScoreRow:
    """One measurement: a score per column of the table (None: not measured).

    `spec` is a format specification: ".1%" shows 0.934 as 93.4%. `better` says which direction is good, if one is.
    """

    name: str
    scores: Sequence[Score | None]
    spec: str = ".3g"
    better: Literal["higher", "lower", ""] = "higher"


@dataclass(frozen=True)
class ScoreTable:
    """One row per measurement. `delta` names two columns to subtract; the change is coloured if their intervals part.

    Raises:
        ValueError: if a row has not one score per column, or if `delta` names a column that there is not.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[ScoreRow]
    delta: tuple[str, str] | None = None
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row.scores) != len(self.columns):
                raise ValueError(f"{row.name!r} has {len(row.scores)} scores for {len(self.columns)} columns")
        for name in self.delta or ():
            if name not in self.columns:
                raise ValueError(f"delta names {name!r}, which is not among the columns {list(self.columns)}")


class Series(NamedTuple):
    """A curve: one value per step. Values that are not finite are gaps, and counted in the legend."""

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


@dataclass(frozen=True)
class Facts:
    """Names and values: time, memory, versions."""

    title: str
    pairs: Mapping[str, object]


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines."""

    title: str
    text: str


@dataclass(frozen=True)
class Code:
    """Text to copy: a command, a configuration. Folded away unless `open`."""

    title: str
    text: str
    open: bool = False


@dataclass(frozen=True)
class Card:
    """A headline number at the top of the page."""

    name: str
    value: str
    note: str = ""


Section = Videos | ScoreTable | Curves | Facts | Text | Code


@dataclass(frozen=True)
class Report:
    title: str
    summary: str
    sections: Sequence[Section]
    cards: Sequence[Card] = ()


def write(report: Report, path: str | Path) -> None:
    """Writes the report to `path`; it appears whole or not at all."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(render(report), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """`metrics.jsonl` as `{name: (steps, values)}`, without a last line that was being written when a run was killed.

    Raises:
        UserError: if there is no such file, or if another line is not a metrics line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There are no metrics at {path}: nothing was logged, or this is not the folder of a run.")
    curves: dict[str, tuple[list[int], list[float]]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"Line {number} of {path} is not a line of metrics.") from error
        for name, value in row.items():
            if isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return curves


def render(report: Report) -> str:
    """The report as one HTML document."""
    body, charts = [], []
    for section in [*report.sections, None]:
        if isinstance(section, Curves):
            charts.append(_curves(section))
            continue
        if charts:
            body.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        if section is not None:
            body.append(_section(section))
    cards = "".join(
        f'<div class="card"><span>{escape(c.name)}</span><b>{escape(c.value)}</b><small>{escape(c.note)}</small></div>'
        for c in report.cards
    )
    return PAGE.substitute(
        title=escape(report.title),
        summary=escape(report.summary),
        cards=f'<div class="cards">{cards}</div>' if cards else "",
        body="\n".join(body),
        style=STYLE,
        script=SCRIPT,
    )


def _section(section: Videos | ScoreTable | Facts | Text | Code) -> str:
    title = escape(section.title)
    match section:
        case Videos():
            return f'<section class="videos"><header><h2>{title}</h2>{PLAYER}</header>{_videos(section)}</section>'
        case ScoreTable():
            return f"<section><h2>{title}</h2>{_scores(section)}</section>"
        case Facts(pairs=pairs):
            items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in pairs.items())
            return f"<section><h2>{title}</h2><dl>{items}</dl></section>"
        case Text(text=text):
            paragraphs = "".join(f"<p>{escape(p)}</p>" for p in text.split("\n\n") if p.strip())
            return f'<section class="text"><h2>{title}</h2>{paragraphs}</section>'
        case Code(text=text):
            unfolded = " open" if section.open else ""
            code = f'<div class="code"><button class="copy">Copy</button><pre><code>{escape(text)}</code></pre></div>'
            return f"<section><details{unfolded}><summary><h2>{title}</h2></summary>{code}</details></section>"


def _videos(section: Videos) -> str:
    rows = []
    for row in section.rows:
        cells = "".join(_cell(cell, row.caption) for cell in row.cells)
        rows.append(f'<figure><div class="cells">{cells}</div><figcaption>{escape(row.caption)}</figcaption></figure>')
    most = max((len(row.cells) for row in section.rows), default=1)
    return f'<div class="rows" style="--cells:{most};--width:{section.width}px">{"".join(rows)}</div>'


def _cell(cell: Cell, caption: str) -> str:
    marks = {True: ("good", "✓"), False: ("bad", "✗"), None: ("", "?")}
    chips = "".join(
        f'<span class="chip {marks[verdict][0]}">{escape(name)} {marks[verdict][1]}</span>'
        for name, verdict in cell.chips.items()
    )
    if cell.video is None:
        video = '<div class="missing">no video</div>'
    else:
        data = cell.video if isinstance(cell.video, bytes) else Path(cell.video).read_bytes()
        video = (
            f'<video autoplay muted loop playsinline aria-label="{escape(f"{cell.label}: {caption}")}" '
            f'src="data:video/mp4;base64,{base64.b64encode(data).decode()}"></video>'
        )
    return f'<div class="cell"><span class="label">{escape(cell.label)}</span>{video}<div>{chips}</div></div>'


def _scores(table: ScoreTable) -> str:
    heads = "".join(f'<th><i style="--c:var(--c{i % 6})"></i>{escape(c)}</th>' for i, c in enumerate(table.columns))
    if table.delta:
        heads += "<th>change</th>"
    rows = "".join(
        f"<tr><th>{escape(row.name)}{ARROWS[row.better]}{_samples(row)}</th>"
        f"{''.join(_score(score, row.spec) for score in row.scores)}"
        f"{_delta(table, row, table.delta) if table.delta else ''}<td>{_intervals(table, row)}</td></tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        '<div class="scroll"><table><thead><tr><th></th>'
        f"{heads}<th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _samples(row: ScoreRow) -> str:
    counts = sorted({score.n for score in row.scores if score and score.n})
    return f"<small>n = {' / '.join(f'{n:,}' for n in counts)}</small>" if counts else ""


def _score(score: Score | None, spec: str) -> str:
    if score is None:
        return '<td class="none">&ndash;</td>'
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f"<small>{score.low:{spec}} &ndash; {score.high:{spec}}</small>"
    return f"<td><b>{score.value:{spec}}</b>{interval}</td>"


def _delta(table: ScoreTable, row: ScoreRow, names: tuple[str, str]) -> str:
    before, after = (row.scores[list(table.columns).index(name)] for name in names)
    if before is None or after is None:
        return '<td class="none">&ndash;</td>'
    change = after.value - before.value
    (before_low, before_high), (after_low, after_high) = _ends(before), _ends(after)
    if None in (before.low, before.high, after.low, after.high):
        hint, tone = "without intervals one cannot tell whether this is chance", ""
    elif before_high >= after_low and after_high >= before_low:
        hint, tone = "the intervals overlap: this may be chance", ""
    else:
        hint, tone = "the intervals do not overlap", "good" if (change > 0) == (row.better == "higher") else "bad"
    tone = tone if row.better else ""
    shown = f"{change:+{row.spec}}".replace("%", " points")
    return f'<td title="{hint}"><b class="{tone or "none"}">{shown}</b></td>'


def _ends(score: Score) -> tuple[float, float]:
    return (
        score.value if score.low is None else score.low,
        score.value if score.high is None else score.high,
    )


def _intervals(table: ScoreTable, row: ScoreRow) -> str:
    """All scores of a row on one scale: a bar from low to high, a dot at the value."""
    known = [(i, score, *_ends(score)) for i, score in enumerate(row.scores) if score and math.isfinite(score.value)]
    least, most = min((k[2] for k in known), default=0), max((k[3] for k in known), default=1)
    if row.spec.endswith("%"):
        least, most = min(0, least), max(1, most)
    elif least >= 0:
        least = 0
    span = (most - least) or 1
    marks = []
    for i, score, low, high in known:
        y, x, left, right = 9 + 13 * i, *(6 + 208 * (v - least) / span for v in (score.value, low, high))
        hint = f"{table.columns[i]}: {score.value:{row.spec}} ({low:{row.spec}} to {high:{row.spec}})"
        marks.append(
            f'<g style="--c:var(--c{i % 6})"><title>{escape(hint)}</title><path class="track" d="M6 {y}H214"/>'
            f'<path d="M{left:.1f} {y}H{right:.1f}"/><circle cx="{x:.1f}" cy="{y}" r="4"/></g>'
        )
    height = 13 * len(row.scores) + 5
    return f'<svg class="bars" viewBox="0 0 220 {height}" width="220" height="{height}">{"".join(marks)}</svg>'


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


def _curves(section: Curves) -> str:
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
        for m in _round_marks(first, last, 5)
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
    marks = _round_marks(low, high, 5)
    return _Axis("lin", min(low, marks[0]), max(high, marks[-1]), marks, float)


def _logarithmic(values: Sequence[float]) -> _Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = min(max(0.03 * (high - low), 0.02), 0.5)
    low, high = low - margin, high + margin
    decades = range(math.floor(low), math.floor(high) + 1)
    digits = (1,) if high - low > 3 else (1, 2, 5)
    marks = [d * 10.0**e for e in decades[:: max(1, len(decades) // 6)] for d in digits]
    if sum(low <= math.log10(m) <= high for m in marks) < 2:
        marks = [m for m in _round_marks(10**low, 10**high, 5) if m > 0]
    return _Axis("log", low, high, [m for m in marks if low <= math.log10(m) <= high], math.log10)


def _round_marks(low: float, high: float, about: int) -> list[float]:
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


ARROWS = {
    "higher": ' <span class="none" title="higher is better">↑</span>',
    "lower": ' <span class="none" title="lower is better">↓</span>',
    "": "",
}

PLAYER = (
    '<div class="player"><button class="play">Pause all</button>'
    '<input class="scrub" type="range" min="0" max="1000" value="0" aria-label="position in all videos"></div>'
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; media-src data:; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header class="top"><h1>$title</h1><p>$summary</p></header>
$cards
$body
<footer>made by kinema</footer>
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --paper: #fff; --ink: #1d1d21; --soft: #6a6a73; --line: #e4e3df; --well: #f1f0ed;
  --accent: #2f6fde;
  --good: #14753d; --good-paper: #e0f3e6; --bad: #b3261e; --bad-paper: #fbe7e5;
  --c0: #8a8a94; --c1: #2f6fde; --c2: #c96a12; --c3: #11866f; --c4: #b0398a; --c5: #7352cf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131316; --paper: #1c1c20; --ink: #ececf0; --soft: #a0a0ab; --line: #323238; --well: #26262b;
    --accent: #6ea2ff;
    --good: #6fd492; --good-paper: #173524; --bad: #ff938a; --bad-paper: #451d1b;
    --c0: #9a9aa6; --c1: #6ea2ff; --c2: #f0a04b; --c3: #45c8ab; --c4: #ec86c6; --c5: #b19cff;
  }
}
.chart { --c0: #2f6fde; --c1: #c96a12; --c2: #11866f; --c3: #b0398a; --c4: #7352cf; --c5: #8a8a94; }
@media (prefers-color-scheme: dark) {
  .chart { --c0: #6ea2ff; --c1: #f0a04b; --c2: #45c8ab; --c3: #ec86c6; --c4: #b19cff; --c5: #9a9aa6; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 24px; display: grid; gap: 20px; }
main > *, .charts > * { min-width: 0; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; font-weight: 650; letter-spacing: -0.005em; }
.top p { margin: 8px 0 4px; color: var(--soft); font-size: 17px; max-width: 75ch; }
section, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 18px 20px; }
section > h2 { margin-bottom: 12px; }
section > header {
  display: flex; justify-content: space-between; align-items: center; flex-wrap: wrap; gap: 8px 16px;
  margin-bottom: 12px;
}
small, .label, .legend, .axis, .note, dt, footer { color: var(--soft); font-size: 12.5px; }
.none { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.text p { margin: 0 0 8px; max-width: 80ch; }

.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(45%, 190px), 1fr)); }
.card { padding: 14px 18px; display: grid; }
.card span { color: var(--soft); font-size: 13px; }
.card b { font-size: 25px; line-height: 1.3; letter-spacing: -0.02em; font-weight: 650; }

.rows {
  display: grid; gap: 22px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--cells) * (var(--width) + 8px))), 1fr));
}
figure { margin: 0; }
.cells { display: grid; gap: 8px; grid-template-columns: repeat(var(--cells), minmax(0, 1fr)); }
figcaption { margin-top: 6px; line-height: 1.4; overflow-wrap: anywhere; }
.label { display: block; margin-bottom: 3px; }
video, .missing { display: block; width: 100%; border-radius: 6px; background: var(--well); }
video { image-rendering: pixelated; }
.missing { aspect-ratio: 1; display: grid; place-items: center; color: var(--soft); }
.chip {
  display: inline-block; margin: 5px 4px 0 0; padding: 0 7px; border-radius: 99px; background: var(--well);
  color: var(--soft); font-size: 12px; line-height: 19px; white-space: nowrap;
}
.chip.good { background: var(--good-paper); color: var(--good); }
.chip.bad { background: var(--bad-paper); color: var(--bad); }
.player { display: flex; gap: 12px; align-items: center; }
button {
  font: inherit; font-size: 13px; color: var(--ink); background: var(--well); border: 1px solid var(--line);
  border-radius: 7px; padding: 3px 12px; cursor: pointer;
}
button:hover { border-color: var(--soft); }
input { accent-color: var(--accent); vertical-align: middle; }
.play { min-width: 84px; } .scrub { width: 150px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 9px 22px 9px 0; text-align: left; vertical-align: top; white-space: nowrap; }
tr > :last-child { padding-right: 0; }
thead th { font-weight: 500; color: var(--soft); font-size: 13px; padding-top: 0; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
td b { font-weight: 650; }
td small, th small { display: block; font-weight: 400; }
th i, .legend i {
  display: inline-block; width: 9px; height: 9px; border-radius: 9px; background: var(--c); margin-right: 6px;
}
.bars { display: block; margin-top: 2px; }
.bars path { stroke: var(--c); stroke-width: 3; stroke-linecap: round; }
.bars .track { stroke: var(--well); }
.bars circle { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
.note { margin: 10px 0 0; }

.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.charts > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.chart label { color: var(--soft); font-size: 13px; cursor: pointer; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 12px; }
.plot { position: relative; height: 230px; margin: 6px 8px 24px 52px; touch-action: pan-y; }
.plot svg { width: 100%; height: 100%; overflow: visible; display: block; }
.plot path {
  fill: none; stroke: var(--c); stroke-width: 2; stroke-linecap: round; stroke-linejoin: round;
  vector-effect: non-scaling-stroke;
}
.plot .raw { stroke-width: 1; opacity: 0.32; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .x, .plot .y { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .x { top: calc(100% + 9px); transform: translateX(-50%); }
.plot .y { right: calc(100% + 9px); transform: translateY(-50%); }
.chart:has(input:checked) .lin, .chart:not(:has(input:checked)) .log { display: none; }
.axis { text-align: center; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip {
  position: absolute; top: 4px; z-index: 1; pointer-events: none; padding: 5px 9px; white-space: pre;
  background: var(--paper); border: 1px solid var(--line); border-radius: 7px; font-size: 12.5px; line-height: 1.45;
  box-shadow: 0 3px 12px rgb(0 0 0 / 0.14);
}

dl {
  margin: 0; display: grid; gap: 10px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 210px), 1fr));
}
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; } summary h2 { display: inline; }
.code { position: relative; margin-top: 12px; }
pre {
  margin: 0; padding: 14px 16px; background: var(--well); border-radius: 8px; overflow: auto; max-height: 480px;
  white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 84px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 2;
}
.copy { position: absolute; top: 8px; right: 8px; }
footer { text-align: center; padding: 8px; }
@media (max-width: 600px) {
  main { padding: 24px 12px; gap: 14px; } section { padding: 14px; } h1 { font-size: 25px; }
  .player { width: 100%; } .scrub { flex: 1; }
}
"""

SCRIPT = """
for (const section of document.querySelectorAll(".videos")) {
  const videos = [...section.querySelectorAll("video")];
  const button = section.querySelector(".play"), scrub = section.querySelector(".scrub");
  const play = on => {
    button.textContent = on ? "Pause all" : "Play all";
    videos.forEach(video => on ? video.play().catch(() => {}) : video.pause());
  };
  button.onclick = () => play(button.textContent === "Play all");
  scrub.oninput = () => {
    play(false);
    videos.forEach(video => { video.currentTime = Math.min(0.999, scrub.value / 1000) * (video.duration || 0); });
  };
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) play(false);
}

for (const chart of document.querySelectorAll(".chart")) {
  const { first, last, series } = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
  const show = value => value === null ? "not finite" : Number(value.toPrecision(4)).toString();
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect();
    const step = first + (last - first) * (event.clientX - box.left) / box.width;
    const far = s => Math.abs(s - step);
    const nearest = steps => steps.reduce((best, s, i) => far(s) < far(steps[best]) ? i : best, 0);
    const lines = series.filter(s => s.steps.length).map(s => {
      const i = nearest(s.steps), smooth = s.smooth.length ? "  (smooth " + show(s.smooth[i]) + ")" : "";
      return { at: s.steps[i], text: s.name + "  " + show(s.raw[i]) + smooth };
    });
    const at = lines.reduce((a, b) => far(b.at) < far(a.at) ? b : a).at;
    const x = (at - first) / (last - first) * box.width;
    tip.textContent = ["step " + at.toLocaleString("en"), ...lines.map(line => line.text)].join("\\n");
    cursor.hidden = tip.hidden = false;
    cursor.style.left = x + "px";
    tip.style.left = (x > box.width / 2 ? x - tip.offsetWidth - 10 : x + 10) + "px";
  };
  plot.onpointerleave = () => { cursor.hidden = tip.hidden = true; };
}

for (const button of document.querySelectorAll(".copy")) {
  button.onclick = async () => {
    const text = button.parentElement.querySelector("code");
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(text); }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
}
"""
