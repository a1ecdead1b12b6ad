"""The edit that makes a video transformer take long videos: a global mixer in every block.

The network says itself how (`lengthen`); nothing here knows which one it is. Where the weights have mixers they are
read; else they start so that the network does what it did, or, in the public reference's way, nearly so.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinema import seeds
from kinema.errors import UserError
from kinema.models.ttt.full_attention import FullAttention, NoMixer
from kinema.models.ttt.gated_deltanet import GatedDeltaNet
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP, TTTLinear
from kinema.models.weights import open_weights, owned

MixerKind = TTTLinear | TTTMLP | LaCT | GatedDeltaNet | FullAttention | NoMixer
KINDS: dict[str, type] = {kind.kind: kind for kind in (TTTLinear, TTTMLP, LaCT, GatedDeltaNet, FullAttention, NoMixer)}
FILE = "mixer.safetensors"
GATE = 0.1  # alpha of every gate at first
PART = ".mixer."  # in the name of a mixer's tensor


@runtime_checkable
class CanBeLong(Protocol):
    def lengthen(self, spec: MixerKind) -> None:
        """Puts mixers of this kind into the blocks, as `blocks.N.mixer`, and segments into their attention."""
        ...


@dataclass(frozen=True)
class TTT:
    """A mixer in every block.

    weights  a `mixer.safetensors`, or the folder of one, that an export wrote; None: those of the network's own
             weights, or else new ones from `seed`
    """

    mixer: MixerKind = field(default_factory=LaCT)
    weights: str | None = None
    seed: int = 0

    def apply(self, module: nn.Module) -> None:
        if not isinstance(module, CanBeLong):
            raise UserError(f"{type(module).__name__} cannot take long videos; use a CogVideoX with rotary positions")
        module.lengthen(self.mixer)

    def init(self, module: nn.Module, rename: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
        if self.weights is not None:
            yield from self._read(self.weights, module)
            return
        for name, parameter in mixers(module).items():
            leaf = name.partition(PART)[2]
            if leaf.startswith("gate."):
                yield name, torch.full(parameter.shape, GATE)
            else:
                assert not isinstance(self.mixer, NoMixer), "has no parameters"
                generator = torch.Generator().manual_seed(seeds.key_of(self.seed, "mixer", name))
                yield name, self.mixer.init(leaf, parameter.shape, generator)

    def _read(self, path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        opened = open_weights(file)
        check_kind(self.mixer, json.loads(opened.header.get("mixer", "{}")), str(file))
        yield from opened


def mixers(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all mixers by name."""
    return {name: p for name, p in module.named_parameters() if PART in name}


def described(spec: MixerKind) -> dict[str, Any]:
    """A mixer as JSON."""
    return {"kind": spec.kind, **asdict(spec)}


def of_description(said: Mapping[str, Any]) -> MixerKind:
    """The mixer that `described` described. UserError for a kind there is none of."""
    fields = dict(said)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"there is no mixer of kind {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def check_kind(spec: MixerKind, said: Mapping[str, Any], source: str) -> None:
    """Raises UserError if weights that say this of their mixer are not of `spec`.

    What may change with the same weights is which tokens share a step, and what only new ones start from; but where all
    of a video's do, there is no direction, and so no gates of a second one.
    """
    if said.get("kind", spec.kind) != spec.kind:
        raise UserError(f"{source} has a mixer {said['kind']}, not {spec.kind}; use the one it was trained with")
    mine, free = described(spec), {"mini_batch", "chunk", "group", "spread", "dt"}
    for name, value in said.items():
        bound = name not in free or (name == "group" and "video" in (value, mine.get(name)))
        if bound and name in mine and mine[name] != value:
            raise UserError(
                f"{source} was trained with {name} {value} of its mixer, not {mine[name]}; use what it was trained with"
            )


def write(tensors: Mapping[str, Tensor], spec: MixerKind, file: Path) -> None:
    """Writes the mixers' tensors as a file that says of which kind they are."""
    content = {name: owned(tensor) for name, tensor in tensors.items()}
    save_file(content, file, metadata={"format": "pt", "mixer": json.dumps(described(spec))})
