"""How the checkpoints in `kinema/assets` are put together from the runs that trained their parts.

python -m kinema.shipping base runs/sprites-text runs/sprites-vae base     tokenizer, text encoder and VAE
python -m kinema.shipping model runs/sprites-wan sprites-wan               all of a text-to-video model
python -m kinema.shipping codes runs/sprites-tokenizer ursa-base           text and video tokenizer of a model of codes
python -m kinema.shipping model runs/sprites-ursa sprites-ursa             all of that model
python -m kinema.shipping model runs/sprites-ursa_dimo sprites-ursa-1step sprites-ursa      a student without the parts
                                                                           that are its parent's, the last name
"""

import sys
from pathlib import Path

import torch

from kinema import config
from kinema.data.sprites import render
from kinema.data.sprites_data import SpriteVideos
from kinema.data.tokenizer import write_tokenizer
from kinema.errors import UserError
from kinema.pretrained import load, trained, write


def base(text_run: Path, vae_run: Path, folder: Path, device: torch.device, clips: int = 512) -> None:
    """Writes tokenizer, text encoder and VAE of two finished runs as a folder of the Hub's layout.

    The mean and deviation of the latents are measured on `clips` clips of the VAE's own world.
    """
    write_tokenizer(folder / "tokenizer")
    spec, reader = trained(text_run, device)
    spec.export(reader, folder)
    data = config.load(vae_run / "run.yaml").data
    if not isinstance(data, SpriteVideos):
        raise UserError(
            f"{vae_run} did not train an autoencoder on sprites; give the run of a vae as the second folder"
        )
    world = data.world
    spec, network = trained(vae_run, device)
    spec.export(network, folder, (render(world, range(i, min(i + 32, clips)), device) for i in range(0, clips, 32)))


def codes(run: Path, folder: Path, device: torch.device) -> None:
    """Writes the video tokenizer of a finished run, and the captions' tokenizer, as a folder of the Hub's layout."""
    write_tokenizer(folder / "tokenizer")
    spec, network = trained(run, device)
    spec.export(network, folder)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what, *folders = sys.argv[1:]
    if what == "base":
        base(Path(folders[0]), Path(folders[1]), Path(folders[2]), device)
    elif what == "codes":
        codes(Path(folders[0]), Path(folders[1]), device)
    else:
        write(load(folders[0], device), Path(folders[1]), parent=folders[2] if folders[2:] else None)
