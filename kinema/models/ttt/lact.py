"""The mixer `lact` (arXiv 2505.23884): one update of large fast weights for a video, a segment, or some frames."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import UsageError, UserError
from kinema.models.layers import RMSNorm, compute_dtype, wide
from kinema.models.ttt import large_chunk
from kinema.models.ttt.door import scan_large_chunks
from kinema.models.ttt.mixer import Mixer, Passes, Walk, in_heads, normal, per_token, rotated
from kinema.models.ttt.order import Kind
from kinema.models.ttt.replay import State
from kinema.models.ttt.turn import Turn


@dataclass(frozen=True)
class LaCT:
    """heads    of m = dim / heads channels, each with fast weights of its own
    expand   hidden width over m
    group    what shares one update: the whole video, which then has no direction, a segment, or a number of frames. Of
             several, each overwrites what those before it left: at the default rate nothing of the first can be read
             after six segments of 17,776 tokens (`python -m kinema.evaluation.retention`)
    base_lr  the rates' value where what is learned about them is 0; segments of few tokens need a greater one
    """

    heads: int = 4
    expand: int = 1
    group: Literal["video", "segment"] | int = "video"
    base_lr: float = 1e-3
    passes: Passes = "parallel"
    order: Kind = "segments"

    kind = "lact"

    def __post_init__(self):
        if self.heads < 1 or self.expand < 1 or not self.base_lr > 0:
            raise UsageError(
                f"heads {self.heads}, expand {self.expand}, base_lr {self.base_lr:g}: the first two must be 1 or more, "
                "the last above 0"
            )
        if isinstance(self.group, int) and self.group < 1:
            raise UsageError(f"group is {self.group} frames; use 1 or more, 'video' or 'segment'")

    @property
    def walk(self) -> Walk:
        return Walk(compact=False, group=self.group if isinstance(self.group, int) else 0, even=self.group == "segment")

    def heads_of(self, heads: int) -> int:
        return self.heads

    def check(self, dim: int, head_dim: int) -> None:
        if dim % (self.heads * head_dim):
            raise UserError(
                f"{self.heads} heads of lact are not whole heads of attention, of which there are {dim // head_dim}; "
                "set heads to a divisor of that"
            )

    def build(self, dim: int, head_dim: int) -> "LaCTLayer":
        return LaCTLayer(dim, head_dim, self)

    def init(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        if name.endswith("bias") or name == "to_out.weight":
            return torch.zeros(*shape)
        return normal(shape, shape[1] ** -0.5 if name in ("W0", "W1", "W2") else 0.02, generator)


class LaCTLayer(Mixer):
    def __init__(self, dim: int, head_dim: int, spec: LaCT):
        self.directed = spec.group != "video"
        super().__init__(dim)
        width, hidden = dim // spec.heads, spec.expand * dim // spec.heads
        self.head_dim, self.width, self.at_zero = head_dim, width, softplus_inverse(spec.base_lr)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.W0, self.W2 = (nn.Parameter(torch.empty(spec.heads, width, hidden)) for _ in range(2))
        self.W1 = nn.Parameter(torch.empty(spec.heads, hidden, width))
        self.lr = nn.Linear(dim, 3 * spec.heads)
        self.head_norm, self.pre_norm = RMSNorm(width, 1e-5), RMSNorm(dim, 1e-6)

    grouped = True

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        x = self.pre_norm(x_BLD)
        q, k, v = (in_heads(F.silu(layer(x)), self.width) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = (_unit(a) for a in (q, k))
        eta = F.softplus(per_token(x, self.lr.weight, self.lr.bias) + self.at_zero)  # rows: all of W0, of W1, of W2
        return q, k, v, eta.unflatten(1, (3, -1)).movedim(1, -1)

    def turned(self, parts: tuple[Tensor, ...], turn: Turn) -> tuple[Tensor, ...]:
        q, k, v, eta = parts
        return self._turned(q, turn), self._turned(k, turn), v, eta

    def scanned(
        self, streams: tuple[Tensor, ...], valid: Tensor, groups: tuple[int, ...], state: State
    ) -> tuple[Tensor, State]:
        q, k, v, eta = streams
        eta = eta * valid[:, None, :, None]
        if not self.directed:
            groups = (q.shape[2],)
        # of the first weights, wherever this part of the sequence begins
        lengths = self.own(large_chunk.lengths_of(self.initial_state(1)))
        return scan_large_chunks(q, k, v, eta, state, lengths, groups)

    def finish(self, out: Tensor) -> Tensor:
        return self.to_out(self.head_norm(out).transpose(1, 2).flatten(2).to(compute_dtype(self.to_out.weight)))

    def initial_state(self, batch: int) -> State:
        return tuple(p.to(wide(p.dtype)).expand(batch, *p.shape) for p in (self.W0, self.W1, self.W2))

    def _turned(self, x: Tensor, turn: Turn) -> Tensor:
        """Every slice of the width of an attention head turns as that does."""
        slices = x.unflatten(-1, (-1, self.head_dim)).movedim(3, 2).flatten(1, 2)
        return rotated(slices, turn).unflatten(1, (x.shape[1], -1)).movedim(2, 3).flatten(3)


def softplus_inverse(y: float) -> float:
    """y + log(-expm1(-y))."""
    return y + math.log(-math.expm1(-y))


def _unit(x: Tensor) -> Tensor:
    dtype = wide(x.dtype)
    return (x.to(dtype) / (torch.linalg.vector_norm(x.to(dtype), dim=-1, keepdim=True) + 1e-5)).to(x.dtype)
