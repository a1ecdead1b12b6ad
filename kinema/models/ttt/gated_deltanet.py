"""The mixer `gated_deltanet` (arXiv 2412.06464): a matrix per head that is corrected, token by token, and forgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import UsageError
from kinema.models.layers import RMSNorm, compute_dtype, wide
from kinema.models.ttt import delta_rule
from kinema.models.ttt.mixer import Mixer, Passes, Walk, in_heads, normal, per_token, rotated
from kinema.models.ttt.order import Kind
from kinema.models.ttt.replay import State
from kinema.models.ttt.turn import Turn


@dataclass(frozen=True)
class GatedDeltaNet:
    """chunk  tokens computed at once; the result does not depend on it
    read   "token": each token reads the matrix as it leaves it; "frame": as the last token of its frame does
    dt     the range of how much a token forgets at first, log-uniform over heads, times up to 16. With the paper's
           range nearly all heads forget within hundreds of tokens; what must last for more needs a slower one
    """

    chunk: int = 64
    read: Literal["token", "frame"] = "token"
    passes: Passes = "parallel"
    order: Kind = "segments"
    dt: tuple[float, float] = (1e-3, 1e-1)

    kind = "gated_deltanet"

    def __post_init__(self):
        if self.chunk < 1:
            raise UsageError(f"chunk is {self.chunk}; it must be 1 or more")
        if not 0 < self.dt[0] <= self.dt[1]:
            raise UsageError(f"dt is {self.dt}; it must be two numbers above 0, the smaller one first")

    @property
    def walk(self) -> Walk:
        return Walk(compact=False, group=1 if self.read == "frame" else 0)

    def heads_of(self, heads: int) -> int:
        return heads

    def check(self, dim: int, head_dim: int) -> None:
        pass

    def build(self, dim: int, head_dim: int) -> "GatedDeltaNetLayer":
        return GatedDeltaNetLayer(dim, head_dim, self)

    def init(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(*shape)
        if name == "A_log":
            return (16 * (1 - torch.rand(*shape, generator=generator, dtype=torch.float32))).log()
        if name == "dt_bias":
            low, high = map(math.log, self.dt)
            dt = (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float32)).exp()
            return dt + torch.log(-torch.expm1(-dt))
        if name.endswith("bias") or name == "to_out.weight":
            return torch.zeros(*shape)
        return normal(shape, 0.02, generator)


class GatedDeltaNetLayer(Mixer):
    def __init__(self, dim: int, head_dim: int, spec: GatedDeltaNet):
        super().__init__(dim)
        heads = dim // head_dim
        self.head_dim, self.chunk, self.grouped = head_dim, spec.chunk, spec.read == "frame"
        self.to_q, self.to_k, self.to_v, self.to_g, self.to_out = (nn.Linear(dim, dim) for _ in range(5))
        self.beta, self.decay = nn.Linear(dim, heads), nn.Linear(dim, heads, bias=False)
        self.dt_bias, self.A_log = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.head_norm, self.pre_norm = RMSNorm(head_dim, 1e-6), RMSNorm(dim, 1e-6)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        x, dtype = self.pre_norm(x_BLD), wide(x_BLD.dtype)
        q, k, v = (in_heads(F.silu(layer(x)), self.head_dim) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = (F.normalize(a.to(dtype), dim=-1).to(a.dtype) for a in (q, k))
        beta = per_token(x, self.beta.weight, self.beta.bias).sigmoid()
        speed = F.softplus(per_token(x, self.decay.weight, self.dt_bias))
        return q, k, v, beta, -self.A_log.to(dtype).exp()[:, None] * speed, in_heads(self.to_g(x), self.head_dim)

    def turned(self, parts: tuple[Tensor, ...], turn: Turn) -> tuple[Tensor, ...]:
        q, k, *others = parts
        return rotated(q, turn), rotated(k, turn), *others

    def scanned(
        self, streams: tuple[Tensor, ...], valid: Tensor, groups: tuple[int, ...], state: State
    ) -> tuple[Tensor, State]:
        q, k, v, beta, log_decay, g = streams
        there = valid[:, None]
        with torch.autocast(q.device.type, enabled=False):
            out, state = delta_rule.scan(
                q, k, v, beta * there, log_decay * there, state, self.chunk, groups if self.grouped else None
            )
        return (self.head_norm(out).to(g.dtype) * F.silu(g)), state

    def finish(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(2).to(compute_dtype(self.to_out.weight)))

    def initial_state(self, batch: int) -> State:
        heads, d = len(self.A_log), self.head_dim
        return (torch.zeros(batch, heads, d, d, dtype=wide(self.A_log.dtype), device=self.A_log.device),)
