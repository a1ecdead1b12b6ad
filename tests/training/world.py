"""The smallest runs there are, for tests of the trainer: two-layer Wan networks on latents drawn from their number."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Cast, Objective, Role, Turn
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import Keys

SIZE = WanSize(
    dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)


@dataclass(frozen=True)
class Waves:
    """Latents `[3, 4, 4, 4]` and a text `[2, 8]`, each a function of the sample's number.

    From sample `broken` on they are NaN; reading takes `slowly` seconds.
    """

    broken: int | None = None
    slowly: float = 0.0

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            time.sleep(self.slowly)
            draw = seeds.keys(seed, "waves", list(samples), device=device)
            video = draw.fold("video").normal(3, 4, 4, 4)
            if self.broken is not None and samples[0] >= self.broken:
                video = video * torch.nan
            return Batch(video, keys, {"text": draw.fold("text").normal(2, 8)})

        return source


@dataclass(frozen=True)
class Game(Objective):
    """Student, critic and frozen teacher as distillation has them: passes without gradient between those with one, and
    gradients through networks whose parameters have none."""

    student: Role
    critic: Role
    teacher: Role

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.student_loss, every=2), Turn("critic", self.critic_loss))

    def student_loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, draw = self._made(cast, batch), batch.keys.fold("t").uniform(1), batch.keys.fold("student")
        x_t = cast["student"].path.corrupt(x, t, draw)
        with torch.no_grad():
            fake = cast["critic"](x_t, t, batch.cond)
        real = cast["teacher"](x_t, t, batch.cond)  # graded through the teacher, as SiD does
        return ((x - fake) * (x - real)).mean(), {}

    def critic_loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self._made(cast, batch)
        t = batch.keys.fold("critic_t").uniform(1)
        return cast["critic"].loss(x, t, batch.cond, batch.keys.fold("critic")).mean(), {}

    @staticmethod
    def _made(cast: Cast, batch: Batch) -> Tensor:
        noise = batch.keys.fold("start").normal(*batch.video.shape[1:])
        return cast["student"](noise, torch.ones(len(noise), 1, device=noise.device), batch.cond)


def game(teacher: Role | None = None, **changes) -> Run:
    """A run of `Game`, with accumulation."""
    student = Role(Wan(size=SIZE, seed=1), Optim(lr=1e-2, clip=0.5), Ema(decay=0.9))
    critic = Role(Wan(size=SIZE, seed=2), Optim(lr=2e-2))
    cast = Game(student, critic, teacher or Role(Wan(size=SIZE, seed=3)))
    return run(**{"objective": cast, "micro_batch": 1, "steps": 6} | changes)


def tiny(steps: int = 8, slowly: float = 0.0) -> Run:
    """A recipe: `kinema train world:tiny`."""
    return run(steps=steps, data=Waves(slowly=slowly), save_every=4)


def run(**changes) -> Run:
    role = Role(Wan(size=SIZE, seed=1), Optim(lr=1e-2, warmup=2, anneal=20), Ema(decay=0.9))
    return Run(
        **{"objective": Denoising(role), "data": Waves(), "steps": 8, "batch_size": 4, "log_every": 2, "save_every": 3}
        | changes
    )
