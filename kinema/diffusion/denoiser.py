"""A network read as a denoiser. Its two faces: an estimate of the clean video, and how wrong that estimate is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.logits import Head, Logits, cross_entropy
from kinema.diffusion.path import GaussianPath, offset_noise
from kinema.diffusion.prediction import Prediction
from kinema.diffusion.token_path import Start, TokenPath
from kinema.seeds import Draw

Cond = dict[str, Tensor]  # the backbone's keyword arguments


@dataclass(frozen=True, eq=False)
class LatentDenoiser:
    """A backbone, the path it was trained on, and what its output means.

    Videos are `[B, T, C, H, W]`, times `[B, 1]` or `[B, T]`. The backbone is called as `backbone(x, timestep, **cond)`
    in float32 and casts to its compute dtype itself.
    """

    backbone: Callable[..., Tensor]
    path: GaussianPath
    predicts: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, **cache: Any) -> Tensor:
        """The clean estimate, at least float32. `cache` are further arguments of a causal backbone."""
        x_t = _wide(x_t)
        return self.predicts.to_clean(self._out(x_t, t, cond, **cache), x_t, *self.path.at(t, x_t))

    def loss(self, x0: Tensor, t: Tensor, cond: Cond, draw: Draw, offset: float = 0.0, **cache: Any) -> Tensor:
        """Mean squared error of each frame `[B, T]`, float32, unweighted, in the prediction's own space.

        Noise is drawn from `draw.fold("noise")`; `offset` adds offset noise of that level, from `draw.fold("offset")`.
        """
        x0 = _wide(x0)
        noise = draw.fold("noise").normal(*x0.shape[1:])
        noise = offset_noise(noise, draw.fold("offset"), offset) if offset else noise
        out = self._out(self.path.mix(x0, noise, t), t, cond, **cache)
        return (out - self.predicts.target(x0, noise, *self.path.at(t, x0))).square().flatten(2).mean(2)

    def _out(self, x_t: Tensor, t: Tensor, cond: Cond, **cache: Any) -> Tensor:
        return _wide(self.backbone(x_t, self.path.schedule.timestep(t), **cond, **cache))


@dataclass(frozen=True, eq=False)
class TokenDenoiser:
    """The same two faces on tokens `[B, T, H, W]`: the backbone gives one hidden row per token, the head makes logits
    of it, `rows` tokens at a time. What exists only for latents, a prediction's space, is None.
    """

    backbone: Callable[..., Tensor]
    head: Head
    path: TokenPath
    start: Start = Start()
    rows: int = 1024
    predicts: None = None

    def begin(self, shape: tuple[int, ...], draw: Draw) -> tuple[Tensor, dict[str, Any]]:
        """What a one-step student starts from: tokens `[B, T, H, W]`, and what its first pass is told about them."""
        x = self.start.tokens(self.path, shape, draw)
        if not self.start.embed_noise:
            return x, {}
        width = self.backbone.size.dim  # type: ignore[attr-defined]
        return x, {"sigma": self.start.embed_noise, "noise": draw.fold("embedding").normal(*shape[1:], width)}

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, **extra: Any) -> Logits:
        """The estimate: logits of the clean token at every place. `extra` are further arguments of the backbone."""
        hidden = self.backbone(x_t, self.path.schedule.timestep(t), **cond, **extra)
        return Logits(hidden, self.head, hidden.dtype, self.rows)

    def loss(self, x0: Tensor, t: Tensor, cond: Cond, draw: Draw, smoothing: float = 0.0, **extra: Any) -> Tensor:
        """Mean cross-entropy of each frame's tokens `[B, T]`, at least float32; of a masked path, the masked tokens'.

        x_t is drawn from `draw.fold("noise")`.
        """
        x_t = self.path.corrupt(x0, t, draw.fold("noise"))
        return self.error(x_t, x0, t, cond, smoothing, **extra)

    def error(self, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, smoothing: float = 0.0, **extra: Any) -> Tensor:
        """`loss` of an x_t that is given."""
        each = cross_entropy(self(x_t, t, cond, **extra), x0, smoothing).flatten(2)
        noisy = self.path.noisy(x_t)
        if noisy is None:
            return each.mean(2)
        counted = noisy.flatten(2).to(each.dtype)
        return (each * counted).sum(2) / counted.sum(2).clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
