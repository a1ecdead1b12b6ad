"""Causal consistency distillation: a few-step causal student without trajectories, from a causal teacher and data.

The student's estimate is made the same along the teacher's ODE (arXiv 2303.01469; guided, as in 2310.04378; its target
is the student itself, 2310.14189). Both see earlier chunks clean, so an ODE belongs to a chunk and its context, and has
one end. Trajectories of a bidirectional teacher have not: what a frame becomes there depends on the noise of later
frames, which a causal student cannot see, and regression on them (`ode_regression.py`) learns averages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.guidance import guided
from kinema.diffusion.times import index_per_chunk, listed
from kinema.models.protocols import CausalSpec
from kinema.objectives.monitors import by_quartile
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(Objective):
    """loss = mean of √((x̂(x_t, t) - sg x̂(x_s, s))² + c²) - c, x_s one step of the teacher's guided ODE below x_t.

    The time t is drawn for each chunk from the student's `grid` times, s is the next one; at s = 0 the target is x_s.
    huber  c, of which errors are squared below and absolute beyond (per frame, times the root of its numbers)
    """

    student: Role
    teacher: Role
    grid: int = 48
    guidance: float = 4.0
    huber: float = 0.03
    batched: bool = False

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        student, teacher, video = cast["student"], cast["teacher"], batch.video
        spec: CausalSpec = self.student.spec  # type: ignore[assignment]
        draw = batch.keys.fold("student")
        times = listed((*self.student.spec.times(self.grid), 0.0), video.device)  # type: ignore[attr-defined]
        index = index_per_chunk(self.grid, spec.chunks.lengths(video.shape[1]), draw.fold("time"))
        t, s = times[index], times[index + 1]
        x_t = student.path.corrupt(video, t, draw.fold("noise"))

        def beside_clean(denoiser):
            def denoise(x, time, cond):
                return denoiser(x, time, cond, clean=video.repeat(len(x) // len(video), *[1] * (video.ndim - 1)))

            return denoise

        with torch.no_grad():
            towards = guided(beside_clean(teacher), batch.cond, batch.uncond, self.guidance, self.batched)
            x_s = teacher.path.step(x_t, t, s, towards(x_t, t))
            end = (s == 0).reshape(*s.shape, *[1] * (x_s.ndim - 2))
            target = torch.where(end, x_s, beside_clean(student)(x_s, s, batch.cond))
        square = (beside_clean(student)(x_t, t, batch.cond) - target).square().flatten(2)
        c = self.huber * square.shape[2] ** 0.5
        error = (square.sum(2) + c**2).sqrt() - c
        return error.mean(), by_quartile("error", square.detach().mean(2), t)
