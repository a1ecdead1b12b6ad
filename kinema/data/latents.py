"""Encoded videos with their prompts, prepared once: what causal fine-tuning learns from and what a critic compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.pool import clip_of
from kinema.data.prompts import Rows, prompted
from kinema.data.shards import Shards
from kinema.errors import UserError
from kinema.seeds import Keys

KIND = "latents"


@dataclass(frozen=True)
class Latents:
    """Batches of latents `[B, T, C, h, w]`, normalised, with their prompts, from a folder of prepared shards.

    path      its items have `clean` `[T, C, h, w]` and `text` `[n, D]`
    dropout   a prompt is replaced by the unconditional text with this probability
    rows      the length embeddings are padded to; 0: the longest of the batch
    resident  keep everything on the device once it is read; needs `rows`
    """

    path: str
    dropout: float = 0.1
    rows: int = 0
    resident: bool = False

    def open(self, seed: int, device: torch.device) -> Source:
        shards = Shards(Path(self.path), KIND)
        nothing = shards.unconditional()
        read = Rows(shards, ("text", "clean"), self.rows, self.resident, device)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            numbers = [clip_of(seed, n, len(shards), 1) for n in samples]
            rows, captions = read(numbers), tuple(shards.prompt(number) for number in numbers)
            video = stacked(rows["clean"], numbers, self.path)
            batch = prompted(keys, rows["text"], nothing, self.rows, captions, self.dropout)
            return replace(batch, video=video.to(device, torch.float32, non_blocking=True))

        return source


def stacked(videos: Tensor | Sequence[Tensor], numbers: Sequence[int], path: str) -> Tensor:
    """Videos of one batch, which must be of one shape."""
    if isinstance(videos, Tensor):
        return videos
    for number, video in zip(numbers, videos, strict=True):
        if video.shape != videos[0].shape:
            raise UserError(
                f"items {numbers[0]} and {number} of {path} are {list(videos[0].shape)} and {list(video.shape)}; a "
                f"batch has one shape, so prepare them in folders of their own"
            )
    return torch.stack(list(videos))
