"""The Gaussian path x_t = alpha·x0 + sigma·noise: its start, its corruption of data, its steps towards an estimate.

Shapes: videos `[B, T, …]`, times `[B, 1]` (one for all frames) or `[B, T]`. All arithmetic is float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.diffusion.schedule import RectifiedFlow, Schedule
from kinema.seeds import Draw


@dataclass(frozen=True)
class GaussianPath:
    schedule: Schedule = RectifiedFlow()

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t, shaped to multiply the videos x."""
        alpha, sigma = self.schedule(t)
        shape = (*t.shape, *[1] * (x.ndim - t.ndim))
        return alpha.reshape(shape), sigma.reshape(shape)

    def log_snr_half(self, t: Tensor) -> Tensor:
        """λ = ln(alpha / sigma); +inf at t = 0, and -inf where nothing of the data is left."""
        alpha, sigma = self.schedule(t)
        return alpha.log() - sigma.log()

    def prior(self, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """x at t = 1: standard normal `[B, T, …]`; `shape` includes B."""
        return draw.normal(*shape[1:])

    def mix(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the given data and noise; at t = 0 exactly x0."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0.float() + sigma * noise

    def corrupt(self, x0: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """x_t of the data, with fresh noise."""
        return self.mix(x0, draw.normal(*x0.shape[1:]), t)

    def raise_noise(self, x_t: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        """x_t → x_s for s > t, by the path's own forward kernel q(x_s | x_t)."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t.double(), x_t), self.at(s.double(), x_t)
        keep = alpha_s / alpha_t
        spread = (sigma_s**2 - (keep * sigma_t) ** 2).clamp_min(0).sqrt()
        return keep.to(x_t.dtype) * x_t + spread.to(x_t.dtype) * draw.normal(*x_t.shape[1:])

    def step(
        self, x_t: Tensor, t: Tensor, s: Tensor, estimate: Tensor, draw: Draw | None = None, eta: float = 0.0
    ) -> Tensor:
        """x_t → x_s for s < t, given the clean estimate: DDIM (arXiv 2010.02502, eq. 12) on any Gaussian path.

        x_s = alpha_s·x̂0 + √(sigma_s² - c²)·n̂ + c·z, with c = eta·(the spread of q(x_s | x_t, x0)), at most sigma_s.
        eta = 0 is deterministic and needs no draw. At s = 0 the result is the estimate.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t.double(), x_t), self.at(s.double(), x_t)
        sigma_t = torch.where(sigma_t > 0, sigma_t, 1)  # frames already clean have no noise to scale
        shrink = alpha_t * sigma_s / (alpha_s * sigma_t)  # e^-h, h the gain in λ; 0 when coming from pure noise
        c = (eta * sigma_s * (1 - shrink**2).clamp_min(0).sqrt()).minimum(sigma_s)
        noise = (sigma_s**2 - c**2).clamp_min(0).sqrt() / sigma_t
        x_s = noise.to(x_t.dtype) * x_t + (alpha_s - noise * alpha_t).to(x_t.dtype) * estimate
        if eta == 0:
            return x_s
        if draw is None:
            raise ValueError("a step with eta > 0 draws noise; give it a draw")
        return x_s + c.to(x_t.dtype) * draw.normal(*x_t.shape[1:])


def offset_noise(noise: Tensor, draw: Draw, level: float) -> Tensor:
    """Noise plus `level` times one standard normal number per sample, which lets a model learn overall brightness."""
    return noise + level * draw.normal().reshape(-1, *[1] * (noise.ndim - 1))
