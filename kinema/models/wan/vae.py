"""Wan's video autoencoder (arXiv 2503.20314), frozen. Network and file layout are diffusers' AutoencoderKLWan.

It is causal in time and made of convolutions that keep the last frames they saw. So a video goes through it in pieces,
the first frame alone, then `stride` frames for each further latent frame, and what is kept is a value passed along.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.hub import located
from kinema.models.layers import compute_dtype
from kinema.models.sizes import check_frames, check_sides
from kinema.models.wan.vae_layouts import ORIGINAL, from_original, is_original
from kinema.models.weights import load_into, open_weights

PATCH = 2  # Wan's transformers take latents in patches of 2 x 2


@dataclass(frozen=True)
class WanVAE:
    """Where the autoencoder is and how it is computed.

    path     a pipeline's folder (with `vae/`), the autoencoder's own, or the original release's folder or file
    compute  float32 is what its latents' statistics were made with; bfloat16 halves time and memory
    pixels   how large a frame, over the batch, it takes at once; larger batches go through it in parts
    group    how many latents after the first are decoded at once: more fill a GPU better and need more memory
    """

    path: str
    compute: Literal["float32", "bfloat16"] = "float32"
    pixels: int = 480 * 832
    group: int = 1

    def load(self, device: torch.device | str) -> "VideoAutoencoder":
        """Raises UserError if there is no autoencoder at `path`, one of another kind, or its files are damaged."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan  # here, as it takes seconds

        file = located(self.path) / ORIGINAL
        opened = open_weights(file if file.exists() else self.path, "vae")
        original = is_original(opened.shapes)
        if not original and (opened.config.get("_class_name") != "AutoencoderKLWan" or opened.config.get("patch_size")):
            raise UserError(
                f"{opened.path} is not Wan 2.1's autoencoder; give a folder in diffusers' layout, or {ORIGINAL}"
            )
        config = {"base_dim": opened.shapes["encoder.conv1.weight"][0]} if original else opened.config
        with torch.device("meta"):
            network: Any = AutoencoderKLWan.from_config(config)
        source = (
            f"{opened.path}, read as {'the original release of Wan' if original else 'diffusers'}' AutoencoderKLWan"
        )
        named = from_original(opened) if original else opened
        network = load_into(network, named, device, getattr(torch, self.compute), source)
        return VideoAutoencoder(network.eval().requires_grad_(False), self.pixels, self.group)


@dataclass(frozen=True, eq=False)
class Decoding:
    """How far a video is decoded, and for each part of its batch what the causal convolutions keep of it."""

    latents: int
    parts: tuple[tuple[Any, ...], ...]


class VideoAutoencoder:
    """Pixels `[B, T, 3, H, W]` in [-1, 1] to normalised latents `[B, T', C, H/8, W/8]`, T = 1 + 4(T' - 1), and back."""

    def __init__(self, network: nn.Module, pixels: int, group: int = 1):
        self.network, self.pixels, self.group = network, pixels, group
        config: Mapping[str, Any] = network.config  # type: ignore[assignment]
        self.channels: int = config["z_dim"]
        self.stride = (2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1))
        self.mean, self.std = config["latents_mean"], config["latents_std"]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T', C, h, w) of a video's latents. For sizes it cannot have, UsageError names the nearest it can."""
        time, space = self.stride
        check_frames(frames, time)
        check_sides(height, width, space * PATCH)
        return 1 + (frames - 1) // time, self.channels, height // space, width // space

    def encode(self, pixels: Tensor) -> Tensor:
        """The posterior's mean, normalised, float32."""
        self.latent_shape(pixels.shape[1], *pixels.shape[3:])
        with torch.autocast(pixels.device.type, enabled=False):  # latents are data: the same whatever they are made for
            latents = torch.cat(
                [self.posterior(part)[0].float() for part in self._parts(pixels, pixels[0, 0, 0].numel())]
            )
        return (latents - self._row(self.mean, latents)) / self._row(self.std, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1], float32."""
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self.reconstruct(part).float().clamp(-1, 1) for part in self._scaled(latents)])

    def decode_next(self, latents: Tensor, state: Decoding | None = None) -> tuple[Tensor, Decoding]:
        """Pixels of the latents that follow those of `state` (None: of a video's first ones), and the state after them.

        Piece after piece the pixels are those of `decode`: bit for bit where pieces end where groups do, as they all do
        with groups of one.
        """
        done, made, after = state.latents if state else 0, [], []
        parts = self._scaled(latents)
        with torch.autocast(latents.device.type, enabled=False):
            for part, memory in zip(parts, state.parts if state else [None] * len(parts), strict=True):
                pixels, memory = self._reconstruct(part, done, memory)
                made.append(pixels.float().clamp(-1, 1))
                after.append(memory)
        return torch.cat(made), Decoding(done + latents.shape[1], tuple(after))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pixels of a video's chunks, as they come: 1 frame of the first latent, `stride` of each further one."""
        state = None
        for latents in chunks:
            pixels, state = self.decode_next(latents, state)
            yield pixels

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents before normalisation, each `[B, T', C, h, w]`."""
        network: Any = self.network
        x = pixels.to(compute_dtype(next(network.parameters()))).transpose(1, 2)
        memory = _memory(network.encoder)
        pieces = [x[:, :, :1], *(x[:, :, 1:].split(self.stride[0], dim=2) if x.shape[2] > 1 else ())]
        made = [network.encoder(piece, feat_cache=memory, feat_idx=[0]) for piece in pieces]
        mean, logvar = network.quant_conv(torch.cat(made, dim=2)).transpose(1, 2).chunk(2, dim=2)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, of latents before normalisation."""
        return self._reconstruct(latents, 0, None)[0]

    def _reconstruct(
        self, latents: Tensor, done: int, memory: tuple[Any, ...] | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Pixels of the latents that follow `done` ones, of which `memory` is left, and what is left of all of them.

        Latent 0 goes through alone, for it is one frame; then groups end at each multiple of their size.
        """
        network: Any = self.network
        z = latents.to(compute_dtype(next(network.parameters()))).transpose(1, 2)
        kept = _memory(network.decoder) if memory is None else list(memory)
        ends = [i for i in range(done + 1, done + z.shape[2]) if i == 1 or i % self.group == 0]
        made = []
        for begin, end in pairwise([done, *ends, done + z.shape[2]]):
            made.append(self._pieces(z[:, :, begin - done : end - done], kept, begin))
        return torch.cat(made, dim=2).transpose(1, 2), tuple(kept)

    def _pieces(self, z: Tensor, kept: list, begin: int) -> Tensor:
        """Pixels `[B, 3, T', H, W]` of one group of latents `[B, C, T, h, w]`; what is left of it goes into `kept`."""
        network: Any = self.network
        x = network.post_quant_conv(z)  # here, as its rounding depends on the length
        return network.decoder(x, feat_cache=kept, feat_idx=[0], first_chunk=begin == 0)

    def _scaled(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Latents as the network knows them, in parts of the batch that it takes at once."""
        latents = latents.float() * self._row(self.std, latents) + self._row(self.mean, latents)
        return self._parts(latents, latents[0, 0, 0].numel() * self.stride[1] ** 2)

    def _parts(self, video: Tensor, size: int) -> tuple[Tensor, ...]:
        return video.split(max(1, self.pixels // size))

    @staticmethod
    def _row(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)[:, None, None]


def _memory(network: nn.Module) -> list:
    """One place for each causal convolution to keep its last frames in."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None for module in network.modules() if isinstance(module, WanCausalConv3d)]
