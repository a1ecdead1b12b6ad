"""The second half of the demo: a causal student of four steps learns from its teacher, and both make the same videos.

The teacher sees all frames at once and takes fifty guided steps; the student streams, chunk by chunk, in four.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from kinema import config, seeds
from kinema.data.scenes import Scene
from kinema.data.sprites import render
from kinema.data.video import mp4_bytes
from kinema.evaluation import report
from kinema.evaluation.evaluate import HELD_OUT, held_out, videos_of
from kinema.evaluation.oracle import read
from kinema.evaluation.scores import Score, facts, score
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.vae_fast import FastVideoAutoencoder
from kinema.pretrained import Pretrained, load
from kinema.run import Run
from kinema.training.trainer import Trainer

RECIPE = "sprites:dmd"
OPTIONS = ("--steps", "60", "--batch_size", "8", "--clips", "256", "--run.save_every", "20")
TEACHER, START, SHIPPED = "sprites-wan", "sprites-wan-ode", "sprites-wan-4step"
NAMES = ("shape", "colour", "motion", "all three")


@dataclass(frozen=True)
class Made:
    """One generator's videos `[B, T, 3, H, W]`, and what one more of them cost when it was made alone.

    passes    evaluations of the network for one video, each row of a batch counted
    seconds   until the video was there, and until its `first` frames were
    """

    name: str
    videos: Tensor
    passes: int
    seconds: float
    first: float


def few_steps(
    out: Path,
    device: torch.device,
    videos: int,
    console: Console,
    options: Sequence[str] = OPTIONS,
    teacher_steps: int | None = None,
) -> tuple[list, list[report.Card]]:
    """Distils in `out`, by the recipe with its `options`, and returns sections and cards of a report.

    The teacher takes its own steps, or `teacher_steps`.
    """
    captions, scenes = held_out(videos)
    run = config.configure(RECIPE, list(options))
    trained = time.monotonic()
    Trainer(run, out / "train", device).finish()
    trained = time.monotonic() - trained
    models = [
        ("teacher", load(TEACHER, device).with_settings(steps=teacher_steps)),
        ("student before", load(START, device)),
        ("student after", load(str(out / "train"), device)),
        ("student shipped", load(SHIPPED, device)),
    ]
    made = []
    for name, model in models:
        console.print(f"  {videos} videos of the {name}, {model.studio.pipeline.steps} steps")
        pixels = videos_of(model, captions, out / name.replace(" ", "-"), batch=16)
        made.append(Made(name, pixels, *cost(model, captions[0])))
    truth = render(HELD_OUT, list(range(videos)))
    return _sections(run, out, captions, scenes, made, truth, trained), _cards(made, scenes)


def cost(model: Pretrained, caption: str) -> tuple[int, float, float]:
    """Network evaluations, seconds until a video is there, and until its first frames are; the second of two tries.

    All decode by the quick path, or on a CPU the time would be that of the decoder.
    """
    rows, codec = [0], model.studio.codec
    quick = FastVideoAutoencoder(codec.network, codec.pixels, fused=codec.device.type == "cuda")
    studio = replace(model.studio, codec=quick)
    hook = model.module.register_forward_pre_hook(lambda module, given: rows.__setitem__(0, rows[0] + len(given[0])))
    whole = first = 0.0
    for _ in range(2):
        rows[0], began, first = 0, time.perf_counter(), 0.0
        if isinstance(model.spec, WanCausal):
            draw = seeds.keys(0, "sample", [0], device=codec.device)
            for _ in studio.session(model.spec, model.denoiser, [caption], draw).frames():
                first = first or time.perf_counter() - began
        else:
            studio.videos(model.spec, model.denoiser, [caption])
        whole = time.perf_counter() - began
    hook.remove()
    return rows[0], whole, first or whole


def _sections(
    run: Run, out: Path, captions: list[str], scenes: list[Scene], made: list[Made], truth: Tensor, trained: float
) -> list:
    rows = []
    for i in range(min(6, len(captions))):
        cells = []
        for name, pixels in (*((m.name, m.videos) for m in made), ("rendered", truth)):
            verdict = facts(read(pixels[i : i + 1])[0], scenes[i])
            chips = {fact: verdict[fact] for fact in NAMES[:3]}
            cells.append(report.Cell(name, mp4_bytes(pixels[i], HELD_OUT.fps, upscale=3), chips))
        rows.append(report.VideoRow(captions[i], cells))
    scores = [score(m.videos, scenes) for m in made]

    def shown(s: Score) -> report.Score:
        return report.Score(s.value, s.low, s.high, s.n)

    table = [report.ScoreRow(name, [shown(s[name]) for s in scores], spec=".0%") for name in NAMES]
    told = {
        f"{m.name}, {m.passes} network evaluations": f"{m.seconds:.2f} s a video, first frames after {m.first:.2f} s"
        for m in made
    }
    curves = report.read_metrics(out / "train" / "metrics.jsonl")
    return [
        report.Text(
            "From fifty steps to four",
            f"The teacher makes all frames at once in {made[0].passes} evaluations of its network. The student makes "
            "them as a stream, chunk by chunk. Before, it had learned to jump along the teacher's trajectories; after, "
            f"it has played {run.steps} steps of distribution matching (DMD) on its own videos in {trained:.0f} s. "
            "The shipped student has played longer, on a GPU. Times are of one video made alone on this machine.",
        ),
        report.Videos("Teacher and students: same captions", rows),
        report.ScoreTable("Captions never trained on", [m.name for m in made], table, note="with 95 % intervals"),
        report.Facts("What a video costs", told),
        report.Curves(
            "What the critic and the student say",
            [report.Series(name, *curves[f"student/{name}"]) for name in ("prompt", "critic_fit")],
        ),
    ]


def _cards(made: list[Made], scenes: list[Scene]) -> list[report.Card]:
    teacher, shipped = made[0], made[-1]
    rates = [score(m.videos, scenes)["all three"].value for m in (teacher, shipped)]
    return [
        report.Card(
            "faster in four steps",
            f"{teacher.seconds / shipped.seconds:.0f}×",
            f"{shipped.seconds:.2f} s a video, {teacher.seconds:.2f} s before",
        ),
        report.Card("right in four steps", f"{rates[1]:.0%}", f"{rates[0]:.0%} of the teacher's videos"),
    ]
