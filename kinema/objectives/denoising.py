"""Denoising: the network learns to tell clean data from noise at random times (arXiv 2006.11239, 2210.02747).

Supervised fine-tuning of any diffusion or flow model, whatever its schedule and prediction, of latents or of tokens:
those belong to the weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.times import Times, Uniform
from kinema.diffusion.weighting import Even, Weighting
from kinema.errors import UsageError
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn


@dataclass(frozen=True)
class Denoising(Objective):
    """loss = mean over videos and frames of weighting(t) · error(t), with t from `times`."""

    student: Role
    times: Times = field(default_factory=Uniform)
    weighting: Weighting = field(default_factory=Even)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        student, draw = cast["student"], batch.keys.fold("student")
        t = self.times.sample(student.path, batch.video.shape[1], draw.fold("time"))
        error = student.loss(batch.video, t, batch.cond, draw.fold("noise"))
        _check(self.weighting, student)
        weight = self.weighting(student.path, student.predicts, t)
        return (weight * error).mean(), by_quartile(error.detach(), t)


def _check(weighting: Weighting, student: Any) -> None:
    if isinstance(student, TokenDenoiser) and weighting != Even():
        raise UsageError(f"weighting {weighting} is of latents; tokens have cross-entropies, which count evenly")


def by_quartile(error: Tensor, t: Tensor) -> Metrics:
    """The mean error `[B, T]` where t lies in [0, ¼), [¼, ½), [½, ¾), [¾, 1]; NaN for a quartile nothing fell into."""
    quartile = (t * 4).long().clamp(max=3).expand_as(error)
    nothing = torch.full((), torch.nan, device=error.device)
    means = {}
    for q in range(4):
        here = (quartile == q).float()
        means[f"error_q{q + 1}"] = torch.where(here.sum() > 0, (error * here).sum() / here.sum().clamp(min=1), nothing)
    return means
