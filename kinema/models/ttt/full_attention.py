"""The mixers that others are measured against: attention to the whole video, at quadratic cost, and nothing at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.models.attention import attend
from kinema.models.layers import LayerNorm, compute_dtype
from kinema.models.ttt.mixer import Mixer, Passes, Walk, in_heads, normal, rotated
from kinema.models.ttt.order import Kind, ScanOrder
from kinema.models.ttt.turn import Turn


@dataclass(frozen=True)
class FullAttention:
    """Every token attends to all of all segments, at true positions; there is no direction, and so one pass."""

    passes: Passes = "parallel"
    order: Kind = "segments"

    kind = "attention"

    @property
    def walk(self) -> Walk:
        return Walk(compact=False)

    def heads_of(self, heads: int) -> int:
        return heads

    def check(self, dim: int, head_dim: int) -> None:
        pass

    def build(self, dim: int, head_dim: int) -> "FullAttentionLayer":
        return FullAttentionLayer(dim, head_dim)

    def init(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        if name.startswith("norm") and name.endswith("weight"):
            return torch.ones(*shape)
        if name.endswith("bias") or name == "to_out.weight":
            return torch.zeros(*shape)
        return normal(shape, 0.02, generator)


class FullAttentionLayer(Mixer):
    directed = False

    def __init__(self, dim: int, head_dim: int):
        super().__init__(dim)
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (LayerNorm(head_dim, 1e-6) for _ in range(2))

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (in_heads(layer(x_BLD), self.head_dim) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def turned(self, parts: tuple[Tensor, ...], turn: Turn) -> tuple[Tensor, ...]:
        q, k, v = parts
        return rotated(q, turn), rotated(k, turn), v

    def walk(self, streams: tuple[Tensor, ...], order: ScanOrder) -> Tensor:
        q, k, v = streams
        whole = order.everything
        bias = None if whole else torch.zeros_like(order.known, dtype=q.dtype).masked_fill(~order.known, -torch.inf)
        return attend(q, k, v, None if bias is None else bias[:, None, None])

    def finish(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(2).to(compute_dtype(self.to_out.weight)))


@dataclass(frozen=True)
class NoMixer:
    """Segments know nothing of each other but the frame that neighbours share."""

    passes: Passes = "parallel"
    order: Kind = "segments"

    kind = "none"

    @property
    def walk(self) -> Walk:
        return Walk()

    def heads_of(self, heads: int) -> int:
        return 0

    def check(self, dim: int, head_dim: int) -> None:
        pass
