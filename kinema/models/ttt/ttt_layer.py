"""The mixers `ttt_linear` and `ttt_mlp` (arXiv 2407.04620, 2504.05298): fast weights that learn to tell a value from
its key. Their defaults are those of the public reference, which their numbers are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import UsageError
from kinema.models.layers import LayerNorm, compute_dtype, wide
from kinema.models.ttt.door import scan_fast_weights
from kinema.models.ttt.mixer import Mixer, Passes, Walk, in_heads, normal, per_token, rotated
from kinema.models.ttt.order import Kind
from kinema.models.ttt.replay import State
from kinema.models.ttt.turn import Turn


@dataclass(frozen=True)
class _FastWeights:
    """mini_batch  tokens that share one step; n, by which rates are divided, does not change with it
    spread      the deviation of the first W1

    base_lr times a learned number between 0 and 1, divided by n and by the head dim, is the step of a token. Keys have
    length 1; so with the public reference's spread of 0.02 what W1 says is nearly 0, of which LN makes so much that
    the first mini-batch fills the memory, and at first all keys get its answer.
    """

    mini_batch: int = 64
    base_lr: float = 0.1
    n: int = 64
    passes: Passes = "sequential"
    order: Kind = "reference"
    spread: float = 0.02

    def __post_init__(self):
        if self.mini_batch < 1 or self.n < 1 or not self.base_lr > 0 or not self.spread > 0:
            raise UsageError(
                f"mini_batch {self.mini_batch}, n {self.n}, base_lr {self.base_lr:g}, spread {self.spread:g}: the "
                "first two must be 1 or more, the others above 0"
            )

    @property
    def walk(self) -> Walk:
        return Walk(multiple=self.mini_batch)

    def heads_of(self, heads: int) -> int:
        return heads

    def check(self, dim: int, head_dim: int) -> None:
        pass

    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Of the inner network."""
        raise NotImplementedError

    def build(self, dim: int, head_dim: int) -> "TTTLayer":
        return TTTLayer(dim, head_dim, self.widths(head_dim), self.mini_batch, self.base_lr / self.n)

    def init(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        if name in ("out_norm.weight", "target_norm.weight"):
            return torch.ones(*shape)
        if name.endswith("bias") or name in ("b1", "b2"):
            return torch.zeros(*shape)
        return normal(shape, self.spread if name == "W1" else 0.02, generator)


@dataclass(frozen=True)
class TTTLinear(_FastWeights):
    mini_batch: int = 16
    base_lr: float = 1.0
    n: int = 16

    kind = "ttt_linear"

    def widths(self, head_dim: int) -> tuple[int, ...]:
        return head_dim, head_dim


@dataclass(frozen=True)
class TTTMLP(_FastWeights):
    kind = "ttt_mlp"

    def widths(self, head_dim: int) -> tuple[int, ...]:
        return head_dim, 4 * head_dim, head_dim


class TTTLayer(Mixer):
    """`widths` are those of the inner network, `rate` the base learning rate over n."""

    def __init__(self, dim: int, head_dim: int, widths: tuple[int, ...], mini_batch: int, rate: float):
        super().__init__(dim)
        heads = dim // head_dim
        self.head_dim, self.mini_batch, self.rate = head_dim, mini_batch, rate
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.out_norm = LayerNorm(dim, 1e-6)
        self.target_norm = Affine(heads, head_dim)
        self.lr = Affine(heads, dim, bias=(heads,))
        for n, (here, there) in enumerate(pairwise(widths), 1):
            self.register_parameter(f"W{n}", nn.Parameter(torch.empty(heads, here, there)))
            self.register_parameter(f"b{n}", nn.Parameter(torch.empty(heads, 1, there)))
        self.layers = len(widths) - 1

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        dtype = wide(x_BLD.dtype)
        q, k, v = (in_heads(layer(x_BLD), self.head_dim) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = (F.normalize(x.to(dtype), dim=-1).to(x.dtype) for x in (q, k))
        eta = self.rate / self.head_dim * torch.sigmoid(per_token(x_BLD, self.lr.weight, self.lr.bias))
        return q, k, v, eta

    def turned(self, parts: tuple[Tensor, ...], turn: Turn) -> tuple[Tensor, ...]:
        q, k, v, eta = parts
        q, k = rotated(q, turn), rotated(k, turn)
        dtype = wide(q.dtype)
        u = v.to(dtype) - k.to(dtype)
        u = (u - u.mean(-1, keepdim=True)) / (u.std(-1, keepdim=True) + 1e-8)
        weight, bias = self._norm(dtype)
        return q, k, (u * weight[:, None] + bias[:, None]).to(q.dtype), eta

    def scanned(
        self, streams: tuple[Tensor, ...], valid: Tensor, groups: tuple[int, ...], state: State
    ) -> tuple[Tensor, State]:
        q, k, target, eta = streams
        norm = self.own(self._norm(wide(q.dtype)), dim=0)
        return scan_fast_weights(q, k, target, eta * valid[:, None], state, (norm[0], norm[1]), self.mini_batch)

    def finish(self, out: Tensor) -> Tensor:
        return self.to_out(self.out_norm(out.transpose(1, 2).flatten(2)).to(compute_dtype(self.to_out.weight)))

    def initial_state(self, batch: int) -> State:
        named = [getattr(self, f"{letter}{n}") for n in range(1, self.layers + 1) for letter in "Wb"]
        return tuple(p.to(wide(p.dtype)).expand(batch, *p.shape) for p in named)

    def _norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.target_norm.weight.to(dtype), self.target_norm.bias.to(dtype)


class Affine(nn.Module):
    """A weight for each head, and a bias."""

    def __init__(self, *shape: int, bias: tuple[int, ...] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(bias or shape))
