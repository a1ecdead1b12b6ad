"""How videos longer than a clip change with their length, as one figure: a score, one curve for each model.

python -m kinema.evaluation.drift NAME=FOLDER... --score "all three" --out drift.svg
python -m kinema.evaluation.drift NAME=FOLDER... --score persistence --out memory.svg

A folder is that of `kinema evaluate MODEL --frames N`, whose windows lie along a video, or of `kinema probe`, whose
stories have several lengths. Bands are 95 % intervals.
"""

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from kinema.commands import execute, parser_of
from kinema.errors import UserError
from kinema.evaluation.chart import round_marks
from kinema.evaluation.evaluate import read_json

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 360, 56, 46, 16, 180  # of the figure and around its axes
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d")
INK, GREY, GRID = "#374151", "#6b7280", "#e5e7eb"  # of texts, of what stands behind, of the lines of an axis


class Curve(NamedTuple):
    """Values and intervals at `x`, which says `across`."""

    name: str
    across: str
    x: Sequence[float]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curve(name: str, folder: Path, score: str) -> Curve:
    """A score over the windows of an evaluation, at their middles, or over the lengths of the stories of a probe.

    Raises UserError if there are fewer than two, or there is no such score.
    """
    if lengths := _probed(folder):
        across, read = "scenes of the story", [read_json(path) for path in lengths]
        places = sorted((float(length["scenes"]), length["scores"]) for length in read)
        if len(places) < 2:
            raise UserError(f"{folder} has stories of one length; probe with --scenes of two or more")
    else:
        if not (folder / "scores.json").exists():
            raise UserError(f"{folder} is no folder of kinema evaluate, nor of kinema probe; give one of these")
        across, windows = "frame of the video", read_json(folder / "scores.json").get("windows", [])
        if len(windows) < 2:
            raise UserError(f"{folder} has no windows to compare; evaluate with --frames of at least two clips")
        half = (windows[1]["first"] - windows[0]["first"]) / 2
        places = [(window["first"] + half, window["scores"]) for window in windows]
    if score not in places[0][1]:
        raise UserError(f"{folder} has no score {score!r}; choose among {', '.join(places[0][1])}")
    found = [(x, scores[score]) for x, scores in places if scores[score]["value"] is not None]
    if not found:
        raise UserError(f"{score!r} could not be read anywhere in {folder}; choose another score")
    parts = ([s[part] for _, s in found] for part in ("value", "low", "high"))
    return Curve(name, across, [x for x, _ in found], *parts)


def _probed(folder: Path) -> list[Path]:
    """What `kinema probe` wrote below its folder, a file for each length of story."""
    return sorted(folder.glob("*/memory.json"))


def figure(curves: Sequence[Curve], up: str, mark: float | None = None) -> str:
    """An SVG of the curves; `mark` is an x at which a dashed line stands.

    Raises UserError for curves over different things.
    """
    across = curves[0].across
    if apart := [c.name for c in curves if c.across != across]:
        raise UserError(f"{curves[0].name} is a curve over the {across}, {apart[0]} is not; draw them apart")
    last = max([x for c in curves for x in c.x] + ([] if mark is None else [mark]))
    highest = max(h for c in curves for h in c.high)
    top = 1.0 if highest <= 1 else highest  # rates share their axis
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> str:
        return f"{LEFT + wide * x / last:.1f},{TOP + tall * (1 - y / top):.1f}"

    parts = []
    for i in range(6):
        y, said = i / 5 * top, f"{i / 5 * top:.0%}" if top == 1 else f"{i / 5 * top:.2g}"
        height = at(0, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height}" text-anchor="end" dominant-baseline="middle">{said}</text>')
    for x in round_marks(0, last, 5):
        if x <= last:
            place = at(x, 0).split(",")[0]
            parts.append(f'<text x="{place}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    if mark is not None:
        x = at(mark, 0).split(",")[0]
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{GREY}" stroke-dasharray="4 4"/>'
        )
    for i, c in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        band = [at(*point) for point in zip(c.x, c.high, strict=True)]
        band += [at(*point) for point in zip(reversed(c.x), reversed(c.low), strict=True)]
        line = " ".join(at(*point) for point in zip(c.x, c.value, strict=True))
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.13"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        dots = [at(*point).split(",") for point in zip(c.x, c.value, strict=True)]
        parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in dots]
        y = TOP + 14 + 20 * i
        parts.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{y - 6}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{y}">{escape(c.name)}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>')
    middle = TOP + tall / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(up)}</text>'
    )
    return svg(WIDTH, HEIGHT, parts)


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """The document of a figure of so many pixels, on white."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">\n<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def main(words: list[str]) -> None:
    p = parser_of("kinema.evaluation.drift", __doc__)
    p.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER")
    p.add_argument("--score", help="(all three; of a probe: persistence)")
    p.add_argument("--out", type=Path, default=Path("drift.svg"), help="(%(default)s)")
    p.add_argument("--mark", type=float, help="where a dashed line stands, as at the length trained on")
    args = p.parse_args(words)
    pairs = [each.rpartition("=") for each in args.evaluations]
    score = args.score or ("persistence" if _probed(Path(pairs[0][2])) else "all three")
    curves = [curve(name or Path(folder).name, Path(folder), score) for name, _, folder in pairs]
    args.out.write_text(figure(curves, score, args.mark), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    sys.exit(execute(main))
