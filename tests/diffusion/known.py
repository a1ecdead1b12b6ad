"""What the tests of this folder share: the schedules, keyed draws, and denoisers known in closed form."""

import math

import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Clean, Epsilon, Flow, V
from kinema.diffusion.schedule import EDM, LegacyDDPM, RectifiedFlow, ZeroSNR

SCHEDULES = [RectifiedFlow(), ZeroSNR(), ZeroSNR(shift=3.0), LegacyDDPM(), EDM()]
PREDICTIONS = [Flow(), V(), V(-1), Epsilon(), Clean()]
MODES = ((0.3, -1.0, 0.2), (0.7, 1.0, 0.1))  # share, mean, deviation
MEAN, STD = 0.3, 0.5  # of the Gaussian


def name_of(value) -> str:
    """A short test id."""
    text = repr(value).replace("steps=1000, beta=(0.00085, 0.012), keep_start=False, shift_after=False", "")
    return text.replace("sigma_min=0.002, sigma_max=80.0, rho=7.0, sigma_data=0.5", "").replace(", )", ")")


def draw(n: int, name: str = "test", **options) -> seeds.Keys:
    return seeds.keys(0, name, range(n), **options)


def mixture(path: GaussianPath):
    """E[x0 | x_t] of the mixture."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.at(t.double(), x)
        logits, means = [], []
        for share, mean, std in MODES:
            variance = alpha**2 * std**2 + sigma**2
            logits.append(math.log(share) - 0.5 * variance.log() - 0.5 * (x - alpha * mean) ** 2 / variance)
            means.append(mean + alpha * std**2 / variance * (x - alpha * mean))
        return (torch.softmax(torch.stack(logits), 0) * torch.stack(means)).sum(0).to(x.dtype)

    return denoise


def of_mixture(n: int, *shape: int) -> Tensor:
    """`[n, *shape]` samples of the mixture."""
    (share, low, low_std), (_, high, high_std) = MODES
    z, lower = draw(n, "mixture").normal(*shape), draw(n, "mode").uniform(*shape) < share
    return torch.where(lower, low + low_std * z, high + high_std * z)


def gaussian(path: GaussianPath):
    """E[x0 | x_t] of N(MEAN, STD²)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.at(t.double(), x)
        shrink = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return (MEAN + shrink * (x - alpha * MEAN)).to(x.dtype)

    return denoise
