"""A network read as a denoiser. Its two faces: an estimate of the clean video, and how wrong that estimate is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.path import GaussianPath, offset_noise
from kinema.diffusion.prediction import Prediction
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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
