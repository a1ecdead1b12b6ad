"""From prompts to pixels: the one function that the command line, previews and evaluation share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import Cosine, DynamicSAT, guided
from kinema.diffusion.samplers import Sampler, UniPC
from kinema.diffusion.token_sampling import Known, TokenSampler
from kinema.errors import UsageError
from kinema.models.protocols import BackboneSpec, CodecSpec, TextSpec
from kinema.models.ursa.spec import URSA
from kinema.models.wan.spec import Wan, WanCausal
from kinema.streaming import Session


@dataclass(frozen=True)
class Pipeline:
    """Everything between a prompt and its video that is not the trained network.

    frames, height, width   size of the video in pixels; fps is how it is played
    steps, guidance         network evaluations, and w of uncond + w·(cond − uncond), or how it follows the time; 1 is
                            no guidance
    """

    text: TextSpec
    codec: CodecSpec
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    steps: int = 50
    guidance: float | Cosine | DynamicSAT = 5.0
    sampler: Sampler | TokenSampler = field(default_factory=UniPC)

    def __post_init__(self):
        for name in ("frames", "height", "width", "fps", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be a whole number from 1 upwards")
        number = isinstance(self.guidance, int | float) and math.isfinite(self.guidance)
        if not number and not isinstance(self.guidance, Cosine | DynamicSAT):
            raise UsageError(f"guidance is {self.guidance!r}; it must be a finite number, 1 for none")

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
        self,
        spec: BackboneSpec,
        denoiser: Any,
        prompts: Sequence[str],
        videos: Sequence[int],
        seed: int = 0,
        images: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Latents `[B, T, C, h, w]`, or codes `[B, T, h, w]`, of the prompts. Video n of a seed has its own noise,
        whatever batch it is in.

        `images` `[B, 3, H, W]` in [-1, 1] are the first frames that image-to-video and causal networks, and those of
        codes, continue; `known` are other frames of codes.
        """
        p, device = self.pipeline, self.codec.device
        draw = seeds.keys(seed, "sample", list(videos), device=device)
        if isinstance(spec, WanCausal):
            image = None if images is None else images[:, None].to(device)
            return torch.cat([*self.session(spec, denoiser, prompts, draw, image=image).latents()], dim=1)
        shape = self.codec.latent_shape(p.frames, p.height, p.width)
        if images is not None and isinstance(spec, Wan):
            raise UsageError("this model takes no image; leave it away, or give a causal or an image-to-video one")
        if images is not None and isinstance(denoiser, TokenDenoiser):
            known = Known(self.codec.encode(images[:, None].to(device)), (0,))
        if known is not None and not (isinstance(spec, URSA) and spec.continues):
            raise UsageError(
                "this student was distilled from prompts alone and knows no given frames; leave the image or video "
                "away, or sample its teacher"
            )
        cond, uncond = self.text(prompts), self.text([self.text.unconditional] * len(prompts))
        if images is not None and known is None:
            image = self.codec.image_latents(images.to(device), shape[0], draw.fold("image"))
            cond, uncond = {**cond, "image": image}, {**uncond, "image": image}
        path: Any = denoiser.path
        if isinstance(denoiser, TokenDenoiser):  # a one-step student of a masked model starts from what it was taught
            noise, told = denoiser.begin((len(prompts), *shape), draw.fold("noise"))
            denoiser = partial(denoiser, **told)
        else:
            noise = path.prior((len(prompts), *shape), draw.fold("noise"))
        sampler: Any = p.sampler  # of latents or of tokens, as the denoiser is
        given = {} if known is None else {"known": known}
        denoise = guided(denoiser, cond, uncond, p.guidance)
        return sampler(denoise, path, noise, spec.times(p.steps), draw.fold("steps"), **given)

    @torch.no_grad()
    def continued(
        self,
        spec: BackboneSpec,
        denoiser: TokenDenoiser,
        prompts: Sequence[str],
        video: Tensor,
        rounds: int = 1,
        seed: int = 0,
        overlap: int = 13,
        noise: float = 0.1,
        motion: float = 5.0,
    ) -> Tensor:
        """`video` `[B, T, 3, H, W]` on the CPU and what comes after it, which `rounds` videos of codes tell.

        Each begins with the last `overlap` frames, shown at the time `noise`, and adds its others. A text that tells
        motion tells this one. Raises UsageError if the video is shorter than the overlap, or nothing would be added.
        """
        p = self.pipeline
        if not overlap <= video.shape[1] or overlap >= p.frames:
            raise UsageError(
                f"the last {overlap} frames are continued, but the video has {video.shape[1]} and the model makes "
                f"{p.frames}; give a longer video, or more frames"
            )
        text = self.text.moving_by(motion)
        for number in range(rounds):
            codes = self.codec.encode(video[:, -overlap:].to(self.codec.device))
            known = Known(codes, tuple(range(codes.shape[1])), noise)
            own = seed if number == 0 else seeds.key_of(seed, "round", number)
            studio = replace(self, text=text)
            made = studio.latents(spec, denoiser, prompts, range(len(prompts)), own, known=known)
            video = torch.cat([video, self.codec.decode(made)[:, overlap:].cpu()], dim=1)
        return video

    def session(
        self, spec: WanCausal, denoiser: Any, prompts: Sequence[str], draw: seeds.Keys, **options: Any
    ) -> Session:
        """Videos of a causal network in the making, with the pipeline's settings or `options` of a `Session`."""
        p, stride = self.pipeline, self.codec.stride[0]
        if "length" not in options:
            alone = spec.first_frame_alone or options.get("image") is not None
            near = {1 + (p.frames - 1) // stride, 1 - (1 - p.frames) // stride}  # latent frames, rounded down and up
            fitting = sorted({1 + (n - 1) * stride for m in near for n in spec.chunks.fitting(m, alone)})
            if p.frames not in fitting:
                pixels = " or ".join(map(str, fitting))
                raise UsageError(f"{p.frames} frames do not fill the chunks this model makes; use {pixels}")
        length, *shape = self.codec.latent_shape(p.frames, p.height, p.width)
        settings = {"length": length, "steps": p.steps, "guidance": p.guidance, "sampler": p.sampler, **options}
        return Session(spec, denoiser, self.text, self.codec, prompts, draw, tuple(shape), **settings)

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
        images: Tensor | None = None,
    ) -> Tensor:
        """Pixels `[B, T, 3, H, W]` in [-1, 1] on the CPU; `each(done)` is told how many videos are finished."""
        made = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            numbers = range(first + start, first + start + len(part))
            shown = None if images is None else images[start : start + batch]
            made.append(self.codec.decode(self.latents(spec, denoiser, part, numbers, seed, shown)).cpu())
            each(start + len(part))
        return torch.cat(made)
