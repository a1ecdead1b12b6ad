"""Denoising: the network learns to tell clean data from noise at random times (arXiv 2006.11239, 2210.02747).

Supervised fine-tuning of any diffusion or flow model, of latents or of tokens: schedule and prediction belong to the
weights. Of a causal model it is diffusion forcing with times per chunk (arXiv 2407.01392), or teacher forcing with a
`context` of clean frames.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.times import Times, Uniform, shares_strata
from kinema.diffusion.weighting import Even, Weighting
from kinema.errors import UsageError
from kinema.objectives.monitors import by_quartile
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing
from kinema.seeds import Draw


@dataclass(frozen=True)
class Denoising(Objective):
    """loss = mean over videos and frames of weighting(t) · error(t), with t from `times`.

    context  a causal model sees earlier chunks not as noisy as they are but at times of this law, with noise of their
             own, and is told these times: `Below(0)` shows them clean, `PerChunk(Below(a))` slightly noisy
    offset   the level of offset noise: one number per video, added to all of its noise
    """

    student: Role
    times: Times = field(default_factory=Uniform)
    weighting: Weighting = field(default_factory=Even)
    context: Times | None = None
    offset: float = 0.0

    def turns(self) -> tuple[Turn, ...]:
        decides = None if shares_strata(self.times, self.context) else nothing
        return (Turn("student", self.loss, decides=decides),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        student, draw = cast["student"], batch.keys.fold("student")
        t = self.times.sample(student.path, batch.video.shape[1], draw.fold("time"))
        _check(self.weighting, student)
        seen = self._context(student, batch.video, draw.fold("context"))
        offset = {"offset": self.offset} if self.offset else {}  # only latents have it
        error = student.loss(batch.video, t, batch.cond, draw.fold("noise"), **offset, **seen)
        weight = self.weighting(student.path, student.predicts, t)
        return (weight * error).mean(), by_quartile("error", error.detach(), t)

    def _context(self, student: Any, video: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The clean half of teacher forcing, as arguments of the backbone."""
        if self.context is None:
            return {}
        t = self.context.sample(student.path, video.shape[1], draw.fold("time"))
        clean = student.path.corrupt(video, t, draw.fold("noise"))
        return {"clean": clean, "clean_timestep": student.path.schedule.timestep(t)}


def _check(weighting: Weighting, student: Any) -> None:
    if isinstance(student, TokenDenoiser) and weighting != Even():
        raise UsageError(f"weighting {weighting} is of latents; tokens have cross-entropies, which count evenly")
