"""CogVideoX's video autoencoder (arXiv 2408.06072), frozen. Network and file layout are diffusers'.

It normalises by statistics of what it is shown at once, so latents depend on how a clip is cut: the policy is a value,
and part of what latents are. This is also where latents get the scale and length that the transformer was trained with.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.layers import compute_dtype
from kinema.models.sizes import check_frames, check_sides
from kinema.models.weights import Weights, load_into, open_weights
from kinema.seeds import Draw

PATCH = 2  # rows and columns of latents in a patch of the transformers
STRIDE = 4  # frames for each latent frame after the first


@dataclass(frozen=True)
class CogVideoXVAE:
    """Where the autoencoder is, how it is computed, and how its latents become those of a transformer.

    path          a pipeline's folder (with `vae/`), the autoencoder's own, or a file of the original training code
    compute       dtype of its convolutions; bfloat16 halves time and memory
    pixels        how large a frame, over the batch, it takes at once; larger batches go through it in parts
    chunk         "8+1" encodes 8 frames at a time, the first time 9, as diffusers does; "whole" all frames at once, as
                  the original training code does: other latents from 16 frames upwards
    latent_scale  latents are the posterior's numbers times this; None takes it from the autoencoder's configuration
    image_scale   the same for the latents of an image condition: times the scale, as they are, or divided by it
    multiple      temporal patch of the transformer: 2 puts a copy of the first latent frame in front
    """

    path: str
    compute: Literal["float32", "bfloat16"] = "float32"
    pixels: int = 480 * 720
    chunk: Literal["8+1", "whole"] = "8+1"
    latent_scale: float | None = None
    image_scale: Literal["multiply", "plain", "divide"] | None = None
    multiple: Literal[1, 2] = 1

    def load(self, device: torch.device | str) -> "VideoAutoencoder":
        """Raises UserError if there is no autoencoder at `path`, one of another kind, or its files are damaged."""
        opened, made = self._opened()
        named = from_sat(opened) if _is_sat(opened) else opened
        source = f"{opened.path}, read as diffusers' AutoencoderKLCogVideoX"
        load_into(made.network, named, device, getattr(torch, self.compute), source)
        made.network.eval().requires_grad_(False)
        return made

    def described(self) -> "VideoAutoencoder":
        """The same without weights: enough to make latents of a posterior's numbers."""
        return self._opened()[1]

    def _opened(self) -> tuple[Weights, "VideoAutoencoder"]:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        opened = open_weights(self.path, "vae")
        if not _is_sat(opened) and opened.config.get("_class_name") != "AutoencoderKLCogVideoX":
            raise UserError(f"{opened.path} is not CogVideoX's autoencoder in diffusers' layout; give such a folder")
        if _is_sat(opened) and self.latent_scale is None:
            raise UserError(f"{opened.path} does not say the scale of its latents; give it as latent_scale")
        with torch.device("meta"):
            network: Any = AutoencoderKLCogVideoX.from_config(opened.config)
        return opened, VideoAutoencoder(self, network)


