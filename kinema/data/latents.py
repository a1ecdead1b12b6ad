"""Encoded videos with their prompts, prepared once: what causal fine-tuning learns from and what a critic compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.pool import clip_of
from kinema.data.prepared import Prepared, Visits
from kinema.data.prompts import Rows, prompted
from kinema.data.shards import Shards
from kinema.data.store import MANIFEST
from kinema.errors import UsageError, UserError
from kinema.seeds import Keys

KIND = "latents"


@dataclass(frozen=True)
class Latents:
    """Batches of latents `[B, T, C, h, w]`, normalised, with their prompts, from a folder of prepared data.

    path      of `kinema prepare --for wan`, or of shards whose items have `clean` `[T, C, h, w]` and `text` `[n, D]`
    dropout   a prompt is replaced by the unconditional text with this probability
    rows      the length embeddings are padded to; 0: the longest of the batch
    resident  of shards: keep everything on the device once it is read; needs `rows`
    mix       of prepared videos: how many buckets share an optimizer step
    """

    path: str
    dropout: float = 0.1
    rows: int = 0
    resident: bool = False
    mix: int = 1

    def open(self, seed: int, device: torch.device) -> Source:
        if (Path(self.path) / MANIFEST).exists():
            return self._of_videos(seed, device)
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

    def _of_videos(self, seed: int, device: torch.device) -> Source:
        if self.resident:
            raise UsageError(f"{self.path} holds videos of several shapes, which cannot be resident; set it to false")
        data = Prepared(Path(self.path), ("wan",))
        nothing = data.unconditional()
        visits = Visits(data, seed, ("clean",), self.mix, pinned=device.type == "cuda")

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = visits(samples, keys.count)
            captions = tuple(words["text"] for (words,) in rows.words)
            batch = prompted(keys, [text for (text,) in rows.texts], nothing, self.rows, captions, self.dropout)
            return replace(batch, video=rows.tensors["clean"].to(device, non_blocking=True).float())

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
