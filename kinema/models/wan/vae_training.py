"""Wan's video autoencoder as a network that learns: for tiny worlds, whose pixels no published autoencoder was made
for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.models.layers import compute_dtype
from kinema.models.wan.vae import VideoAutoencoder, WanVAE
from kinema.models.weights import load_into, open_weights, self_made


@dataclass(frozen=True)
class WanVAESize:
    """diffusers' `AutoencoderKLWan`, from nothing or from one of this size in the folder `weights`.

    Strides are Wan's, (4, 8, 8), and so are the 16 latent channels.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    seed: int = 0
    weights: str | None = None

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return self._network()

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        if self.weights:
            opened = open_weights(self.weights, "vae")
            return load_into(module, opened, device, source=f"{opened.path}, read as a Wan VAE of this size")
        return load_into(module, self_made(self._network, self.seed).items(), device)

    def read(self, module: nn.Module) -> "LearningAutoencoder":
        return LearningAutoencoder(module, WanVAE.pixels)

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path, videos: Iterable[Tensor]) -> None:
        """Writes `folder/vae` in diffusers' layout, with the mean and deviation that the latents of `videos` have."""
        with torch.no_grad():
            means = torch.cat([self.read(module).posterior(v)[0].float() for v in videos])
        means = means.transpose(0, 2).flatten(1)  # [C, everything else]
        network: Any = module
        network.register_to_config(latents_mean=means.mean(1).tolist(), latents_std=means.std(1).tolist())
        network.half().save_pretrained(folder / "vae")

    def _network(self) -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        return AutoencoderKLWan(base_dim=self.base_dim, dim_mult=list(self.dim_mult), num_res_blocks=self.res_blocks)


class LearningAutoencoder(VideoAutoencoder):
    """The same functions of whole clips at once: a fraction of the kernels, and the memory of all frames.

    A causal convolution does not care whether the past is kept or present; only the two kinds of temporal resampling,
    which leave the first frame alone, have to be written out.
    """

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.network
        encoder = network.encoder
        x = encoder.conv_in(pixels.to(compute_dtype(encoder.conv_in.weight)).transpose(1, 2))
        for block in encoder.down_blocks:
            x = _resampled(block, x) if hasattr(block, "resample") else block(x)
        x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
        mean, logvar = network.quant_conv(x).transpose(1, 2).chunk(2, dim=2)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, latents: Tensor) -> Tensor:
        network: Any = self.network
        decoder = network.decoder
        z = latents.to(compute_dtype(decoder.conv_in.weight)).transpose(1, 2)
        x = decoder.mid_block(decoder.conv_in(network.post_quant_conv(z)))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = layer(x)
            for layer in block.upsamplers or ():
                x = _resampled(layer, x)
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))).transpose(1, 2)


def _resampled(layer: Any, x: Tensor) -> Tensor:
    """One of diffusers' `WanResample` on `[B, C, T, H, W]`, first frame first."""
    if layer.mode == "upsample3d":
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            pairs = layer.time_conv(rest).unflatten(1, (2, -1))  # its history at the second frame is zeros, as in Wan
            rest = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, rest], dim=2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2) if frames > 1 else x
    return x
