"""How much an error counts at each time: `(path, prediction, t) → weight`, of t's shape.

A weight is stated once, on one space, and carried to the space of the prediction by its two factors (see
`prediction.py`), so that for example MinSNR gives one and the same loss whatever the network predicts.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Prediction
from kinema.diffusion.times import shifted


class Weighting(Protocol):
    def __call__(self, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Even:
    """1 on the error of the space `on`, by default the prediction's own."""

    on: Prediction | None = None

    def __call__(self, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.on is None else self.on.measure(*prediction.factors(*path.schedule(t)))


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the error of x0 (arXiv 2303.09556); with `plus_one` min(SNR + 1, gamma)."""

    gamma: float = 5.0
    plus_one: bool = False

    def __call__(self, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
        f, f_snr = prediction.factors(*path.schedule(t))
        return torch.minimum(f_snr + f if self.plus_one else f_snr, self.gamma * f)


@dataclass(frozen=True)
class EDMWeight:
    """1/σ̃² + 1/sigma_data² on the error of x0 (arXiv 2206.00364, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
        f, f_snr = prediction.factors(*path.schedule(t))
        return f_snr + f / self.sigma_data**2


@dataclass(frozen=True)
class Bell:
    """c·(exp(-2(t - ½)²) - e^-½) on the prediction's own error: 0 at both ends, mean 1 over `steps` shifted times."""

    shift: float = 5.0
    steps: int = 1000

    def __call__(self, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
        return _bell(t) / _bell_mean(self.shift, self.steps)


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)


@functools.cache
def _bell_mean(shift: float, steps: int) -> float:
    return _bell(torch.tensor(shifted(steps, shift), dtype=torch.float64)).mean().item()
