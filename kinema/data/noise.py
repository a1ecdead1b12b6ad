"""Random latents, codes and texts: all that a measurement of speed or memory needs of data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.seeds import Keys


@dataclass(frozen=True)
class Noise:
    """Sample n is a standard normal video `shape` (T, C, h, w) and text `[rows, width]`, functions of (seed, n).

    segments  of a long video, each of which has such a text; 0 is a video with one text
    """

    shape: tuple[int, int, int, int] = (21, 16, 60, 104)
    rows: int = 512
    width: int = 4096
    segments: int = 0

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "noise data", list(samples), device=device)
            text = draw.fold("text").normal(*([self.segments] if self.segments else []), self.rows, self.width)
            return Batch(draw.fold("video").normal(*self.shape), keys, {"text": text}, {"text": torch.zeros_like(text)})

        return source


@dataclass(frozen=True)
class NoiseCodes:
    """Sample n is uniform codes `shape` (T, h, w) and text ids `[length]`, functions of (seed, n)."""

    shape: tuple[int, int, int] = (5, 32, 32)
    codes: int = 64_000
    words: int = 151_669
    length: int = 320

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "noise data", list(samples), device=device)
            text = draw.fold("text").integers(self.words, self.length)
            video = draw.fold("video").integers(self.codes, *self.shape)
            return Batch(video, keys, {"text": text}, {"text": torch.zeros_like(text)})

        return source
