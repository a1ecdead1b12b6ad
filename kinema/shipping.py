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
from typing import Any

import torch
from torch import nn

from kinema import config
from kinema.commands import device_of, execute, parser_of
from kinema.data.sprites import render
from kinema.data.sprites_data import SpriteVideos
from kinema.data.tokenizer import write_tokenizer
from kinema.errors import UsageError, UserError
from kinema.objectives.code_reconstruction import CodeReconstruction
from kinema.objectives.objective import Objective
from kinema.objectives.reading import Reading
from kinema.objectives.reconstruction import Reconstruction
from kinema.pretrained import find, load, trained, write

NEEDS = {"base": ("TEXT_RUN", "VAE_RUN", "FOLDER"), "codes": ("RUN", "FOLDER"), "model": ("RUN", "FOLDER", "[PARENT]")}


def base(text_run: Path, vae_run: Path, folder: Path, device: torch.device, clips: int = 512) -> None:
    """Writes tokenizer, text encoder and VAE of two finished runs as a folder of the Hub's layout.

    The mean and deviation of the latents are measured on `clips` clips of the VAE's own world. UserError, before
    anything is written, if one of the runs trained something else.
    """
    reader_spec, reader = _trained(text_run, Reading, "text encoder", device)
    spec, network = _trained(vae_run, Reconstruction, "VAE", device)
    data = config.load(vae_run / "run.yaml").data
    if not isinstance(data, SpriteVideos):
        raise UserError(f"{vae_run} did not train a VAE on sprites; give the run of one that did")
    world = data.world
    write_tokenizer(folder / "tokenizer")
    reader_spec.export(reader, folder)
    spec.export(network, folder, (render(world, range(i, min(i + 32, clips)), device) for i in range(0, clips, 32)))


def codes(run: Path, folder: Path, device: torch.device) -> None:
    """Writes the video tokenizer of a finished run, and the captions' tokenizer, as a folder of the Hub's layout.

    UserError if the run trained something else.
    """
    spec, network = _trained(run, CodeReconstruction, "video tokenizer", device)
    write_tokenizer(folder / "tokenizer")
    spec.export(network, folder)


def _trained(run: Path, objective: type[Objective], what: str, device: torch.device) -> tuple[Any, nn.Module]:
    """The spec and the network of a run, if it is of that objective."""
    made = trained(run, device)
    if not isinstance(config.load(run / "run.yaml").objective, objective):
        raise UserError(f"{run} did not train a {what}; give the run of one in its place")
    return made


def main(words: list[str]) -> None:
    parser = parser_of("kinema.shipping", __doc__)
    parser.add_argument("what", choices=[*NEEDS], help="which parts")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="as many as it needs")
    args = parser.parse_args(words)
    needs = NEEDS[args.what]
    least = sum(not name.startswith("[") for name in needs)
    if not least <= len(args.folders) <= len(needs):
        raise UsageError(f"{args.what} takes {' '.join(needs)}, not {len(args.folders)} names; give it these")
    device, (first, *rest) = device_of("auto"), args.folders
    if args.what == "base":
        base(Path(first), Path(rest[0]), Path(rest[1]), device)
    elif args.what == "codes":
        codes(Path(first), Path(rest[0]), device)
    else:
        parent = rest[1] if rest[1:] else None
        if parent is not None:
            find(parent)  # or its UserError, before anything is written
        write(load(first, device), Path(rest[0]), parent=parent)


if __name__ == "__main__":
    sys.exit(execute(main))
