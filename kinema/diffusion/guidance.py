"""Classifier-free guidance (arXiv 2207.12598): a denoiser under two conditions becomes one function of (x_t, t).

Estimates are tensors, or logits of tokens, which add and multiply alike.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, T, …], t [B, 1 or T]) → clean estimate
Scale = float | Callable[[Tensor], Tensor]  # w, or w as a function of t


class Memory(Protocol):
    """What a causal denoiser keeps of the frames that are made; it is given to it as `cache=`."""

    def reset(self) -> None:
        """Forgets everything: another video begins."""
        ...

    def rewind(self) -> None:
        """Forgets the frames but not the text."""
        ...

    def forget_text(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Branches:
    """A memory for each of the two conditions of a guided causal denoiser."""

    cond: Memory
    uncond: Memory

    def reset(self) -> None:
        self.cond.reset()
        self.uncond.reset()

    def rewind(self) -> None:
        self.cond.rewind()
        self.uncond.rewind()

    def forget_text(self) -> None:
        self.cond.forget_text()
        self.uncond.forget_text()


def guided(
    denoiser: Callable[..., Tensor],
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor],
    scale: Scale,
    batched: bool = False,
) -> Callable[..., Tensor]:
    """uncond + w·(cond - uncond), a `Denoise`. w = 1 is no guidance and costs one pass.

    `batched` runs both conditions as one batch of 2B (faster, more memory), otherwise in turn: equal results. The
    result also takes `where`, which is False for a call without guidance, of one pass, or a mask of t's shape. Further
    arguments go to the denoiser; `cache=` is one for the batch of 2B, `Branches` in turn, or one where w = 1.
    """

    def denoise(x_t: Tensor, t: Tensor, where: Tensor | bool = True, **more: Any) -> Tensor:
        if scale == 1 or where is False:
            return denoiser(x_t, t, dict(cond), **more)
        without, with_ = under_both(denoiser, x_t, t, cond, uncond, batched, **more)
        w = scale(t) if callable(scale) else scale
        if isinstance(where, Tensor):
            w = torch.where(where, w, 1.0)
        if isinstance(w, Tensor):
            dtype = x_t.dtype if x_t.is_floating_point() else t.dtype  # tokens are integers
            w = w.reshape(*t.shape, *[1] * (x_t.ndim - t.ndim)).to(dtype)
        return without + w * (with_ - without)

    return denoise


def under_both(
    denoiser: Callable[..., Tensor],
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor],
    batched: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """The estimates without and with the condition; `batched` and further arguments as in `guided`."""
    if batched:
        stacked = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
        without, with_ = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), stacked, **more).chunk(2)
        return without, with_
    caches: Branches | None = more.pop("cache", None)
    if caches is None:
        return denoiser(x_t, t, dict(uncond), **more), denoiser(x_t, t, dict(cond), **more)
    without = denoiser(x_t, t, dict(uncond), cache=caches.uncond, **more)
    return without, denoiser(x_t, t, dict(cond), cache=caches.cond, **more)


def in_parts(
    denoiser: Callable[..., Tensor],
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor],
    scale: float,
    batched: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `guided` gives, and the estimates without and with the condition; with w = 1 all are one pass's."""
    if scale == 1:
        estimate = denoiser(x_t, t, dict(cond))
        return estimate, estimate, estimate
    without, with_ = under_both(denoiser, x_t, t, cond, uncond, batched)
    return without + scale * (with_ - without), without, with_


@dataclass(frozen=True)
class Above:
    """w(t) = scale where t > `above`, and 1, no guidance, in the cleaner rest."""

    scale: float
    above: float = 0.1

    def __call__(self, t: Tensor) -> Tensor:
        return torch.where(t > self.above, self.scale, 1.0)


@dataclass(frozen=True)
class Cosine:
    """w(t) = 1 + scale·(1 - cos(π·t^exponent)) / 2: 1 + scale in noise, 1 in data; the reverse if not `falling`."""

    scale: float = 6.0
    exponent: float = 5.0
    falling: bool = True

    def __call__(self, t: Tensor) -> Tensor:
        return 1 + self.scale * (1 - torch.cos(math.pi * (t if self.falling else 1 - t) ** self.exponent)) / 2


@dataclass(frozen=True)
class DynamicSAT:
    """The guidance of CogVideoX's published samples: `Cosine` of (steps - k) / steps, k the level 0 … 999.

    Meant as progress, it is not one and looks random over the steps; use `Cosine` unless a sample is to be reproduced.
    """

    scale: float = 6.0
    exponent: float = 5.0
    steps: int = 50

    def __call__(self, t: Tensor) -> Tensor:
        k = (t.double() * 1000).round() - 1  # float64: the power reaches millions before the cosine takes it
        return Cosine(self.scale, self.exponent)((self.steps - k) / self.steps)
