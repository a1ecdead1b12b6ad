"""`kinema bench train|ttt|dimo|cogvideox`: how long the turns of training take, part by part, on random weights."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.bench import flops
from kinema.bench.measure import (
    Clock,
    Ledger,
    Watch,
    ceilings,
    forget_peak,
    kernels,
    peak,
    report,
    synchronised,
    warmed,
)
from kinema.bench.stage import Stage
from kinema.bench.stream import TINY
from kinema.diffusion.rollout import exit_steps
from kinema.models.causality import Window
from kinema.models.ursa.transformer import URSASize
from kinema.models.wan.transformer import SIZES
from kinema.objectives.distribution_matching import DistributionMatching
from kinema.objectives.objective import Turn
from kinema.run import Run


@dataclass(frozen=True)
class Training:
    """Which run is taken a few steps of, and how.

    what     train: DMD of a causal Wan 1.3B by another (three networks); ttt: CogVideoX 5B with
             mixers on 3 s; dimo: URSA 1.7B; cogvideox: fine-tuning 5B
    size     full, or tiny for a CPU
    fast     the fast plan of the run, else blocks that are recomputed whole and everything as it is written
    repeats  how often each turn is timed, after one that is not; of a rollout, for each step it can end with
    graded_at_once  of train: the objective's, in latent frames; None: all of them in the fast plan, else 0
    """

    what: Literal["train", "ttt", "dimo", "cogvideox"] = "train"
    size: Literal["full", "tiny"] = "full"
    fast: bool = True
    repeats: int = 1
    graded_at_once: int | None = None


def training(settings: Training, device: torch.device) -> dict[str, Any]:
    """Takes the turns of the run and returns the report."""
    run = _run(settings)
    dtype = torch.bfloat16 if run.plan.compute == "bfloat16" else torch.float32
    found: dict[str, Any] = {"ceilings": ceilings(device, dtype)}
    stage = _Stage(run, device)
    forget_peak(device)
    turns, mean = {}, 0.0
    for turn in run.objective.turns():
        turns[turn.role] = told = _turn(stage, turn, settings.repeats)
        told["peak_gib"] = peak(device)
        forget_peak(device)
        print(json.dumps({turn.role: told}), file=sys.stderr, flush=True)  # a turn takes long: who stops it has this
        mean += told["seconds"] / turn.every
    found |= {"turns": turns, "mean_iteration_s": round(mean, 4), "samples_per_s": round(run.batch_size / mean, 4)}
    found["ceilings_after"] = ceilings(device, dtype)
    found["peak_gib"] = max((t["peak_gib"] for t in turns.values() if t["peak_gib"]), default=None)
    if all("tflop" in told for told in turns.values()):
        work = sum(turns[turn.role]["tflop"] / turn.every for turn in run.objective.turns())
        found["tflops"] = round(work / mean, 3)
        found["share_of_gemm_ceiling"] = round(work / mean / found["ceilings"]["gemm_tflops"], 3)
        found["mfu_of_989"] = round(work / mean / 989, 3)
    return report(settings.what, settings, device, found)


def _turn(stage: "_Stage", turn: Turn, repeats: int) -> dict[str, Any]:
    """Means over the steps that a rollout can end with, each as often."""
    steps = stage.steps(turn, repeats)
    warmed(lambda: stage.take(turn, steps[-1]), stage.device, least=1)
    stage.ledger.read()
    each = []
    with Watch(stage.device) as card:
        for step in steps:
            synchronised(stage.device)
            begin = stage.clock.mark()
            stage.take(turn, step)
            each.append((stage.clock.between(begin, stage.clock.mark()), stage.ledger.read(), stage.work(turn, step)))
    seconds = sum(total for total, _, _ in each) / len(each)
    parts: dict[str, float] = {}
    for _, split, _ in each:
        for name, value in split.items():
            parts[name] = parts.get(name, 0.0) + value / len(each)
    parts["rest"] = seconds - sum(parts.values())
    told: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "seconds_each": [round(total, 4) for total, _, _ in each],
        "split": {name: round(value, 4) for name, value in parts.items()},
        "card": card.read(),
    }
    if isinstance(stage.run.objective, DistributionMatching):
        told["exit_of_each"] = [stage._exit(turn, step) for step in steps]
    if all(work is not None for _, _, work in each):
        told["tflop"] = round(sum(work for _, _, work in each) / len(each) / 1e12, 2)
        told["tflops"] = round(told["tflop"] / seconds, 2)
    told["kernels"] = kernels(lambda: stage.take(turn, steps[0]), stage.device)
    stage.ledger.read()
    return told


class _Stage(Stage):
    """A stage whose passes are timed."""

    def __init__(self, run: Run, device: torch.device):
        self.clock = Clock(device)
        self.ledger = Ledger(self.clock)
        super().__init__(run, device, self.ledger.span)
        self.cast |= {name: self._timed(name, actor.reading) for name, actor in self.actors.items()}

    def take(self, turn: Turn, step: int) -> None:
        with _spanned(self.ledger):
            super().take(turn, step)

    def steps(self, turn: Turn, repeats: int) -> list[int]:
        """Steps of the run whose rollouts end with each of the student's steps, `repeats` of each."""
        objective = self.run.objective
        if not isinstance(objective, DistributionMatching):
            return list(range(repeats))
        ends = len(objective.student.spec.steps_at)  # type: ignore[attr-defined]
        found: dict[int, list[int]] = {end: [] for end in range(ends)}
        step = 0
        while any(len(steps) < repeats for steps in found.values()):
            found[self._exit(turn, step)].append(step)
            step += 1
        return [step for end in range(ends) for step in found[end][:repeats]]

    def work(self, turn: Turn, step: int) -> float | None:
        """FLOPs of a turn of a causal Wan's game, without recomputation; None of others, which are not counted here."""
        objective: Any = self.run.objective
        if not isinstance(objective, DistributionMatching) or "teacher" not in objective.roles():
            return None
        spec: Any = objective.student.spec
        size, frames = spec.dimensions, objective.frames[1]
        tokens = objective.shape[1] // size.patch[1] * (objective.shape[2] // size.patch[2])
        window = Window(spec.window, spec.sink, spec.reanchor)
        passes = flops.chunk_passes(size, frames, tokens, spec.chunks, window)
        rollout = flops.rollout(passes, self._exit(turn, step) + 1) + flops.text(size)
        whole = frames * tokens
        look = flops.forward(size, whole, whole) + flops.text(size)
        if turn.role == "critic":
            return rollout + look + flops.backward(size, whole, whole) + 2 * flops.text(size)
        back = flops.chunk_backwards(size, frames, tokens, spec.chunks, window) + 2 * flops.text(size)
        return rollout + 3 * look + back

    def _exit(self, turn: Turn, step: int) -> int:
        """The step a turn's rollouts end with: the objective's own draw."""
        objective: Any = self.run.objective
        draw = self.batch(step, 0).keys.fold(turn.role)
        exits = exit_steps(objective.exit, len(objective.student.spec.steps_at), 1, draw.shared, 0)
        return exits if isinstance(exits, int) else exits[0]

    def _timed(self, name: str, reading: Any) -> Any:
        return replace(reading, backbone=_Timed(reading.backbone, name, self.ledger))


