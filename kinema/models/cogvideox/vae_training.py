"""CogVideoX's video autoencoder as a network that learns: for tiny worlds, which no published one was made for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.models.cogvideox.vae import CogVideoXVAE, VideoAutoencoder
from kinema.models.weights import load_into


@dataclass(frozen=True)
class CogVideoXVAESize:
    """diffusers' `AutoencoderKLCogVideoX` from nothing. Strides are CogVideoX's, (4, 8), and so are the 16 channels."""

    channels: tuple[int, int, int, int] = (128, 256, 256, 512)
    res_blocks: int = 3
    groups: int = 32
    seed: int = 0

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return self._network()

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key_of(self.seed, "init"))
            return load_into(module, self._network().state_dict().items(), device)

    def read(self, module: nn.Module) -> VideoAutoencoder:
        return VideoAutoencoder(CogVideoXVAE(""), module)

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path, videos: Iterable[Tensor]) -> None:
        """Writes `folder/vae` in diffusers' layout; its scale gives the latents of `videos` a deviation of 1."""
        with torch.no_grad():
            means = torch.cat([self.read(module).posterior(v)[0].float().flatten() for v in videos])
        network: Any = module
        network.register_to_config(scaling_factor=1 / float(means.square().mean().sqrt()))
        network.half().save_pretrained(folder / "vae")

    def _network(self) -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        options: dict[str, Any] = {"block_out_channels": self.channels, "norm_num_groups": self.groups}
        return AutoencoderKLCogVideoX(layers_per_block=self.res_blocks, **options)
