"""The condition of image-to-video training: a clip's first frame, disturbed so that a video need not copy its flaws."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.seeds import Keys


@dataclass(frozen=True)
class FirstFrame:
    """How a first frame becomes a condition; in sampling it is neither noised nor dropped.

    noise  mean and deviation of ln σ of the Gaussian noise on its pixels in [-1, 1], σ drawn for each sample
    drop   probability, for each sample, that the condition is zero
    """

    noise: tuple[float, float] = (-3.0, 0.5)
    drop: float = 0.05

    def __call__(self, codec: Any, image: Tensor, frames: int, keys: Keys) -> Tensor:
        """The condition `[B, T, C, h, w]`, T = `frames`, of images `[B, 3, H, W]` in [-1, 1] that `codec` encodes."""
        mean, deviation = self.noise
        sigma = (mean + deviation * keys.fold("image_sigma").normal(1, 1, 1)).exp()
        noisy = image + sigma * keys.fold("image_noise").normal(*image.shape[1:])
        dropped = keys.fold("image_drop").uniform(1, 1, 1, 1) < self.drop
        with torch.no_grad():
            latents = codec.image_latents(noisy, frames, keys.fold("image_posterior"))
        return torch.where(dropped, 0.0, latents)
