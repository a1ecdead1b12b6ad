"""The names of Wan 2.1's autoencoder: the original release's (`Wan2.1_VAE.pth`) and diffusers', which are used."""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

ORIGINAL = "Wan2.1_VAE.pth"
RES_BLOCKS = 2  # of a stage of the released encoder; its decoder has one more

TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{theirs}": f"{half}.{ours}"
        for half in ("encoder", "decoder")
        for theirs, ours in (
            ("conv1", "conv_in"),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
            ("middle.0", "mid_block.resnets.0"),
            ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
        )
    },
}
INSIDE = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
INSIDE |= {"shortcut": "conv_shortcut"}


def is_original(names: Iterable[str]) -> bool:
    names = set(names)
    return "conv1.weight" in names and "encoder.conv1.weight" in names


def from_original(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream from the original release's names to diffusers'. Names it does not know pass unchanged."""
    for name, tensor in named:
        yield diffusers_name(name), tensor


def diffusers_name(name: str) -> str:
    """diffusers' name of a tensor of the original release."""
    stages = RES_BLOCKS + 2  # a stage of the decoder: its blocks and what makes it larger
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", name):
        return f"encoder.down_blocks.{match[1]}.{_inside(match[2])}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name):
        stage, place = divmod(int(match[1]), stages)
        where = f"resnets.{place}" if place < stages - 1 else "upsamplers.0"
        return f"decoder.up_blocks.{stage}.{where}.{_inside(match[2])}"
    for theirs, ours in TOP.items():
        if name.startswith(f"{theirs}."):
            return f"{ours}.{_inside(name[len(theirs) + 1 :])}"
    return name


def _inside(rest: str) -> str:
    for theirs, ours in INSIDE.items():
        if rest.startswith(f"{theirs}."):
            return f"{ours}.{rest[len(theirs) + 1 :]}"
    return rest
