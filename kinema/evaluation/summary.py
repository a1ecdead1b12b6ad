"""The report of a run's or an evaluation's folder, made of what lies there."""

from pathlib import Path
from typing import Literal

from kinema.errors import UserError
from kinema.evaluation import report
from kinema.evaluation.evaluate import read_json
from kinema.training.guard import read_rows, ring
from kinema.training.metrics import machine

RATES = ("shape", "colour", "motion", "all three", "size", "background", "count", "occlusion", "everything")
SHOWN = 12  # videos of an evaluation
CURVES = ("student/kl", "student/entropy", "loss/critic", "grad_norm/student")  # of the runs that are compared
MEASURED: dict[str, Literal["lower", "higher"]] = {"Fréchet distance": "lower", "diversity": "higher"}  # is better


def from_folder(folder: Path) -> Path:
    """Writes `folder/report.html` and returns it. UserError if the folder is no run's, evaluation's or comparison's."""
    if (folder / "run.yaml").exists():
        made = _of_run(folder)
    elif (folder / "comparison.json").exists():
        made = _of_comparison(folder)
    elif (folder / "scores.json").exists():
        made = _of_evaluation(folder)
    else:
        raise UserError(
            f"{folder} has neither a run.yaml nor a scores.json; "
            "give the folder of a run, or of an evaluation that finished"
        )
    report.write(made, folder / "report.html")
    return folder / "report.html"


def _of_run(folder: Path) -> report.Report:
    curves = report.read_metrics(folder / "metrics.jsonl")
    if not curves:
        raise UserError(f"{folder} has logged nothing yet; train it for at least run.log_every steps")
    last = {name: values[-1] for name, (_, values) in curves.items()}
    step = max(steps[-1] for steps, _ in curves.values())
    groups: dict[str, list[report.Series]] = {}
    for name, (steps, values) in curves.items():
        if name not in ("seconds", "memory_gib", "gpu_memory_gib"):
            groups.setdefault(name.partition("/")[0], []).append(report.Series(name, steps, values))
    alarms = {healthy.metric: said for healthy, said in ring(read_rows(folder / "metrics.jsonl")).items()}
    charts = [report.Curves(title.replace("_", " "), series) for title, series in groups.items()]
    previews = [
        report.VideoRow(path.stem.replace("-", " "), [report.Cell("preview", path)])
        for path in sorted((folder / "previews").glob("*.mp4"))
    ]
    return report.Report(
        title=f"Run {folder.name}",
        summary=f"{step} steps in {last['seconds']:.0f} s, {last['steps_per_second']:.2f} steps per second.",
        sections=[
            *([report.Facts("Alarms at the end of this run", alarms)] if alarms else []),
            *(
                [report.Videos("Previews: the same prompts and noise as it trained", previews, width=480)]
                if previews
                else []
            ),
            *charts,
            report.Facts("Time and memory", {k: f"{last[k]:.2f}" for k in last if k.endswith("gib") or k == "seconds"}),
            report.Code("The run", (folder / "run.yaml").read_text(encoding="utf-8")),
        ],
    )


def _of_evaluation(folder: Path) -> report.Report:
    result = read_json(folder / "scores.json")
    measured = {name: None if f["value"] is None else report.Score(**f) for name, f in result.pop("scores").items()}
    rates = {name: score for name, score in measured.items() if name.rpartition(": ")[2] in RATES}
    rows = [report.ScoreRow(name, [score], spec=".1%") for name, score in rates.items()]
    rest = [report.ScoreRow(name, [score], better="") for name, score in measured.items() if name not in rates]
    videos = sorted((folder / "videos").glob("*.mp4"))[:SHOWN]
    captions = read_json(folder / "settings.json")["captions"]
    shown = [report.VideoRow(captions[int(path.stem)], [report.Cell(result["model"], path)]) for path in videos]
    best = measured["all three"]
    assert best is not None  # an evaluation has captions
    return report.Report(
        title=f"Evaluation of {result['model']}",
        summary=f"{result['n']} videos, read by the oracle and compared with their captions.",
        cards=[
            report.Card("shape, colour and motion right", f"{best.value:.1%}", f"{best.low:.1%} to {best.high:.1%}")
        ],
        sections=[
            *([report.Videos("The first videos", shown)] if shown else []),
            report.ScoreTable("Right", [result["model"]], rows, note="rates with 95 % intervals"),
            report.ScoreTable(
                "Measured",
                [result["model"]],
                rest,
                note="means and the Fréchet distance to rendered videos, with 95 % intervals",
            ),
            report.Facts("Settings", {**result, "machine": machine()}),
        ],
    )


def _of_comparison(folder: Path) -> report.Report:
    content = read_json(folder / "comparison.json")
    columns, labels = content["columns"], [column["label"] for column in content["columns"]]
    scores = [
        {name: None if s["value"] is None else report.Score(**s) for name, s in column["scores"].items()}
        for column in columns
    ]
    names = list(dict.fromkeys(name for column in scores for name in column))
    rates = [name for name in names if name in RATES]
    means = [name for name in names if name.rpartition(": ")[2] not in RATES]
    made = [column for column in columns if column["facts"]]
    shown = [
        report.VideoRow(content["captions"][number], [report.Cell(c["label"], path) for c, path in cells])
        for number in range(min(SHOWN, len(content["captions"])))
        if (cells := [(c, video) for c in made if (video := _video(folder, c, number)).exists()])
    ]
    students = [column for column in made if column["kept"]]
    best = max(students, key=lambda c: c["kept"].get("joint score kept") or 0.0, default=None)
    cards = (
        [report.Card(name, _times(name, value), best["label"]) for name, value in best["kept"].items()] if best else []
    )
    right = [_row(name, scores, ".1%") for name in rates]
    costs = ("passes", "seconds a video", "seconds to decode a video")
    return report.Report(
        title="Few steps beside many",
        summary=f"{len(content['captions'])} captions, the same noise for all: {', '.join(labels)}.",
        cards=cards,
        sections=[
            report.Videos("The same captions and noise", shown),
            *([report.ScoreTable("Right", labels, right, note="rates with 95 % intervals")] if right else []),
            report.ScoreTable(
                "Measured",
                labels,
                [_row(name, scores, ".3g", MEASURED.get(name, "")) for name in means],
                note="means, with 95 % intervals; diversity is the distance of videos of one caption in the oracle's "
                "features, entropy and surprise are in nats a token, codes in use is the perplexity of all codes",
            ),
            report.ScoreTable(
                "Cost of a video",
                [column["label"] for column in made],
                [report.ScoreRow(n, [report.Score(c["facts"][n]) for c in made], better="lower") for n in costs],
                note=f"{made[0]['facts']['videos at once']} at once, without text; on {made[0]['facts']['machine']}",
            ),
            *(
                report.Facts(c["label"], {**{k: _times(k, v) for k, v in c["kept"].items()}, **c["facts"]})
                for c in made
            ),
        ],
    )


def _row(
    name: str, scores: list[dict], spec: str, better: Literal["higher", "lower", ""] = "higher"
) -> report.ScoreRow:
    return report.ScoreRow(name, [column.get(name) for column in scores], spec=spec, better=better)


def _video(folder: Path, column: dict, number: int) -> Path:
    return folder / column["facts"]["folder"] / "videos" / f"{number:03d}.mp4"


def _times(name: str, value: float | None) -> str:
    if value is None:
        return "nothing to compare with"
    return f"{value:.1f} ×" if name == "times faster" else f"{value:.1%}"
