"""Score identity distillation (arXiv 2404.04057; with guidance, arXiv 2406.01561): DMD's difference of scores, times
how the student's video differs from the teacher's estimate, with gradients through both networks."""

from dataclasses import dataclass

from torch import Tensor

from kinema.diffusion.guidance import guided, in_parts
from kinema.errors import UsageError
from kinema.objectives import monitors
from kinema.objectives.distribution_matching import DistributionMatching, Sample, distance, follow
from kinema.objectives.objective import Cast, Metrics, Role


@dataclass(frozen=True, kw_only=True)
class ScoreIdentity:
    """loss = mean of (f_real - f_fake) · ((f_real - x) - alpha·(f_real - f_fake)) / mean|x - f_real|, of scored frames.

    sid_alpha  alpha; 1 is the paper's best, and gives (f_real - f_fake) · (f_fake - x)
    """

    guidance: float = 4.0
    critic_guidance: float = 1.0
    sid_alpha: float = 1.0
    batched: bool = False

    def check(self, roles: dict[str, Role]) -> None:
        if "teacher" not in roles:
            raise UsageError("the identity of scores needs a teacher; set objective.teacher")

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        teacher, critic, batch = cast["teacher"], cast["critic"], sample.batch
        x, t, text = sample.video, sample.t, (batch.cond, batch.uncond)
        x_t = sample.seen(teacher.path)
        fake = guided(critic, *text, self.critic_guidance, self.batched)(x_t, t)
        real, without, with_ = in_parts(teacher, x_t, t, *text, self.guidance, self.batched)
        loss = identity(x, real, fake, self.sid_alpha)[:, sample.skip :].mean()
        return loss, monitors.of_scores(x, t, real, fake, without, with_, self.guidance != 1)

    def critic_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        return follow(cast, sample)


@dataclass(frozen=True, kw_only=True)
class SiD(ScoreIdentity, DistributionMatching):
    """Student, frozen teacher, and a critic that follows the student. Learns from prompts alone."""

    teacher: Role


def identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """The loss of each number of x (arXiv 2404.04057, eq. 23), each sample divided by its mean|x - real|."""
    difference = real - fake
    return difference * ((real - x) - alpha * difference) / distance(x, real)
