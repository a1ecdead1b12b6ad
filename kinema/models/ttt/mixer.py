"""What a global mixer is: a layer with a memory that walks over the whole video, forward and backward, between the
attention of a block, which sees one segment, and the block's residual stream.

Shapes: B batch, L tokens (text of all segments, then video), D model dim, H heads, d dim of one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from kinema.models.layers import gated_sum, wide
from kinema.models.ttt.order import Kind, ScanOrder
from kinema.models.ttt.ranks import Alone, Ranks
from kinema.models.ttt.replay import State
from kinema.models.ttt.turn import Turn

Passes = Literal["sequential", "parallel"]


class MixerSpec(Protocol):
    """A kind of mixer, as values.

    passes  "sequential": the walk back sees what the walk forward made; "parallel": both see the attention's output
    order   the order of scans, see `scan_order`
    """

    @property
    def kind(self) -> str:
        """Its name on disk."""
        ...

    @property
    def passes(self) -> Passes: ...
    @property
    def order(self) -> Kind: ...
    @property
    def walk(self) -> "Walk": ...

    def heads_of(self, heads: int) -> int:
        """How many heads it has in a network of so many: what ranks trade for tokens. 0: nothing is traded."""
        ...

    def check(self, dim: int, head_dim: int) -> None:
        """Raises UserError for a network it does not fit."""
        ...

    def build(self, dim: int, head_dim: int) -> "Mixer": ...

    def init(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The first value of one of its parameters, gates aside, float32 on the CPU."""
        ...


@dataclass(frozen=True)
class Walk:
    """What a kind asks of its scan order: see the arguments of `scan_order`."""

    multiple: int = 1
    compact: bool = True
    group: int = 0
    even: bool = False


class Mixer(nn.Module):
    """The part that all kinds share: projections, rotation, exchange of heads, the walk, and the way back.

    A kind fills in `project`, `turned`, `scanned`, `finish` and `initial_state`. Both directions share all parameters
    but the gates. Without `directed`, a kind has no direction, and there is one pass.
    """

    directed = True

    def __init__(self, dim: int):
        super().__init__()
        self.ranks: Ranks = Alone()
        self.gate = Gates(dim, self.directed)

    def forward(self, x_BLD: Tensor, order: ScanOrder) -> Tensor:
        """The memory's answer to every token, in natural order, before gates."""
        return self.finish(self._walked(self._streams(self.project(x_BLD), order), order, x_BLD.shape[1]))

    def both(self, x_BLD: Tensor, forward: ScanOrder, backward: ScanOrder) -> tuple[Tensor, Tensor]:
        """The answers of both directions, projected once and scanned as one batch where their groups are alike."""
        parts, own = self.project(x_BLD), x_BLD.shape[1]
        there = self._streams(parts, forward)
        back = there if backward.turn is forward.turn else self._streams(parts, backward)
        if forward.groups != backward.groups and self.grouped:
            made = self._walked(there, forward, own), self._walked(back, backward, own)
        else:
            pairs = zip(there, back, strict=True)
            batch = [torch.cat([forward.gather(a), backward.gather(b)]) for a, b in pairs]
            valid = torch.cat([order.valid.expand(len(x_BLD), -1) for order in (forward, backward)])
            out, _ = self.scanned(tuple(batch), valid, forward.groups, self.own(self.initial_state(2 * len(x_BLD))))
            a, b = out.chunk(2)
            made = self.ranks.tokens(forward.scatter(a), own), self.ranks.tokens(backward.scatter(b), own)
        return self.finish(made[0]), self.finish(made[1])

    grouped = False  # whether the boundaries of groups matter to the scan

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """q, k, v `[B, H, L, d]` and whatever else a token brings along, `[B, H, L, …]`."""
        raise NotImplementedError

    def turned(self, parts: tuple[Tensor, ...], turn: Turn) -> tuple[Tensor, ...]:
        """What is scanned, from what was projected."""
        raise NotImplementedError

    def scanned(
        self, streams: tuple[Tensor, ...], valid: Tensor, groups: tuple[int, ...], state: State
    ) -> tuple[Tensor, State]:
        """Outputs `[B, H, n, d]` of streams in scan order, and the state after them."""
        raise NotImplementedError

    def finish(self, out: Tensor) -> Tensor:
        """`[B, L, D]` of outputs `[B, H, L, d]`."""
        raise NotImplementedError

    def initial_state(self, batch: int) -> State:
        """Of all heads; wide. It can be handed from one part of a sequence to the next."""
        raise NotImplementedError

    def own(self, tensors: Sequence[Tensor], dim: int = 1) -> State:
        """This rank's heads of tensors that have all."""
        return tuple(t.chunk(self.ranks.size, dim)[self.ranks.rank] for t in tensors)

    def _streams(self, parts: tuple[Tensor, ...], order: ScanOrder) -> tuple[Tensor, ...]:
        return tuple(self.ranks.heads(x, order.longest) for x in self.turned(parts, order.turn))

    def walk(self, streams: tuple[Tensor, ...], order: ScanOrder) -> Tensor:
        """Outputs in natural order of streams in natural order."""
        batch = len(streams[0])
        state = self.own(self.initial_state(batch))
        valid = order.valid.expand(batch, -1)
        out, _ = self.scanned(tuple(order.gather(x) for x in streams), valid, order.groups, state)
        return order.scatter(out)

    def _walked(self, streams: tuple[Tensor, ...], order: ScanOrder, own: int) -> Tensor:
        return self.ranks.tokens(self.walk(streams, order), own)


