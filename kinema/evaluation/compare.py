"""Students of few steps beside their teacher of many: the same captions and noise, scores, diversity, entropy, time.

Time is that of the sampler alone, without text and decoder. Diversity is between videos of one caption from different
noise: a student that has collapsed has low entropy and high adherence, as a good one has, but no diversity.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.scenes import Scene
from kinema.data.sprites import render_scenes
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.logits import draw as tokens_of
from kinema.diffusion.token_sampling import TokenSampler
from kinema.evaluation.evaluate import (
    HELD_OUT,
    evaluate,
    latents_in,
    rendered,
    show,
    videos_of,
    write_json,
)
from kinema.evaluation.looking import look
from kinema.evaluation.scores import Score, mean
from kinema.pretrained import Pretrained
from kinema.training.metrics import machine

CAPTIONS, STARTS = 32, 16  # of the diversity: how many captions, and videos of each
TIMES = (0.25, 0.5, 0.75)  # at which a teacher is asked about a student's codes
REPEATS = 3  # of the timing, after one that does not count
TRUTH = "rendered"


@dataclass(frozen=True)
class Column:
    """What was measured of one generator with one number of steps."""

    label: str
    teacher: bool
    scores: dict[str, Score]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Watched:
    """A sampler of tokens that notes how long it took and the entropy `[B]`, in nats, of its last draw."""

    sampler: TokenSampler
    seconds: float = math.nan
    entropy: Tensor | None = None

    @property
    def guided_above(self) -> float:
        return self.sampler.guided_above

    def __call__(self, denoise: Callable[..., Any], path: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        last: list[Any] = [None]

        def seen(x: Tensor, t: Tensor, **where: Any) -> Any:
            last[0] = denoise(x, t, **where)
            return last[0]

        _settle(x.device)
        began = time.perf_counter()
        made = self.sampler(seen, path, x, *rest, **more)
        _settle(x.device)
        self.seconds = time.perf_counter() - began
        drawn = tokens_of(last[0], torch.zeros(last[0].shape, device=x.device))
        self.entropy = drawn.entropy.flatten(1).mean(1)
        return made


def compare(
    students: Sequence[Pretrained],
    teachers: Sequence[Pretrained],
    captions: Sequence[str],
    scenes: Sequence[Scene] | None,
    folder: Path,
    seed: int = 0,
    batch: int = 32,
    each: Callable[[str], None] = lambda label: None,
    runs: Mapping[str, Path] | None = None,
    jobs: int = 1,
    starts: int = STARTS,
) -> list[Column]:
    """Measures every generator, teachers first; writes `folder/comparison.json`, and of each its own evaluation.

    Without `scenes`, for captions of the real world, there is no oracle: videos, codes, entropy and time remain.

    `each` is told what is measured next; `jobs` processes read the videos; `starts` are the videos of a caption whose
    diversity is measured. What was made stays in the folder, so that a killed comparison goes on. The report shows the
    curves of `runs`, by the name of the model.
    """
    known = {name: str(path) for name, path in (runs or {}).items()}
    columns, truth = [], {}
    for model, is_teacher in [*((t, True) for t in teachers), *((s, False) for s in students)]:
        steps = model.studio.pipeline.steps
        label = f"{model.name}, {steps} step{'s' * (steps > 1)}"
        each(label)
        own = folder / f"{model.name}-{steps}"
        if scenes is None:
            show(videos_of(model, captions, own, seed, batch), own, model.studio.pipeline.fps)
            scores = {}
        else:
            frames = model.studio.pipeline.frames
            if frames not in truth:
                truth[frames] = look(rendered(scenes, frames), jobs)[1]
            made = evaluate(model, captions, scenes, own, seed, batch, jobs=jobs, truth=truth[frames])
            scores = dict(made.scores)
        scores |= diversity(model, captions[:CAPTIONS], seed, starts, jobs, batch, scenes is not None)
        timed, facts = timing(model, captions[:batch], seed)
        scores |= timed
        if isinstance(model.denoiser, TokenDenoiser):
            scores |= surprise(teachers[0] if teachers else model, model, captions, own, seed, batch)
        columns.append(Column(label, is_teacher, scores, {"folder": own.name, **model.settings(), **facts}))
        _write(folder, columns, captions, known)
    if scenes is not None:
        columns.append(Column(TRUTH, False, apart([truth_of(scene, starts) for scene in scenes[:CAPTIONS]], jobs)))
    _write(folder, columns, captions, known)
    return columns


def diversity(
    model: Pretrained,
    captions: Sequence[str],
    seed: int = 0,
    starts: int = STARTS,
    jobs: int = 1,
    batch: int = 32,
    judged: bool = True,
) -> dict[str, Score]:
    """How different `starts` videos of the same caption are, a mean over captions: in how many tokens, and, `judged`
    by the oracle, in what is to be seen.
    """
    differ, videos = [], []
    for caption in captions:
        spans = [range(start, min(start + batch, starts)) for start in range(0, starts, batch)]
        parts = [model.studio.latents(model.spec, model.denoiser, [caption] * len(s), s, seed) for s in spans]
        made = torch.cat(parts)
        if isinstance(model.denoiser, TokenDenoiser):
            flat = made.flatten(1)
            differ.append(statistics.fmean(float((a != b).float().mean()) for a, b in combinations(flat, 2)))
        if judged:
            videos.append(model.studio.codec.decode(made).cpu())
    tokens = {"tokens that differ": mean(differ)} if differ else {}
    return (apart(videos, jobs) if judged else {}) | tokens


def apart(videos: Sequence[Tensor], jobs: int = 1) -> dict[str, Score]:
    """The mean distance, in the oracle's features, of two videos of the same caption: a mean over captions.

    `videos` are those of each caption.
    """
    features = look(torch.cat(list(videos)), jobs)[1].split([len(same) for same in videos])
    distances = [torch.pdist(same).mean().item() for same in features]
    return {"diversity": mean(distances)}


def truth_of(scene: Scene, starts: int = STARTS) -> Tensor:
    """As many rendered videos of a scene."""
    return render_scenes(HELD_OUT, [scene] * starts, HELD_OUT.keys(range(starts)))


def timing(model: Pretrained, captions: Sequence[str], seed: int = 0) -> tuple[dict[str, Score], dict[str, Any]]:
    """Seconds and network passes of a video, made and decoded as a batch, and the entropy of tokens; median of
    `REPEATS`."""
    tokens = isinstance(model.denoiser, TokenDenoiser)
    studio, watched, rows = model.studio, None, [0]
    if tokens:
        watched = Watched(studio.pipeline.sampler)  # type: ignore[arg-type]
        studio = replace(studio, pipeline=replace(studio.pipeline, sampler=watched))
    hook = model.module.register_forward_pre_hook(lambda module, given: rows.__setitem__(0, rows[0] + len(given[0])))
    sampling, decoding, device = [], [], studio.codec.device
    for repeat in range(1 + REPEATS):
        rows[0] = 0
        _settle(device)
        began = time.perf_counter()
        made = studio.latents(model.spec, model.denoiser, captions, range(len(captions)), seed)
        _settle(device)
        between = time.perf_counter()
        studio.codec.decode(made)
        _settle(device)
        if repeat:
            decoding.append(time.perf_counter() - between)
            sampling.append(watched.seconds if watched else between - began)
    hook.remove()
    scores = {}
    if watched is not None and watched.entropy is not None:
        scores["token entropy"] = mean(watched.entropy.tolist())
    n = len(captions)
    facts = {
        "passes": rows[0] / n,
        "seconds a video": statistics.median(sampling) / n,
        "seconds to decode a video": statistics.median(decoding) / n,
        "videos at once": n,
        "machine": machine(),
    }
    return scores, facts


@torch.no_grad()
def surprise(
    teacher: Pretrained, model: Pretrained, captions: Sequence[str], folder: Path, seed: int, batch: int
) -> dict[str, Score]:
    """The teacher's cross-entropy, in nats, on the model's codes of `folder` at `TIMES`, and the codes in use."""
    device, codes_known = model.studio.codec.device, model.denoiser.path.codes
    errors, counts = {t: [] for t in TIMES}, torch.zeros(codes_known, dtype=torch.float64, device=device)
    for start, codes in latents_in(folder, len(captions), batch):
        codes, part = codes.to(device), captions[start : start + batch]
        cond = teacher.studio.text(part)
        draw = seeds.keys(seed, "surprise", range(start, start + len(part)), device=device)
        for t in TIMES:
            at = torch.full((len(part), 1), t, device=device)
            errors[t] += teacher.denoiser.loss(codes, at, cond, draw).mean(1).tolist()
        counts += torch.bincount(codes.flatten(), minlength=codes_known)
    share = counts / counts.sum()
    used = float(torch.special.entr(share).sum().exp())
    scores = {f"surprise of the teacher at {t:g}": mean(values) for t, values in errors.items()}
    return scores | {"codes in use": Score(used, used, used, len(captions))}


def reference(columns: Sequence[Column]) -> Column | None:
    """The teacher that students are held to: at 25 steps, else at the most."""
    teachers = [column for column in columns if column.teacher]
    return max(teachers, key=lambda c: (c.facts["steps"] == 25, c.facts["steps"]), default=None)


def kept(column: Column, teacher: Column) -> dict[str, float | None]:
    """What a student keeps of its teacher's joint score and diversity, and how many times faster it is.

    None of a score that the teacher has not.
    """
    pairs = {
        f"{name} kept": (column.scores[score].value, teacher.scores[score].value)
        for name, score in (("joint score", "all three"), ("diversity", "diversity"), ("tokens", "tokens that differ"))
        if score in column.scores and score in teacher.scores
    }
    pairs["times faster"] = teacher.facts["seconds a video"], column.facts["seconds a video"]
    return {name: a / b if b > 0 else None for name, (a, b) in pairs.items()}


def _write(folder: Path, columns: Sequence[Column], captions: Sequence[str], runs: Mapping[str, str]) -> None:
    teacher = reference(columns)
    written = [
        {
            **asdict(column),
            "scores": {name: plain(score) for name, score in column.scores.items()},
            "kept": kept(column, teacher) if teacher and column.facts and not column.teacher else {},
        }
        for column in columns
    ]
    write_json(folder / "comparison.json", {"captions": list(captions), "columns": written, "runs": runs})


def plain(score: Score) -> dict[str, float | None]:
    """A score as JSON, which knows no nan."""
    return {name: None if math.isnan(value) else value for name, value in asdict(score).items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
