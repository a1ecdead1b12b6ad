"""The cast of a run on random weights, and what takes turns with it as the trainer does: nothing is logged or saved."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from kinema.bench.measure import random_weights
from kinema.data.batch import Batch
from kinema.models.protocols import Spec
from kinema.objectives.objective import Turn
from kinema.run import Run
from kinema.training.actor import Actor, backward, micro_batch
from kinema.training.world import World

Span = Callable[[str], AbstractContextManager[Any]]


class Stage:
    """`span` surrounds the part of a turn that it is told the name of: "optimizer"."""

    def __init__(self, run: Run, device: torch.device, span: Span = lambda name: nullcontext()):
        self.run, self.device, self.span = run, device, span
        self.world = World.of(run.plan, device)
        self.passes, self.samples = run.passes(self.world.copies)
        roles = run.objective.roles()
        self.actors = {name: Actor(name, role, run.plan, self.world, _fill) for name, role in roles.items()}
        self.cast: dict[str, Any] = {name: actor.reading for name, actor in self.actors.items()}
        self.cast["memory"] = {name: tensor.to(device) for name, tensor in run.objective.memory().items()}
        self.source = run.data.open(run.seed, device)

    def take(self, turn: Turn, step: int) -> None:
        """One turn."""
        actor = self.actors[turn.role]
        for other in self.actors.values():
            other.moves(other is actor)
        for micro in range(self.passes):
            backward(turn, self.cast, self.batch(step, micro), step, self.passes, self.run.plan)
        with self.span("optimizer"):
            actor.update(step, turn.number(step), turn.betas, turn.first)

    def batch(self, step: int, micro: int) -> Batch:
        return micro_batch(self.run, self.source, self.world, step, micro)


def _fill(spec: Spec, module: nn.Module, device: torch.device) -> nn.Module:
    return random_weights(module, device)
