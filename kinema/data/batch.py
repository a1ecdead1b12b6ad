"""What one micro-batch is: clean videos, their conditions and the keys of all randomness about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kinema.seeds import Keys


@dataclass(frozen=True, eq=False)
class Batch:
    """`video` is `[B, T, …]` (latents, pixels or tokens); `cond` and `uncond` are the backbone's keyword arguments.

    Text dropout has already happened in `cond`: objectives never hear of it. `keys` are the draws of these samples.
    Of prompts alone the video is `[B, 0]`. `trajectory` `[B, K + 1, T, …]` are a teacher's states from noise to data.
    `micro` counts the passes that one optimizer step accumulates; it is the same on all ranks. `told` are numbers about
    the data that are logged as `data/…`.
    """

    video: Tensor
    keys: Keys
    cond: dict[str, Tensor] = field(default_factory=dict)
    uncond: dict[str, Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    trajectory: Tensor | None = None
    micro: int = 0
    told: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.video)


class Source(Protocol):
    """An opened dataset: sample n of the run is a pure function of (seed, n), so there is no state to save."""

    def __call__(self, samples: Sequence[int], keys: Keys) -> Batch: ...


class Data(Protocol):
    """The description of a dataset (a frozen dataclass, part of the Run). `open` loads what reading it needs."""

    def open(self, seed: int, device: torch.device) -> Source: ...
