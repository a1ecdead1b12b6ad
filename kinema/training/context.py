"""One video on several ranks, each of which has some consecutive segments of it.

Attention needs the last frame of the rank before; a mixer's scan needs all tokens, so ranks trade tokens for heads
around it (arXiv 2309.14509). What a loss reads is whole on every rank: all of them compute the same loss, and each gets
the part of its gradient that belongs to its own tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from kinema.models.cogvideox.long import LongBlock
from kinema.models.cogvideox.transformer import CogVideoXTransformer


class ContextRanks:
    """The ranks of a context group, in the order of their segments; see `models.ttt.ranks`."""

    def __init__(self, mesh: DeviceMesh):
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def heads(self, x: Tensor, longest: int) -> Tensor:
        own = x.shape[2]
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, longest - own))
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)  # to each rank its heads
        traded = _Trade.apply(parts, self.group)  # of each rank its tokens
        return traded.movedim(0, 2).flatten(2, 3)  # type: ignore[union-attr]

    def tokens(self, x: Tensor, own: int) -> Tensor:
        parts = x.unflatten(2, (self.size, -1)).movedim(2, 0)
        traded = _Trade.apply(parts, self.group)
        return traded.movedim(0, 1).flatten(1, 2)[:, :, :own]  # type: ignore[union-attr]

    def from_left(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return _FromLeft.apply(x, count, self)  # type: ignore[return-value]

    def from_right(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _FromRight.apply(x, self)  # type: ignore[return-value]

    def whole(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        return _Whole.apply(x, tuple(lengths), self)  # type: ignore[return-value]

    def shift(self, x: Tensor, to: int) -> Tensor:
        """What the neighbour on the other side gave, if every rank gives x to that `to` places on; zeros at an end."""
        x, got, requests = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format), []
        if 0 <= self.rank + to < self.size:
            requests.append(dist.P2POp(dist.isend, x, group=self.group, group_peer=self.rank + to))
        if 0 <= self.rank - to < self.size:
            requests.append(dist.P2POp(dist.irecv, got, group=self.group, group_peer=self.rank - to))
        for work in dist.batch_isend_irecv(requests):
            work.wait()
        return got


def share(module: nn.Module, ranks: ContextRanks) -> None:
    """Lets a long network take its part of each video."""
    assert isinstance(module, CogVideoXTransformer) and module.long is not None, "`parallel.check` comes first"
    module.long.ranks = ranks
    for block in module.blocks:
        assert isinstance(block, LongBlock)
        block.attn.ranks = ranks
        if block.mixer is not None:
            block.mixer.ranks = ranks


class _Trade(torch.autograd.Function):
    """`[n, …]`: part r goes to rank r, and what comes from rank r is part r."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _traded(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return _traded(grad, ctx.group), None


def _traded(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    got = torch.empty_like(parts)
    dist.all_to_all_single(got, parts, group=group)
    return got


class _FromLeft(torch.autograd.Function):
    """x itself, which must be used so that every rank takes part in the way back, and the last `count` rows along dim 1
    of the rank to the left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, ranks: ContextRanks) -> tuple[Tensor, Tensor]:
        ctx.count, ctx.ranks = count, ranks
        return x.view_as(x), ranks.shift(x[:, -count:], 1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_left: Tensor):  # type: ignore[override]
        grad = grad_x.clone()
        grad[:, -ctx.count :] += ctx.ranks.shift(grad_left, -1)
        return grad, None, None


class _FromRight(torch.autograd.Function):
    """x itself, as above, and the first row along dim 1 of the rank to the right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ContextRanks) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        return x.view_as(x), ranks.shift(x[:, :1], -1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_right: Tensor):  # type: ignore[override]
        grad = grad_x.clone()
        grad[:, :1] += ctx.ranks.shift(grad_right, 1)
        return grad, None


class _Whole(torch.autograd.Function):
    """All ranks' rows along dim 1, one rank after the other.

    Sharding averages gradients over these ranks too, each of which has a part of the sum; hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], ranks: ContextRanks) -> Tensor:
        ctx.lengths, ctx.ranks = lengths, ranks
        own = x.new_zeros(len(x), max(lengths), *x.shape[2:])
        own[:, : x.shape[1]] = x
        got = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(got, own, group=ranks.group)
        return torch.cat([part[:, :length] for part, length in zip(got, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        start = sum(ctx.lengths[: ctx.ranks.rank])
        return grad[:, start : start + ctx.lengths[ctx.ranks.rank]] * ctx.ranks.size, None, None
