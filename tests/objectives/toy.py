"""A world of eight words: small enough to train, distil and enumerate in a minute or two, rich enough to lose modes in.

A sample is one of 8 code words of 8 tokens out of 16, on a metric path of random vectors. A good student draws code
words (valid), and all of them (modes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import guided
from kinema.diffusion.times import shifted
from kinema.diffusion.token_path import MetricPath
from kinema.diffusion.token_sampling import Jumps
from kinema.models.ursa.transformer import URSASize, URSATransformer, initial_weights
from kinema.objectives.dimo import Dimo

K, N, WORDS = 16, 8, 8
SIZE = URSASize(
    dim=48, ffn_dim=96, heads=3, kv_heads=3, layers=2, codes=K, words=2, bov=1, head_dim=16, theta=100.0, text_len=1
)


@dataclass
class Toy:
    """The code words `[8, N]`, the path, and a teacher trained on them."""

    words: Tensor
    path: MetricPath
    teacher: URSATransformer

    def reading(self, module: URSATransformer) -> TokenDenoiser:
        return TokenDenoiser(module, module.lm_head, self.path)

    def copy(self) -> URSATransformer:
        module = URSATransformer(SIZE)
        module.load_state_dict(self.teacher.state_dict())
        return module

    def score(self, codes: Tensor) -> tuple[float, int, float]:
        """The share of `codes` `[B, 1, 1, N]` that are code words, how many words occur, and their entropy / ln 8."""
        hit = (codes.view(-1, 1, N) == self.words).all(-1)
        share = hit.float().sum(0) / hit.sum().clamp(min=1)
        modes = int((share > 0.02).sum())
        return (
            hit.any(1).float().mean().item(),
            modes,
            (-torch.special.xlogy(share, share).sum() / torch.tensor(8.0).log()).item(),
        )

    @torch.no_grad()
    def samples(self, module: URSATransformer, steps: int, count: int = 2048, integral="exact") -> Tensor:
        draw, reading = seeds.keys(5, "samples", range(count)), self.reading(module)
        x = self.path.prior((count, 1, 1, N), draw.fold("prior"))
        denoise = guided(reading, text(count), text(count), 1.0)
        return Jumps(integral=integral)(denoise, self.path, x, shifted(steps, 1.0), draw)


def text(count: int) -> dict[str, Tensor]:
    return {"text": torch.zeros(count, 1, dtype=torch.int64)}


def build(seed: int = 0, steps: int = 2500, batch: int = 128) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(K, 4, generator=generator)
    toy = Toy(torch.randint(K, (WORDS, N), generator=generator), MetricPath(book, 0.9, 4.0), URSATransformer(SIZE))
    toy.teacher.load_state_dict(dict(initial_weights(toy.teacher, seed)))
    optimizer = torch.optim.AdamW(toy.teacher.parameters(), 1e-3)
    for step in range(steps):
        draw = seeds.keys(seed, "teacher", range(step * batch, (step + 1) * batch))
        x0 = toy.words[draw.fold("word").integers(WORDS)][:, None, None]
        t = (1 - 0.999 * draw.fold("t").uniform(1)).clamp(min=1e-3)
        loss = toy.reading(toy.teacher).loss(x0, t, text(batch), draw).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps - step) / (0.3 * steps))
        optimizer.step()
    toy.teacher.requires_grad_(False)
    return toy


def distil(toy: Toy, objective: Dimo, steps: int, batch: int = 128, seed: int = 0) -> URSATransformer:
    """The average of a student trained by `objective`'s turns."""
    roles = {"student": toy.copy(), "critic": toy.copy()}
    rates = {"student": 2e-4, "critic": 4e-4}
    optimizers = {name: torch.optim.Adam(module.parameters(), rates[name]) for name, module in roles.items()}
    cast = {name: toy.reading(module) for name, module in {**roles, "teacher": toy.teacher}.items()}
    memory = objective.memory()
    average = toy.copy().requires_grad_(False)
    for step in range(steps):
        for turn in objective.turns():
            if not turn.due(step):
                continue
            keys = seeds.keys(seed, "train", range(step * batch, (step + 1) * batch))
            made = Batch(torch.zeros(batch, 1, 1, N, dtype=torch.int64), keys, text(batch), text(batch))
            loss, _ = turn.loss({**cast, "memory": memory}, made, step)
            optimizers[turn.role].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(roles[turn.role].parameters(), 1.0)
            optimizers[turn.role].step()
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), roles["student"].parameters(), strict=True):
                ours.lerp_(theirs, 1 - keep)
    return average
