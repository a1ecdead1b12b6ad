"""The demo: a shipped generator draws what it knows, learns a shape it has never seen, and is judged before and after;
then a student of four steps learns from it.

All it does is what the other commands do: killed like them and run again like them, it goes on where it stopped.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kinema import config
from kinema.data.scenes import NOVEL_SHAPES, Scene
from kinema.data.sprites import World, render
from kinema.data.video import mp4_bytes
from kinema.errors import UserError
from kinema.evaluation import report
from kinema.evaluation.evaluate import HELD_OUT, videos_of
from kinema.evaluation.oracle import read
from kinema.evaluation.scores import Scores, facts, score
from kinema.few_steps import few_steps
from kinema.pretrained import Pretrained, load
from kinema.run import Run
from kinema.training.metrics import machine, memory
from kinema.training.trainer import Trainer

RECIPE = "sprites:learn"
STEPS = 20  # of sampling: fewer than the model's own 50, for a demo on a laptop
NOVEL = World(shapes=NOVEL_SHAPES, seed=2)


def demo(
    out: Path,
    device: torch.device,
    recipe: str = RECIPE,
    options: Sequence[str] = (),
    videos: int = 16,
    steps: int = STEPS,
) -> Path:
    """Runs the demo in `out` and returns the path of its report.

    `videos` captions of the new shape and as many of known shapes are made, in `steps` sampling steps, before and after
    the training that `recipe`, with its options, describes. UserError if that does not fine-tune a shipped generator.
    """
    run = config.configure(recipe, list(options))
    weights = getattr(getattr(run.objective.roles().get("student"), "spec", None), "weights", None)
    if weights is None or run.pipeline is None:
        raise UserError(f"{recipe} fine-tunes no generator; use {RECIPE} or sprites:cogvideox_lora")
    console, began = Console(), time.monotonic()
    distils = recipe == RECIPE
    parts = 4 + distils
    clips = [NOVEL.clip(i) for i in range(videos)] + [HELD_OUT.clip(i) for i in range(videos)]
    scenes, captions = [scene for scene, _ in clips], [caption for _, caption in clips]
    truth = torch.cat([render(NOVEL, list(range(videos))), render(HELD_OUT, list(range(videos)))])

    model = load(weights, device).with_settings(steps=steps)
    console.print(
        f"[bold]1/{parts}[/] {model.name} makes {len(captions)} videos; half of them are of a shape it has never seen"
    )
    before = _make(console, model, captions, out / "before")

    console.print(f"[bold]2/{parts}[/] it learns to draw a {NOVEL_SHAPES[0]}, in {run.steps} steps")
    trained = time.monotonic()
    Trainer(run, out / "train", device).finish()
    trained = time.monotonic() - trained

    console.print(f"[bold]3/{parts}[/] the same captions and the same noise again")
    tuned = load(str(out / "train"), device).with_settings(steps=steps)
    after = _make(console, tuned, captions, out / "after")

    if distils:
        console.print(f"[bold]4/{parts}[/] a student of four steps, which streams, learns from its teacher of fifty")
    more = few_steps(out / "distil", device, videos, console) if distils else ([], [])
    console.print(f"[bold]{parts}/{parts}[/] the oracle reads all of them, and the report is written")
    path = out / "report.html"
    seconds = {"training": trained, "everything": time.monotonic() - began}
    columns = {"before": before, "after": after, "rendered": truth}
    scores = {column: _halves(made, scenes) for column, made in columns.items() if column != "rendered"}
    again = " ".join(["kinema train", recipe, *options, "--out", str(out / "train")])
    report.write(_report(model.name, run, again, captions, scenes, columns, scores, out, seconds, *more), path)
    _write_scores(out / "scores.json", scores)
    for half, name in enumerate((f"{NOVEL_SHAPES[0]}s", "known shapes")):
        rates = [100 * scores[column][half]["shape"].value for column in ("before", "after")]
        console.print(f"  {name} drawn right: {rates[0]:.1f} % before, {rates[1]:.1f} % after", highlight=False)
    console.print(f"\n[bold green]{path.resolve()}[/]", soft_wrap=True)
    return path


def _make(console: Console, model: Pretrained, captions: list[str], folder: Path) -> Tensor:
    columns = (TextColumn("  videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("videos", total=len(captions))
        return videos_of(model, captions, folder, batch=16, each=lambda done: bar.update(task, completed=done))


def _halves(videos: Tensor, scenes: list[Scene]) -> tuple[Scores, Scores]:
    """The scores of the new shape's captions, which come first, and of those of known shapes."""
    half = len(scenes) // 2
    return score(videos[:half], scenes[:half]), score(videos[half:], scenes[half:])


