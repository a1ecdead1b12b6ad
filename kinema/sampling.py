"""From prompts to pixels: the one function that the command line, previews and evaluation share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import guided
from kinema.diffusion.samplers import Sampler, UniPC
from kinema.diffusion.token_sampling import TokenSampler
from kinema.models.protocols import BackboneSpec
from kinema.models.text import UMT5
from kinema.models.ursa.codec import URSACodec
from kinema.models.ursa.text import QwenText
from kinema.models.wan.vae import WanVAE


@dataclass(frozen=True)
class Pipeline:
    """Everything between a prompt and its video that is not the trained network.

    frames, height, width   size of the video in pixels; fps is how it is played
    steps, guidance         network evaluations, and w of uncond + w·(cond − uncond); 1 is no guidance
    """

    text: UMT5 | QwenText
    codec: WanVAE | URSACodec
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    steps: int = 50
    guidance: float = 5.0
    sampler: Sampler | TokenSampler = field(default_factory=UniPC)

    def open(self, device: torch.device) -> "Studio":
        return Studio(self, self.text.load(device), self.codec.load(device))


@dataclass(frozen=True)
class Studio:
    """An opened pipeline: its frozen networks are in memory and make videos with any denoiser given to them."""

    pipeline: Pipeline
    text: Any
    codec: Any

    @torch.no_grad()
    def latents(
        self, spec: BackboneSpec, denoiser: Any, prompts: Sequence[str], videos: Sequence[int], seed: int = 0
    ) -> Tensor:
        """Latents `[B, T, C, h, w]`, or codes `[B, T, h, w]`, of the prompts. Video number n of a seed has its own
        noise, whatever batch it is in.
        """
        p, device = self.pipeline, self.codec.device
        draw = seeds.keys(seed, "sample", list(videos), device=device)
        shape = self.codec.latent_shape(p.frames, p.height, p.width)
        cond, uncond = self.text(prompts), self.text([self.text.unconditional] * len(prompts))
        noise = denoiser.path.prior((len(prompts), *shape), draw.fold("noise"))
        face: Any = denoiser
        if isinstance(denoiser, TokenDenoiser):  # a one-step student of a masked model starts from what it was taught
            noise, told = denoiser.begin((len(prompts), *shape), draw.fold("noise"))
            face = partial(denoiser, **told)
        sampler: Any = p.sampler  # of latents or of tokens, as the denoiser is
        return sampler(
            guided(face, cond, uncond, p.guidance), denoiser.path, noise, spec.times(p.steps), draw.fold("steps")
        )

    @torch.no_grad()
    def videos(
        self,
        spec: BackboneSpec,
        denoiser: Any,
        prompts: Sequence[str],
        seed: int = 0,
        first: int = 0,
        batch: int = 16,
        each: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Pixels `[B, T, 3, H, W]` in [-1, 1] on the CPU; `each(done)` is told how many videos are finished."""
        made = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            numbers = range(first + start, first + start + len(part))
            made.append(self.codec.decode(self.latents(spec, denoiser, part, numbers, seed)).cpu())
            each(start + len(part))
        return torch.cat(made)
