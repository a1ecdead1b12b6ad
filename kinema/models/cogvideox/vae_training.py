"""CogVideoX's video autoencoder as a network that learns: for tiny worlds, which no published one was made for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.models.cogvideox.vae import CogVideoXVAE, VideoAutoencoder
from kinema.models.weights import load_into, open_weights


@dataclass(frozen=True)
class CogVideoXVAESize:
    """diffusers' `AutoencoderKLCogVideoX`, from nothing or from one of this size in the folder `weights`.

    Strides are CogVideoX's, (4, 8), and so are the 16 channels.
    """

    channels: tuple[int, int, int, int] = (128, 256, 256, 512)
    res_blocks: int = 3
    groups: int = 32
    seed: int = 0
    weights: str | None = None

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return self._network()

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        if self.weights:
            opened = open_weights(self.weights, "vae")
            return load_into(module, opened, device, source=f"{opened.path}, read as a CogVideoX VAE of this size")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key_of(self.seed, "init"))
            return load_into(module, self._network().state_dict().items(), device)

    def read(self, module: nn.Module) -> VideoAutoencoder:
        return VideoAutoencoder(CogVideoXVAE(""), module)

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path, videos: Iterable[Tensor]) -> None:
        """Writes `folder/vae` in diffusers' layout; each channel of the latents of `videos` has a deviation of 1."""
        with torch.no_grad():
            latents = torch.cat([self.read(module).posterior(v)[0].float().flatten(0, 1) for v in videos])
        network: Any = module
        evened(network, latents.std((0, 2, 3)))
        network.register_to_config(scaling_factor=1.0)
        network.half().save_pretrained(folder / "vae")

    def _network(self) -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        options: dict[str, Any] = {"block_out_channels": self.channels, "norm_num_groups": self.groups}
        return AutoencoderKLCogVideoX(layers_per_block=self.res_blocks, **options)


@torch.no_grad()
def evened(network: nn.Module, deviations: Tensor) -> None:
    """Divides the channels of latents by `deviations` `[C]` and makes the decoder undo it: the same reconstructions.

    CogVideoX has one scale for all channels. Where they differ (here by up to 4), a diffusion loss hears the loud ones
    and learns the quiet ones last, and what they carry may be the shape of things.
    """
    for name, weight in network.named_parameters():
        scale = deviations.to(weight)
        if name.startswith("encoder.conv_out."):
            mean, logvar = weight.chunk(2)
            mean.div_(scale.view(-1, *[1] * (weight.ndim - 1)))
            if weight.ndim == 1:
                logvar.sub_(2 * scale.log())
        elif re.search(r"^decoder\..*(conv_y|conv_b)\.conv\.weight$|^decoder\.conv_in\.conv\.weight$", name):
            weight.mul_(scale.view(-1, 1, 1, 1))