class Gates(nn.Module):
    """How much of the memory's answer each channel takes, of text and of video, in each direction: tanh(alpha)."""

    def __init__(self, dim: int, directed: bool):
        super().__init__()
        for name in (*FORWARD, *(BACKWARD if directed else ())):
            self.register_parameter(name, nn.Parameter(torch.empty(dim)))


FORWARD, BACKWARD = ("forward_text", "forward_video"), ("backward_text", "backward_video")


def mix(mixer: Mixer, passes: Passes, x_BLD: Tensor, forward: ScanOrder, backward: ScanOrder, text: int) -> Tensor:
    """x plus the gated answers of the memory; the first `text` tokens of x are text."""

    def add(x: Tensor, y: Tensor, names: tuple[str, str]) -> Tensor:
        gates = (torch.tanh(getattr(mixer.gate, name).to(wide(x.dtype))) for name in names)
        parts = zip(x.split([text, x.shape[1] - text], 1), gates, y.split([text, x.shape[1] - text], 1), strict=True)
        return torch.cat([gated_sum(*part) for part in parts], dim=1)

    if not mixer.directed:
        return add(x_BLD, mixer(x_BLD, forward), FORWARD)
    if passes == "sequential":
        z = add(x_BLD, mixer(x_BLD, forward), FORWARD)
        return add(z, mixer(z, backward), BACKWARD)
    there, back = mixer.both(x_BLD, forward, backward)
    return add(add(x_BLD, there, FORWARD), back, BACKWARD)


def in_heads(x_BLD: Tensor, width: int) -> Tensor:
    return x_BLD.unflatten(-1, (-1, width)).transpose(1, 2)


def rotated(x_BHLd: Tensor, turn: Turn) -> Tensor:
    """With the video tokens, which are the last ones, turned."""
    frames, rows, columns = turn.grid
    video = frames * rows * columns
    text = x_BHLd.shape[2] - video
    return torch.cat([x_BHLd[:, :, :text], turn.rotate(x_BHLd[:, :, text:])], dim=2)


def per_token(x_BLD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A number of each token for each row of `weight` `[H, D]`, wide: `[B, H, L]`."""
    dtype = wide(x_BLD.dtype)
    with torch.autocast(x_BLD.device.type, enabled=False):
        return (x_BLD.to(dtype) @ weight.to(dtype).mT + bias.to(dtype)).mT


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32) * std
