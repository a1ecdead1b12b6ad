"""A run as one HTML file to look at and to send: videos side by side, scores with intervals, curves, how to repeat it.

The file needs nothing else: videos are inside, charts are SVG drawn here, its own policy forbids it to load anything.
A report is a value (`Report` and its sections); `render` turns it into text. All texts given to it are escaped.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

from kinema.errors import UserError
from kinema.evaluation.chart import Curves, chart
from kinema.evaluation.chart import Series as Series
from kinema.evaluation.page import PAGE, SCRIPT, STYLE
from kinema.files import write_text


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
    write_text(Path(path), render(report))


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
            charts.append(chart(section))
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


ARROWS = {
    "higher": ' <span class="none" title="higher is better">↑</span>',
    "lower": ' <span class="none" title="lower is better">↓</span>',
    "": "",
}

PLAYER = (
    '<div class="player"><button class="play">Pause all</button>'
    '<input class="scrub" type="range" min="0" max="1000" value="0" aria-label="position in all videos"></div>'
)
