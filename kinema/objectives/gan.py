"""An adversarial game on rollouts: the critic tells the student's noisy videos from real ones (Self Forcing,
arXiv 2506.08009, appendix; relativistic and with finite-difference penalties as in arXiv 2501.05441 and 2501.08316)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import UsageError
from kinema.models.discriminator import Discriminator
from kinema.objectives.distribution_matching import DistributionMatching, Sample
from kinema.objectives.objective import Cast, Metrics, Role, Turn


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """softplus losses of the critic's logits at x_t; real and fake videos share t and, for the critic, the noise.

    g_weight, d_weight  of the student's and of the critic's loss
    relativistic        a video is judged beside a real one: D(fake) - D(real)
    r1, r2              weights of the penalties on how fast the logits change around real and around fake videos …
    r_step              … over noise of this size
    """

    g_weight: float = 0.01
    d_weight: float = 0.01
    relativistic: bool = False
    r1: float = 0.0
    r2: float = 0.0
    r_step: float = 0.01

    def check(self, roles: dict[str, Role]) -> None:
        if not isinstance(roles["critic"].spec, Discriminator):
            raise UsageError(
                "an adversarial critic needs a classifier branch; make its spec Discriminator(trunk, branch)"
            )

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        judge, t, cond = cast["critic"], sample.t, sample.batch.cond
        x_t, real = sample.seen(judge.path), None
        if self.relativistic:
            with torch.no_grad():  # real videos have noise of their own here
                other = sample.draw.fold("real").normal(*x_t.shape[1:])
                real = judge.logits(judge.path.mix(_real(sample), other, t), t, cond)
        fake = judge.logits(x_t, t, cond)
        return self.g_weight * generator_loss(fake, real), {"logits": fake.detach().mean()}

    def critic_loss(self, cast: Cast, sample: Sample, only_branch: bool = False) -> tuple[Tensor, Metrics]:
        judge, path = partial(cast["critic"].logits, detach=only_branch), cast["critic"].path
        fake_t, real_t = sample.seen(path), sample.seen(path, _real(sample))

        def logits(*noisy: Tensor) -> tuple[Tensor, ...]:
            n = len(noisy)
            cond = {name: torch.cat([tensor] * n) for name, tensor in sample.batch.cond.items()}
            return judge(torch.cat(noisy), torch.cat([sample.t] * n), cond).chunk(n)

        fake, real = logits(fake_t, real_t)
        loss = self.d_weight * discriminator_loss(fake, real, self.relativistic)
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        metrics = {"fake_logits": fake.mean(), "real_logits": real.mean(), "told_apart": right}
        for name, weight, before, x_t in (("r1", self.r1, real, real_t), ("r2", self.r2, fake, fake_t)):
            if weight:
                step = sample.draw.fold(name).normal(*x_t.shape[1:])
                (after,) = logits(x_t + self.r_step * step)
                metrics[name] = steepness(before, after, self.r_step)
                loss = loss + 0.5 * weight * metrics[name]
        return loss, {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class GAN(Adversarial, DistributionMatching):
    """Student and a critic with a classifier branch; needs videos, and a teacher only if a further term does.

    branch_warmup  for so many steps only the critic learns, and of it only the branch, with `warmup_betas`; then its
                   optimizer starts anew. 0: none
    """

    teacher: Role | None = None
    branch_warmup: int = 0
    warmup_betas: tuple[float, float] = (0.9, 0.999)

    def turns(self) -> tuple[Turn, ...]:
        student, critic = super().turns()
        if not self.branch_warmup:
            return student, critic
        losses: list[Callable] = [partial(self.critic_loss, only_branch=True)]
        warming = partial(self._critic_turn, {}, losses)
        return (
            Turn("critic", warming, until=self.branch_warmup, betas=self.warmup_betas, decides=critic.decides),
            student,
            replace(critic, first=self.branch_warmup, fresh=True),
        )

    @property
    def student_first(self) -> int:
        return self.branch_warmup


def generator_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """mean softplus(-fake), or with `real` softplus(-(fake - real)), of logits `[B, C]` paired by place."""
    return F.softplus(-(fake if real is None else fake - real)).mean()


def discriminator_loss(fake: Tensor, real: Tensor, relativistic: bool) -> Tensor:
    """mean softplus(-real) + mean softplus(fake), or softplus(-(real - fake))."""
    return F.softplus(-(real - fake)).mean() if relativistic else F.softplus(-real).mean() + F.softplus(fake).mean()


def steepness(before: Tensor, after: Tensor, step: float) -> Tensor:
    """mean ((D(x + step·ε) - D(x)) / step)²: R1 or R2 by a finite difference (arXiv 2501.08316, eq. 4)."""
    return ((after - before) / step).square().mean()


def _real(sample: Sample) -> Tensor:
    real = sample.batch.video
    if real.shape != sample.video.shape:
        raise UsageError(
            f"a GAN compares videos of {list(sample.video.shape[1:])} with real ones, but the data has "
            f"{list(real.shape[1:])}; use Latents of that shape"
        )
    return real