class _Timed:
    """A backbone whose passes are spans of the ledger; all else is the backbone's own."""

    def __init__(self, backbone: Any, name: str, ledger: Ledger):
        self._backbone, self._name, self._ledger = backbone, name, ledger

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        with self._ledger.span(self._name):
            return self._backbone(*args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


@contextmanager
def _spanned(ledger: Ledger) -> Iterator[None]:
    """Meanwhile, `Tensor.backward` is a span."""
    plain: Callable = Tensor.backward

    def timed(*args: Any, **more: Any) -> None:
        with ledger.span("backward"):
            plain(*args, **more)

    Tensor.backward = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.backward = plain  # type: ignore[method-assign]


def _run(settings: Training) -> Run:
    from kinema.recipes import bench

    full, fast = settings.size == "full", settings.fast
    if settings.what == "train":
        size = SIZES["1.3B"] if full else TINY
        frames, height, width = (21, 480, 832) if full else (6, 32, 48)
        at_once = (frames if fast else 0) if settings.graded_at_once is None else settings.graded_at_once
        run = bench.dmd_of(size, frames, height, width, fast, graded_at_once=at_once)
    elif settings.what == "dimo":
        run = bench.ursa_dimo() if full else _tiny_dimo(bench.ursa_dimo(frames=2, height=32, width=32))
    elif settings.what == "ttt":
        run = bench.ttt_video(seconds=3, processes=1)
        run = run if full else _tiny_ttt(run)
    else:
        run = bench.cogvideox_sft() if full else _tiny_cogvideox(bench.cogvideox_sft(frames=2, height=32, width=32))
    plan = replace(run.plan, fuse=True, recompute="linear") if fast else run.plan
    return replace(run, plan=plan if full else replace(plan, compute="float32"))


def _tiny_dimo(run: Run) -> Run:
    objective: Any = run.objective
    size = URSASize(dim=32, ffn_dim=64, heads=2, kv_heads=1, layers=2, codes=64_000, words=200, bov=199)
    roles = {name: replace(role, spec=replace(role.spec, size=size)) for name, role in objective.roles().items()}
    return replace(run, objective=replace(objective, **roles), data=replace(run.data, words=200, length=320))  # type: ignore[type-var]


def _tiny_ttt(run: Run) -> Run:
    small = _tiny_cogvideox(run)
    data: Any = small.data
    return replace(small, data=replace(data, shape=(*data.shape[:2], 4, 4)))


def _tiny_cogvideox(run: Run) -> Run:
    objective: Any = run.objective
    size = replace(objective.student.spec.dimensions, heads=4, layers=2, text_dim=16, text_tokens=8)
    student = replace(objective.student, spec=replace(objective.student.spec, size=size))
    data = replace(run.data, rows=8, width=16)  # type: ignore[type-var]
    return replace(run, objective=replace(objective, student=student), data=data)
