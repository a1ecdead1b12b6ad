"""Regression on a teacher's ODE: a causal student learns to jump from stored states to the end of their trajectory
(the initialisation of CausVid, arXiv 2412.07772, section 4.3, and of Self Forcing)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.times import index_per_chunk, listed
from kinema.errors import UsageError
from kinema.models.protocols import CausalSpec
from kinema.objectives.distribution_matching import Sample
from kinema.objectives.monitors import by_quartile
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing
from kinema.seeds import Draw


@dataclass(frozen=True, kw_only=True)
class OdeRegression(Objective):
    """loss = mean over frames that are not clean of (x̂0 - y_K)², x̂0 from states y_k at the student's steps.

    image          frame 0 is given clean
    clean_context  earlier chunks are seen at the trajectory's end: for pairs of a causal teacher, made on clean context
    """

    student: Role
    image: bool = False
    clean_context: bool = False

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        spec: CausalSpec = self.student.spec  # type: ignore[assignment]
        draw = batch.keys.fold("student")
        return regress(cast["student"], batch, spec, draw, self.image, self.clean_context)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A term that keeps a student of rollouts near a teacher's trajectories, which the data must have."""

    student: CausalSpec
    weight: float = 0.25

    def check(self, roles: dict[str, Role]) -> None:
        pass

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        loss, _ = regress(cast["student"], sample.batch, self.student, sample.draw.fold("anchor"))
        return self.weight * loss, {"anchor": loss.detach()}

    def critic_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        return torch.zeros((), device=sample.video.device), {}


def regress(
    student: Any, batch: Batch, spec: CausalSpec, draw: Draw, image: bool = False, clean_context: bool = False
) -> tuple[Tensor, Metrics]:
    """The loss with a state drawn for each chunk."""
    y, k = batch.trajectory, len(spec.steps_at)
    if y is None or y.shape[1] != k + 1:
        there = "none" if y is None else y.shape[1]
        raise UsageError(f"{k} steps need trajectories of {k + 1} states, but the data has {there}; use OdePairs")
    index = index_per_chunk(k, spec.chunks.lengths(y.shape[2]), draw)
    if image:
        index = torch.cat([torch.full_like(index[:, :1], k), index[:, 1:]], dim=1)
    x_t, t = states_at(y, index, (*spec.steps_at, 0.0))
    estimate = student(x_t, t, batch.cond, **({"clean": y[:, -1]} if clean_context else {}))
    error, loss = regression(estimate, y[:, -1], t)
    return loss, by_quartile("error", error.detach(), t)


def states_at(y: Tensor, index: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """States `[B, T, …]` of trajectories `[B, K + 1, T, …]` at index `[B, T]`, and their times `[B, T]`."""
    pick = index.reshape(len(y), 1, -1, *[1] * (y.ndim - 3)).expand(-1, -1, -1, *y.shape[3:])
    return y.gather(1, pick)[:, 0], listed(tuple(times), y.device)[index]


def regression(estimate: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each frame `[B, T]`, and its mean over the frames whose time is not 0."""
    error, noisy = (estimate - end).square().flatten(2).mean(2), (t > 0).float()
    return error, (error * noisy).sum() / noisy.sum().clamp(min=1)
