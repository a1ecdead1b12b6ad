"""Random latents and texts: all that a measurement of speed or memory needs of data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.seeds import Keys


@dataclass(frozen=True)
class Noise:
    """Sample n is a standard normal video `shape` (T, C, h, w) and text `[rows, width]`, functions of (seed, n)."""

    shape: tuple[int, int, int, int] = (21, 16, 60, 104)
    rows: int = 512
    width: int = 4096

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "noise data", list(samples), device=device)
            text = draw.fold("text").normal(self.rows, self.width)
            return Batch(draw.fold("video").normal(*self.shape), keys, {"text": text}, {"text": torch.zeros_like(text)})

        return source
