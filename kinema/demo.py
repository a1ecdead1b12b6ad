"""The demo: a shipped generator draws what it knows, learns a shape it has never seen, and is judged before and after.

Everything it does is what the other commands do; it is killed and run again like they are, and goes on where it stopped.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kinema import config
from kinema.data.sprites import NOVEL_SHAPES, Scene, World, render
from kinema.data.video import mp4_bytes
from kinema.evaluation import report
from kinema.evaluation.evaluate import HELD_OUT, videos_of
from kinema.evaluation.oracle import read
from kinema.evaluation.scores import Scores, score, verdicts
from kinema.pretrained import Pretrained, load
from kinema.recipes import sprites
from kinema.training.metrics import memory
from kinema.training.trainer import Trainer

MODEL = "sprites-wan"
STEPS = 20  # of sampling: fewer than the model's own 50, for a demo on a laptop
NOVEL = World(shapes=NOVEL_SHAPES, seed=2)


def demo(out: Path, device: torch.device, videos: int = 16, steps: int = 200) -> Path:
    """Runs the demo in `out` and returns the path of its report.

    `videos` captions of the new shape and as many of known shapes are made before and after `steps` steps of training.
    """
    console, began = Console(), time.monotonic()
    clips = [NOVEL.clip(i) for i in range(videos)] + [HELD_OUT.clip(i) for i in range(videos)]
    scenes, captions = [scene for scene, _ in clips], [caption for _, caption in clips]
    truth = torch.cat([render(NOVEL, list(range(videos))), render(HELD_OUT, list(range(videos)))])

    console.print(f"[bold]1/4[/] {MODEL} makes {len(captions)} videos; half of them are of a shape it has never seen")
    model = load(MODEL, device).with_settings(steps=STEPS)
    before = _make(console, model, captions, out / "before")

    console.print(f"[bold]2/4[/] it learns to draw a {NOVEL_SHAPES[0]}, in {steps} steps")
    run = sprites.learn(steps=steps)
    trained = time.monotonic()
    Trainer(run, out / "train", device).train()
    trained = time.monotonic() - trained

    console.print("[bold]3/4[/] the same captions and the same noise again")
    tuned = load(str(out / "train"), device).with_settings(steps=STEPS)
    after = _make(console, tuned, captions, out / "after")

    console.print("[bold]4/4[/] the oracle reads both, and the report is written")
    path = out / "report.html"
    report.write(_report(run, captions, scenes, before, after, truth, out, trained, time.monotonic() - began), path)
    console.print(f"\n[bold green]{path.resolve()}[/]", soft_wrap=True)
    return path


def _make(console: Console, model: Pretrained, captions: list[str], folder: Path) -> Tensor:
    columns = (TextColumn("  videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("videos", total=len(captions))
        return videos_of(model, captions, folder, batch=16, each=lambda done: bar.update(task, completed=done))


def _report(
    run, captions: list[str], scenes: list[Scene], before: Tensor, after: Tensor, truth: Tensor, out: Path, trained: float, total: float
) -> report.Report:
    half = len(captions) // 2
    new, old = slice(0, half), slice(half, None)
    name = NOVEL_SHAPES[0]
    parts = [score(videos[part], scenes[part]) for part in (new, old) for videos in (before, after)]
    metrics = report.read_metrics(out / "train" / "metrics.jsonl")
    shown = [*range(min(6, half)), *range(half, half + min(4, half))]
    rows = []
    for i in shown:
        cells = []
        for label, videos in (("before", before), ("after", after), ("rendered", truth)):
            chips = verdicts(read(videos[i : i + 1])[0], scenes[i])
            cells.append(report.Cell(label, mp4_bytes(videos[i], NOVEL.fps, upscale=3), chips))
        rows.append(report.VideoRow(captions[i], cells))
    gain = parts[1]["shape"].value - parts[0]["shape"].value
    return report.Report(
        title=f"kinema demo: teaching a video generator to draw a {name}",
        summary=(
            f"A tiny Wan text-to-video model that had never seen a {name} was fine-tuned for {run.steps} steps on rendered "
            f"clips. All scores are measured on captions it was not trained on, by an oracle that reads the pixels."
        ),
        cards=[
            report.Card(f"{name} drawn right", f"{parts[1]['shape'].value:.0%}", f"{parts[0]['shape'].value:.0%} before, {gain:+.0%}"),
            report.Card("known shapes drawn right", f"{parts[3]['shape'].value:.0%}", f"{parts[2]['shape'].value:.0%} before"),
            report.Card("training", f"{trained:.0f} s", f"{run.steps} steps of {run.batch_size} clips"),
            report.Card("all of the demo", f"{total:.0f} s", f"{memory()['memory_gib']:.1f} GiB of memory"),
        ],
        sections=[
            report.Videos("Before and after: same captions, same noise", rows),
            _table(f"Captions with a {name}", parts[0], parts[1]),
            _table("Captions with known shapes, in combinations never trained on", parts[2], parts[3]),
            report.Curves("Training loss", [report.Series("loss", *metrics["loss/student"])]),
            report.Curves("Learning rate", [report.Series("learning rate", *metrics["lr/student"])]),
            report.Facts("Time and memory", {"training": f"{trained:.1f} s", "everything": f"{total:.1f} s", **memory()}),
            report.Code("Do it again", f"kinema train sprites:learn --out {out / 'train'}", open=True),
            report.Code("The run", config.dump(replace(run))),
        ],
    )


def _table(title: str, before: Scores, after: Scores) -> report.ScoreTable:
    rows = [
        report.ScoreRow(name, [before[name], after[name]], spec=".0%")
        for name in ("shape", "colour", "motion", "background", "size", "all")
    ]
    return report.ScoreTable(title, ["before", "after"], rows, delta=("before", "after"), note="with 95 % intervals")
