"""Distribution matching distillation: the student's videos move along the difference of two scores (DMD,
arXiv 2311.18828, and DMD2, arXiv 2405.14867; on rollouts as in Self Forcing, arXiv 2506.08009).

The teacher is the score of what is wanted, the critic that of what the student makes. `on_data` is CausVid
(arXiv 2412.07772): the student is not rolled out but denoises data once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.guidance import guided, in_parts
from kinema.diffusion.times import index_per_chunk, listed
from kinema.errors import UsageError
from kinema.models.protocols import CausalSpec
from kinema.objectives import monitors
from kinema.objectives.distribution_matching import DistributionMatching, Sample, distance, follow, surrogate
from kinema.objectives.objective import Cast, Metrics, Role
from kinema.seeds import Draw


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """dL/dx = weight · (f_fake - f_real) / mean|x - f_real| / (the count of scored numbers), all float32.

    guidance         w of the teacher, uncond + w·(cond - uncond): what the public code writes as w - 1
    critic_guidance  w of the critic; 1 is none
    batched          the teacher's two passes in one batch
    """

    guidance: float = 4.0
    critic_guidance: float = 1.0
    weight: float = 1.0
    batched: bool = False

    def check(self, roles: dict[str, Role]) -> None:
        if "teacher" not in roles:
            raise UsageError("a difference of scores needs a teacher; set objective.teacher")

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        teacher, critic, batch = cast["teacher"], cast["critic"], sample.batch
        x, t, text = sample.video.detach(), sample.t, (batch.cond, batch.uncond)
        with torch.no_grad():
            x_t = sample.seen(teacher.path, x)
            fake = guided(critic, *text, self.critic_guidance, self.batched)(x_t, t)
            real, without, with_ = in_parts(teacher, x_t, t, *text, self.guidance, self.batched)
            d, lost = direction(x, real, fake)
        loss = self.weight * surrogate(sample.video[:, sample.skip :], d[:, sample.skip :])
        told = monitors.of_scores(x, t, real, fake, without, with_, self.guidance != 1)
        return loss, {**told, "not_finite": lost}

    def critic_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        return follow(cast, sample)


@dataclass(frozen=True, kw_only=True)
class DMD(ScoreDifference, DistributionMatching):
    """Student, frozen teacher, and a critic that follows the student. Learns from prompts alone, unless `on_data`."""

    teacher: Role
    on_data: bool = False

    def make(self, cast: Cast, batch: Batch, draw: Draw) -> tuple[Tensor, int, int | None]:
        return denoised(cast["student"], self._spec, batch, draw) if self.on_data else super().make(cast, batch, draw)


def direction(x: Tensor, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """d = (fake - real) / mean|x - real| of each sample (DMD, eq. 7 and 8), and the share of its numbers that were not
    finite, which are 0 in it."""
    d = (fake - real) / distance(x, real)
    finite = d.isfinite()
    return torch.where(finite, d, 0), 1 - finite.float().mean()


def denoised(student: Any, spec: CausalSpec, batch: Batch, draw: Draw) -> tuple[Tensor, int, None]:
    """Data with noise of a time of `steps_at` for each chunk, denoised by the student in one pass."""
    if batch.video.ndim < 3:
        raise UsageError("DMD on data needs videos, but the data has prompts alone; use Latents")
    lengths, times = spec.chunks.lengths(batch.video.shape[1]), listed(spec.steps_at, batch.video.device)
    t = times[index_per_chunk(len(times), lengths, draw.fold("time"))]
    x_t = student.path.corrupt(batch.video, t, draw.fold("noise"))
    return student(x_t, t, batch.cond), 0, None
