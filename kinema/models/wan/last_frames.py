"""The frames that a video's context may begin with: a Wan latent that begins a sequence stands for one pixel frame."""

from typing import Any

import torch
from torch import Tensor


class LastFrames:
    """Of the latest `keep` latent frames of a growing video, the last pixel frame of each, as the latent of an image.

    codec  an opened Wan VAE; it decodes every latent once, without gradients
    """

    def __init__(self, codec: Any, keep: int):
        self.codec, self.keep, self.count = codec, keep, 0
        self._pixels: dict[int, Tensor] = {}
        self._state: Any = None

    @torch.no_grad()
    def add(self, latents: Tensor) -> Tensor:
        """The pixels `[B, n, 3, H, W]` of the latents `[B, m, C, h, w]` that follow."""
        pixels, self._state = self.codec.decode_next(latents.detach(), self._state)
        first, m = self.count, latents.shape[1]
        self.count += m
        ends = pixels.shape[1] - 1 - self.codec.stride[0] * torch.arange(m).flip(0)
        self._pixels |= {first + i: pixels[:, end : end + 1] for i, end in enumerate(ends.tolist())}
        for old in [i for i in self._pixels if i < self.count - self.keep]:
            del self._pixels[old]
        return pixels

    @torch.no_grad()
    def __call__(self, frame: int) -> Tensor:
        """The latent `[B, 1, C, h, w]` of latent frame `frame`'s last pixel frame as an image."""
        return self.codec.encode(self._pixels[frame])
