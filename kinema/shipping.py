"""How the checkpoints in `kinema/assets` are put together from the runs that trained their parts."""

from pathlib import Path

import torch

from kinema import config
from kinema.data.sprites import render
from kinema.data.tokenizer import write_tokenizer
from kinema.pretrained import trained


def base(text_run: Path, vae_run: Path, folder: Path, device: torch.device, clips: int = 512) -> None:
    """Writes tokenizer, text encoder and VAE of two finished runs as a folder of the Hub's layout.

    The mean and deviation of the latents are measured on `clips` clips of the VAE's own world.
    """
    write_tokenizer(folder / "tokenizer")
    spec, reader = trained(text_run, device)
    spec.export(reader, folder)
    world = config.load(vae_run / "run.yaml").data.world
    spec, network = trained(vae_run, device)
    spec.export(network, folder, (render(world, range(i, min(i + 32, clips)), device) for i in range(0, clips, 32)))
