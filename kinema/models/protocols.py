"""What the rest of kinema may ask of a network. These are structural types: models satisfy them without naming them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kinema.diffusion.chunks import Chunks

Cond = dict[str, Tensor]  # literally a backbone's keyword arguments


@dataclass(frozen=True)
class TensorPlan:
    """How a network's matrix products are split over the ranks of a tensor group; `*` stands for one part of a name.

    heads       what the size of a group must divide
    shared      modules whose first arguments are whole on every rank and feed `columns`
    columns     linear layers whose outputs are split
    norms       RMS norms over the split outputs of `columns`, whose mean square is that of all ranks together
    rows        linear layers whose inputs are split and whose outputs are summed
    head_norms  layer or RMS norms over the channels of one head, whose gradients are summed over the ranks
    """

    heads: int
    shared: dict[str, int]
    columns: tuple[str, ...]
    norms: tuple[str, ...]
    rows: tuple[str, ...]
    head_norms: tuple[str, ...] = ()


class Spec(Protocol):
    """A network described by values: a frozen dataclass that can build, fill and read it."""

    def build(self) -> nn.Module:
        """The module on the meta device: names and shapes, no memory."""
        ...

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Fills `module` with its weights on `device`, streaming, and returns it. UserError if the files do not fit."""
        ...

    def read(self, module: nn.Module) -> Any:
        """The face the network shows to objectives and samplers: a denoiser, or a codec."""
        ...

    def tensor_plan(self) -> TensorPlan | None:
        """None: the network cannot be split over the ranks of a tensor group."""
        ...


class BackboneSpec(Spec, Protocol):
    """The spec of a diffusion backbone; it owns what the weights were trained for: path, parametrization, shift."""

    def times(self, steps: int) -> tuple[float, ...]:
        """The times (amounts of noise) at which `steps` network evaluations sample these weights, from 1 downwards."""
        ...


class CausalSpec(BackboneSpec, Protocol):
    """The spec of a backbone that makes videos chunk by chunk, in few steps."""

    @property
    def shift(self) -> float: ...
    @property
    def chunks(self) -> Chunks: ...
    @property
    def steps_at(self) -> tuple[float, ...]:
        """The times of a chunk's few steps, decreasing from 1; the final 0 is not listed."""
        ...


class Backbone(Protocol):
    """A network from noisy video to its prediction.

    `x` is `[B, T, C, H, W]`; `timestep`, in the network's own units, is float32 `[B, 1]` for all frames or `[B, T]` per
    frame. The result is shaped like `x` (its channels may differ) and is in the dtype the network computes in.
    `blocks` are what is recomputed, compiled and sharded one by one.
    """

    blocks: nn.ModuleList

    def __call__(self, x: Tensor, timestep: Tensor, **cond: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """Prompts to the backbone's condition: `{"text": [B, L, D]}`, rows beyond a prompt's end are zero."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...


class TextSpec(Protocol):
    """Where a text encoder is and how it is used; a frozen dataclass. `unconditional` is what stands for no text."""

    @property
    def path(self) -> str: ...
    @property
    def unconditional(self) -> str | None: ...
    def load(self, device: torch.device | str) -> Any: ...


class CodecSpec(Protocol):
    """Where a video codec is and how it is used; a frozen dataclass."""

    @property
    def path(self) -> str: ...
    @property
    def compute(self) -> str: ...
    def load(self, device: torch.device | str) -> Any: ...


class VideoCodec(Protocol):
    """Pixels `[B, T, 3, H, W]` in [-1, 1] to normalised latents `[B, T', C, h, w]` and back."""

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]: ...


class Edit(Protocol):
    """A change of architecture on top of a spec (LoRA, TTT layers); a frozen dataclass.

    `apply` changes the meta module before its weights are loaded, and sets `requires_grad` of what may not learn to
    False. `init` then makes the tensors that weights on disk do not have, by their names in the edited module; where
    they do have them, what it makes is not used. `rename` is what diffusers calls a layer.
    """

    def apply(self, module: nn.Module) -> None: ...
    def init(self, module: nn.Module, rename: Callable[[str], str]) -> Iterable[tuple[str, Tensor]]: ...