def _write_scores(path: Path, scores: dict[str, tuple[Scores, Scores]]) -> None:
    plain = {
        column: {name: json.loads(part.to_json()) for name, part in zip(("new", "known"), both, strict=True)}
        for column, both in scores.items()
    }
    path.write_text(json.dumps(plain, indent=1))


def _report(
    model: str,
    run: Run,
    again: str,
    captions: list[str],
    scenes: list[Scene],
    videos: dict[str, Tensor],
    scores: dict[str, tuple[Scores, Scores]],
    out: Path,
    seconds: dict[str, float],
    sections: list,
    cards: list[report.Card],
) -> report.Report:
    """`videos` are columns: each has the new shape's captions first, then as many of known shapes. `sections` and
    `cards` are the second half's."""
    half, name = len(captions) // 2, NOVEL_SHAPES[0]
    (new_before, old_before), (new_after, old_after) = scores["before"], scores["after"]
    curves = report.read_metrics(out / "train" / "metrics.jsonl")
    rows = []
    for i in [*range(min(6, half)), *range(half, half + min(4, half))]:
        cells = []
        for column, made in videos.items():
            verdict = facts(read(made[i : i + 1])[0], scenes[i])
            chips = {fact: verdict[fact] for fact in ("shape", "colour", "motion")}
            cells.append(report.Cell(column, mp4_bytes(made[i], NOVEL.fps, upscale=3), chips))
        rows.append(report.VideoRow(captions[i], cells))
    return report.Report(
        title=f"kinema demo: teaching a video generator to draw a {name}",
        summary=(
            f"{model}, a tiny video generator that had never seen a {name}, was fine-tuned for {run.steps} steps on "
            "rendered clips. All scores are of captions it was not trained on, by an oracle that reads the pixels."
        ),
        cards=[
            report.Card(
                f"{name}s drawn right", f"{new_after['shape'].value:.0%}", f"{new_before['shape'].value:.0%} before"
            ),
            report.Card(
                "known shapes right", f"{old_after['shape'].value:.0%}", f"{old_before['shape'].value:.0%} before"
            ),
            *cards,
            report.Card("training", f"{seconds['training']:.0f} s", f"{run.steps} steps of {run.batch_size} clips"),
            report.Card(
                "all of the demo", f"{seconds['everything']:.0f} s", f"{memory()['memory_gib']:.1f} GiB of memory"
            ),
        ],
        sections=[
            report.Videos("Before and after: same captions, same noise", rows),
            _table(f"Captions with a {name}", new_before, new_after),
            _table("Known shapes, in combinations never trained on", old_before, old_after),
            report.Curves("Training loss", [report.Series("loss", *curves["loss/student"])]),
            report.Curves("Gradient norm", [report.Series("gradient norm", *curves["grad_norm/student"])]),
            *sections,
            report.Facts(
                "Time and memory", {**{k: f"{v:.1f} s" for k, v in seconds.items()}, **_peaks(), "machine": machine()}
            ),
            report.Code("Do the training again", again, open=True),
            report.Code("The run", config.dump(run)),
        ],
    )


def _peaks() -> dict[str, str]:
    return {
        name.replace("_gib", " at its peak").replace("_", " "): f"{value:.2f} GiB" for name, value in memory().items()
    }


def _table(title: str, before: Scores, after: Scores) -> report.ScoreTable:
    def score_of(scores: Scores, name: str) -> report.Score:
        s = scores[name]
        return report.Score(s.value, s.low, s.high, s.n)

    names = ("shape", "colour", "motion", "all three", "background", "size")
    rows = [report.ScoreRow(name, [score_of(before, name), score_of(after, name)], spec=".0%") for name in names]
    return report.ScoreTable(title, ["before", "after"], rows, delta=("before", "after"), note="with 95 % intervals")
