"""The smallest networks and runs there are: two layers, on latents drawn from their number."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.models.cogvideox.transformer import CogVideoXSize
from kinema.models.ursa.spec import URSA, Metric
from kinema.models.ursa.transformer import URSASize
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.dimo import Dimo
from kinema.objectives.objective import Cast, Objective, Role, Turn
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import Keys

SIZE = WanSize(
    dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)
COGVIDEOX = CogVideoXSize(
    heads=4,
    layers=2,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    time_dim=16,
    text_dim=8,
    text_tokens=3,
    grid=(3, 4, 4),
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
class Stories:
    """Latents `[2 · segments + 1, 4, side, side]` of long videos, and texts `[segments, 3, 8]` of 1 to 3 valid tokens,
    each a function of the sample's number."""

    segments: int = 2
    side: int = 4

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "stories", list(samples), device=device)
            text = draw.fold("text").normal(self.segments, 3, 8)
            words = 1 + draw.fold("words").integers(3, self.segments)
            valid = torch.arange(3, device=device) < words[..., None]
            video = draw.fold("video").normal(2 * self.segments + 1, 4, self.side, self.side)
            return Batch(video, keys, {"text": text, "valid": valid})

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


@dataclass(frozen=True)
class Words:
    """Tokens `[2, 2, 3]` and texts `[4]`, each a function of the sample's number."""

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "words", list(samples), device=device)
            text = {name: {"text": draw.fold(name).integers(20, 4)} for name in ("cond", "uncond")}
            return Batch(draw.fold("video").integers(12, 2, 2, 3), keys, text["cond"], text["uncond"])

        return source


def token_game(kind: type[Dimo] = Dimo, **changes) -> Run:
    """A run of Di[M]O, or of its variant, with accumulation, on networks that differ."""
    size = URSASize(
        dim=32, ffn_dim=48, heads=4, kv_heads=2, layers=2, codes=12, words=20, bov=19, head_dim=16, text_len=4
    )
    specs = [URSA(Metric((4, 3), 0.9, 3.0), size, seed=seed) for seed in range(3)]
    optim = Optim(lr=1e-2, clip=0.5, train="^(?!embed_tokens)")
    cast = kind(
        student=Role(specs[0], optim, Ema(decay=0.9)),
        teacher=Role(specs[1]),
        critic=Role(specs[2], Optim(lr=2e-2)),
        critic_first=1,
        switch=2,
        entropy=0.01,
        kd=0.1,
    )
    return run(**{"objective": cast, "data": Words(), "micro_batch": 1, "steps": 6} | changes)


def tiny(steps: int = 8, slowly: float = 0.0) -> Run:
    """A recipe: `kinema train world:tiny`."""
    return run(steps=steps, data=Waves(slowly=slowly), save_every=4)


def run(**changes) -> Run:
    role = Role(Wan(size=SIZE, seed=1), Optim(lr=1e-2, warmup=2, anneal=20), Ema(decay=0.9))
    return Run(
        **{"objective": Denoising(role), "data": Waves(), "steps": 8, "batch_size": 4, "log_every": 2, "save_every": 3}
        | changes
    )