class VideoAutoencoder:
    """Pixels `[B, F, 3, H, W]` in [-1, 1] to the transformer's latents `[B, T, C, H/8, W/8]` and back.

    F is 1 or 8m + 1, and T is 1 + (F - 1) / 4, or one more where the transformer's temporal patch is 2.
    """

    def __init__(self, spec: CogVideoXVAE, network: nn.Module):
        config: Any = network.config
        self.spec, self.network = spec, network
        self.channels: int = config["latent_channels"]
        self.stride = (STRIDE, 2 ** (len(config["block_out_channels"]) - 1))
        self.scale = float(config["scaling_factor"] if spec.latent_scale is None else spec.latent_scale)
        kind = spec.image_scale or ("divide" if config["invert_scale_latents"] else "multiply")
        self.image_scale = {"multiply": self.scale, "plain": 1.0, "divide": 1 / self.scale}[kind]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, C, h, w) of a video's latents. For sizes it cannot have, UsageError names the nearest it can."""
        check_frames(frames, 8)
        check_sides(height, width, self.stride[1] * PATCH)
        latent = 1 + (frames - 1) // STRIDE
        return latent + -latent % self.spec.multiple, self.channels, height // self.stride[1], width // self.stride[1]

    def encode(self, pixels: Tensor) -> Tensor:
        """The transformer's latents from the posterior's mean, float32."""
        return self.latents(self.moments(pixels)[0])

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and logarithm of the variance, unscaled and without padding, float32."""
        self.latent_shape(pixels.shape[1], *pixels.shape[3:])
        with torch.autocast(pixels.device.type, enabled=False):  # latents are data: the same whatever they are made for
            made = [self.posterior(part) for part in self._parts(pixels, pixels[0, 0, 0].numel())]
        mean, logvar = zip(*made, strict=True)
        return torch.cat(mean).float(), torch.cat(logvar).float()

    def latents(self, mean: Tensor, logvar: Tensor | None = None, draw: Draw | None = None) -> Tensor:
        """The transformer's latents of a posterior: its mean, or, with a draw, a sample of it."""
        return front_padded(self.scale * _sampled(mean, logvar, draw), self.spec.multiple)

    def image_latents(self, image: Tensor, frames: int, draw: Draw | None = None) -> Tensor:
        """The condition `[B, T, C, h, w]` of an image-to-video transformer: the image at frame 0, zeros elsewhere.

        `image` is `[B, 3, H, W]` in [-1, 1] and `frames` the number T that the transformer sees, padding included.
        """
        mean, logvar = self.moments(image[:, None])
        return placed_first(self.image_scale * _sampled(mean, logvar, draw), frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1], float32."""
        latents = latents[:, self.spec.multiple - 1 :].float() / self.scale
        size = latents[0, 0, 0].numel() * self.stride[1] ** 2
        with torch.autocast(latents.device.type, enabled=False):
            pixels = [self.reconstruct(part).float().clamp(-1, 1) for part in self._parts(latents, size)]
        return torch.cat(pixels)

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """`decode`, a few frames `[B, n, 3, H, W]` at a time, which together are the same; memory does not grow with
        the length."""
        network: Any = self.network
        latents = latents[:, self.spec.multiple - 1 :]
        first = network.num_latent_frames_batch_size
        first += latents.shape[1] % first if latents.shape[1] > first else 0
        state = None
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            for part in [latents[:, :first], *latents[:, first:].split(network.num_latent_frames_batch_size, dim=1)]:
                z = (part.float() / self.scale).to(compute_dtype(next(network.parameters()))).transpose(1, 2)
                z = z if network.post_quant_conv is None else network.post_quant_conv(z)
                pixels, state = network.decoder(z, conv_cache=state)
                yield pixels.transpose(1, 2).float().clamp(-1, 1)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each `[B, T, C, h, w]`, of any number of frames that fills whole ones."""
        network: Any = self.network
        x = pixels.to(compute_dtype(next(network.parameters()))).transpose(1, 2)
        if self.spec.chunk == "whole":
            moments, _ = network.encoder(x)
        else:
            moments = network.encode(x).latent_dist.parameters
        mean, logvar = moments.transpose(1, 2).chunk(2, dim=2)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, of unscaled latents: two latent frames at a time, an odd one with the first two."""
        network: Any = self.network
        z = latents.to(compute_dtype(next(network.parameters()))).transpose(1, 2)
        return network.decode(z).sample.transpose(1, 2)

    def _parts(self, video: Tensor, size: int) -> tuple[Tensor, ...]:
        return video.split(max(1, self.spec.pixels // size))


def _is_sat(opened: Weights) -> bool:
    return any(name.startswith("encoder.down.") for name in opened.shapes)


def front_padded(video: Tensor, multiple: int) -> Tensor:
    """`[B, T, …]` with copies of frame 0 in front until T is a multiple; they count in the loss."""
    return torch.cat([video[:, :1].expand(-1, -video.shape[1] % multiple, *video.shape[2:]), video], dim=1)


def placed_first(image: Tensor, frames: int) -> Tensor:
    """`[B, 1, …]` as the first of `frames` frames, the others zero."""
    return torch.cat([image, image.new_zeros(len(image), frames - 1, *image.shape[2:])], dim=1)


def from_sat(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream from the original training code's names to diffusers'; what belongs to its loss is left out."""
    for name, tensor in named:
        if name.startswith("loss"):
            continue
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{3 - int(m[1])}.", name)
        name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
        for theirs, ours in (
            (".down.", ".down_blocks."),
            (".block.", ".resnets."),
            (".downsample.", ".downsamplers.0."),
            (".upsample.", ".upsamplers.0."),
            (".nin_shortcut.", ".conv_shortcut."),
        ):
            name = name.replace(theirs, ours)
        yield name, tensor


def _sampled(mean: Tensor, logvar: Tensor | None, draw: Draw | None) -> Tensor:
    if logvar is None or draw is None:
        return mean
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * draw.normal(*mean.shape[1:])
