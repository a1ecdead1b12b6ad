"""CogVideoX's video autoencoder as a network that learns: for tiny worlds, which no published one was made for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.models.cogvideox.vae import CogVideoXVAE, VideoAutoencoder
from kinema.models.weights import load_into, open_weights, self_made


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
        return load_into(module, self_made(self._network, self.seed).items(), device)

    def read(self, module: nn.Module) -> VideoAutoencoder:
        return VideoAutoencoder(CogVideoXVAE(""), module)

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path, videos: Iterable[Tensor]) -> None:
        """Writes `folder/vae` in diffusers' layout; its latents of `videos` have mean 0 and covariance 1."""
        with torch.no_grad():
            rows = [self.read(module).posterior(v)[0].double().movedim(2, -1).flatten(0, -2) for v in videos]
        network: Any = module
        latents = torch.cat(rows)
        whitened(network, latents.mean(0), latents.T.cov())
        network.register_to_config(scaling_factor=1.0)
        network.half().save_pretrained(folder / "vae")

    def _network(self) -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        options: dict[str, Any] = {"block_out_channels": self.channels, "norm_num_groups": self.groups}
        return AutoencoderKLCogVideoX(layers_per_block=self.res_blocks, **options)


@torch.no_grad()
def whitened(network: nn.Module, mean: Tensor, covariance: Tensor) -> None:
    """Turns latents whose channels have this `mean` `[C]` and `covariance` `[C, C]` into ones of mean 0, covariance 1,
    as near to them as can be (ZCA), and makes the decoder undo it: the same reconstructions, but for the picture's
    edges, where the decoder's first convolution sees zeros that were not the mean.

    CogVideoX has one scale for all channels. Where they are loud together, as they are for backgrounds and colours, a
    diffusion loss hears nothing else, and what the quiet directions carry is the shape of things: in the tiny model it
    had 3 % of the latents' energy, or 18 % with noise in training, and half of all shapes were drawn wrong. Now it has
    34 %. The posterior's variances stay independent of each other: each is a geometric mean of those it is mixed from.
    """
    mean, covariance = mean.double(), covariance.double()
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=1e-6 * values[-1]).sqrt()
    there, back = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    share = there.square() / there.square().sum(1, keepdim=True)
    for name, layer in network.named_modules():
        if name == "encoder.conv_out.conv":
            for kind in ("weight", "bias"):
                mu, logvar = getattr(layer, kind).chunk(2)
                mu.copy_(torch.tensordot(there, mu.double() - (mean if kind == "bias" else 0), 1))
                logvar.copy_(torch.tensordot(share, logvar.double(), 1))
                if kind == "bias":
                    logvar.add_(there.square().sum(1).log())
        elif re.search(r"^decoder\..*(conv_y|conv_b)\.conv$|^decoder\.conv_in\.conv$", name):
            conv: Any = layer
            conv.bias.add_(torch.tensordot(conv.weight.double().sum((2, 3, 4)), mean, 1))
            conv.weight.copy_(torch.einsum("co,dc...->do...", back, conv.weight.double()))
