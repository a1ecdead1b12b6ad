"""What a network's output means. Each prediction is a space in which the same error can be measured.

On a path x_t = alpha·x0 + sigma·noise, every prediction knows its target, how its output becomes a clean estimate or a
noise estimate, and the two factors that carry an error weight between the spaces:

    f     = error(x0) / error(own)             f_snr = f · alpha² / sigma² = error(noise) / error(own)

both as closed forms, so that no weight ever computes 0 / 0 at t = 0 or t = 1. alpha and sigma broadcast against x0.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Prediction(Protocol):
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def to_clean(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def to_noise(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def factors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]: ...

    def measure(self, f: Tensor, f_snr: Tensor) -> Tensor:
        """error(this space) / error(own), from the factors of the prediction that owns the error."""
        ...


@dataclass(frozen=True)
class Flow:
    """noise - x0, the velocity of the straight path (arXiv 2209.03003)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def to_clean(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * out) / (alpha + sigma)

    def to_noise(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t + alpha * out) / (alpha + sigma)

    def factors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = alpha + sigma
        return (sigma / total) ** 2, (alpha / total) ** 2

    def measure(self, f: Tensor, f_snr: Tensor) -> Tensor:
        return (f.sqrt() + f_snr.sqrt()) ** 2


@dataclass(frozen=True)
class V:
    """alpha·noise - sigma·x0 where alpha² + sigma² = 1 (arXiv 2202.00512); other paths are first rescaled to that.

    `sign=-1` reads networks that put out the negative, as EDM's do.
    """

    sign: int = 1

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.sign * (alpha * noise - sigma * x0) / torch.hypot(alpha, sigma)

    def to_clean(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        norm = torch.hypot(alpha, sigma)
        return (alpha / norm * x_t - self.sign * sigma * out) / norm

    def to_noise(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        norm = torch.hypot(alpha, sigma)
        return (sigma / norm * x_t + self.sign * alpha * out) / norm

    def factors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        variance = alpha**2 + sigma**2
        return sigma**2 / variance, alpha**2 / variance

    def measure(self, f: Tensor, f_snr: Tensor) -> Tensor:
        return f + f_snr


@dataclass(frozen=True)
class Epsilon:
    """The noise (arXiv 2006.11239). It says nothing about x0 where alpha = 0: sample on paths that start above that."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def to_clean(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * out) / alpha

    def to_noise(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def factors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma / alpha) ** 2, torch.ones_like(alpha)

    def measure(self, f: Tensor, f_snr: Tensor) -> Tensor:
        return f_snr


@dataclass(frozen=True)
class Clean:
    """The data itself. It says nothing about the noise where sigma = 0."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def to_clean(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def to_noise(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * out) / sigma

    def factors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), (alpha / sigma) ** 2

    def measure(self, f: Tensor, f_snr: Tensor) -> Tensor:
        return f
