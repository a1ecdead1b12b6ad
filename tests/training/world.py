"""The smallest run there is, for tests of the trainer: a two-layer Wan network on latents drawn from their sample
number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import Keys

SIZE = WanSize(
    dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)


@dataclass(frozen=True)
class Waves:
    """Latents `[3, 4, 4, 4]` and a text `[2, 8]`, each a function of the sample's number; `broken` gives NaN from
    then on."""

    broken: int | None = None

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "waves", list(samples), device=device)
            video = draw.fold("video").normal(3, 4, 4, 4)
            if self.broken is not None and samples[0] >= self.broken:
                video = video * torch.nan
            return Batch(video, keys, {"text": draw.fold("text").normal(2, 8)})

        return source


def run(**changes) -> Run:
    role = Role(Wan(size=SIZE, seed=1), Optim(lr=1e-2, warmup=2, anneal=20), Ema(decay=0.9))
    return Run(
        **{"objective": Denoising(role), "data": Waves(), "steps": 8, "batch_size": 4, "log_every": 2, "save_every": 3}
        | changes
    )
