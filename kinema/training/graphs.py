"""Turns as CUDA graphs: for networks so small that launching their kernels takes longer than running them.

A turn's loss and backward are recorded once for each way they can go and replayed from then on, so that thousands of
launches become one. They are the same kernels in the same order: the numbers are those of the plain run.
"""

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.errors import UsageError
from kinema.objectives.objective import Cast, Metrics, Turn
from kinema.run import Plan

Learn = Callable[[Turn, Cast, Batch, int, int, Plan], tuple[Tensor, Metrics]]  # `actor.backward`


@dataclass
class Graphs:
    """Calls `learn` and, from the third time that a turn goes the same way, replays what it did.

    The first time is plain: kernels are chosen and compiled then. What a graph reads of the batch is copied to where it
    was when it was recorded; what it wrote (loss, metrics, gradients) is overwritten by its next replay.
    """

    learn: Learn

    def __post_init__(self):
        self._seen: set[Hashable] = set()
        self._made: dict[Hashable, _Recorded] = {}

    def __call__(
        self, turn: Turn, cast: Cast, batch: Batch, step: int, passes: int, plan: Plan, learning: Sequence[Tensor]
    ) -> tuple[Tensor, Metrics]:
        """As `learn`, for the turn of a role whose parameters that learn are `learning`."""
        if turn.decides is None:
            raise UsageError(f"run.plan.graph: the losses of {turn.role} may differ from step to step; set it to false")
        inputs = _tensors(batch)
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        key = (turn.role, turn.first, turn.decides(batch, step), shapes)
        if key not in self._seen:
            self._seen.add(key)
            return self.learn(turn, cast, batch, step, passes, plan)
        before = [p.grad for p in learning]
        if key not in self._made:
            for p in learning:
                p.grad = None
            self._made[key] = self._record(turn, cast, batch, step, passes, plan, learning)
        made = self._made[key]
        for name, tensor in inputs.items():
            made.inputs[name].copy_(tensor)
        made.graph.replay()
        for p, grad, old in zip(learning, made.gradients, before, strict=True):
            if grad is not None and passes > 1:  # the next pass overwrites it
                p.grad = grad.clone() if old is None else old.add_(grad)
            else:
                p.grad = grad
        return made.loss, made.metrics

    def _record(
        self, turn: Turn, cast: Cast, batch: Batch, step: int, passes: int, plan: Plan, learning: Sequence[Tensor]
    ) -> "_Recorded":
        inputs = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # an autograd graph of before that is kept alive by a cycle would spoil the recording
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, metrics = self.learn(turn, cast, _with(batch, inputs), step, passes, plan)
        return _Recorded(graph, inputs, loss, metrics, [p.grad for p in learning])


@dataclass
class _Recorded:
    graph: Any
    inputs: dict[str, Tensor]
    loss: Tensor
    metrics: Metrics
    gradients: list[Tensor | None]


def check(device: torch.device, processes: int) -> None:
    """Raises UsageError where turns cannot be graphs."""
    if device.type != "cuda" or processes > 1:
        where = f"{processes} processes" if processes > 1 else f"the {device.type}"
        raise UsageError(f"run.plan.graph is for one process with one CUDA device, not for {where}; set it to false")


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch, by a name of their own."""
    found = {"video": batch.video, "key": batch.keys.key, "place": batch.keys.place}
    if batch.trajectory is not None:
        found["trajectory"] = batch.trajectory
    found |= {f"cond.{name}": tensor for name, tensor in batch.cond.items()}
    return found | {f"uncond.{name}": tensor for name, tensor in batch.uncond.items()}


def _with(batch: Batch, tensors: dict[str, Tensor]) -> Batch:
    """The batch with these in the place of its own."""
    return replace(
        batch,
        video=tensors["video"],
        keys=replace(batch.keys, key=tensors["key"], place=tensors["place"]),
        cond={name: tensors[f"cond.{name}"] for name in batch.cond},
        uncond={name: tensors[f"uncond.{name}"] for name in batch.uncond},
        trajectory=tensors.get("trajectory"),
    )
