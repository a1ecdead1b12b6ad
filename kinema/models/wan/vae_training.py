"""Wan's video autoencoder as a network that learns: for tiny worlds, whose pixels no published autoencoder was made for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.models.wan.vae import VideoAutoencoder, WanVAE


@dataclass(frozen=True)
class WanVAESize:
    """diffusers' `AutoencoderKLWan` from nothing. Strides are Wan's, (4, 8, 8), and so are the 16 latent channels."""

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    seed: int = 0

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return self._network()

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key_of(self.seed, "init"))
            module.load_state_dict(self._network().state_dict(), assign=True)
        return module.to(device)

    def read(self, module: nn.Module) -> VideoAutoencoder:
        return VideoAutoencoder(module, WanVAE.pixels)

    def export(self, module: nn.Module, folder: Path, videos: Iterable[Tensor]) -> None:
        """Writes `folder/vae` in diffusers' layout, with the mean and deviation that the latents of `videos` have."""
        with torch.no_grad():
            means = torch.cat([self.read(module).posterior(v)[0].float() for v in videos])
        means = means.transpose(0, 2).flatten(1)  # [C, everything else]
        network: Any = module
        network.register_to_config(latents_mean=means.mean(1).tolist(), latents_std=means.std(1).tolist())
        network.half().save_pretrained(folder / "vae")

    def _network(self) -> nn.Module:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(base_dim=self.base_dim, dim_mult=list(self.dim_mult), num_res_blocks=self.res_blocks)
