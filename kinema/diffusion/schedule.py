"""Noise schedules: how much data (alpha) and how much noise (sigma) a time holds, and what the network calls that time.

A schedule is a value: a frozen dataclass with no tensors. Tables are computed in float64 from its fields and kept once
per device. Every method takes times of any shape and answers in the dtype of the times: networks and losses use
float32, samplers lift float32 times to float64.

t    amount of noise, 0 = data, 1 = noise
λ    ln(alpha / sigma), half of the log signal-to-noise ratio; +inf at t = 0
σ̃    sigma / alpha = exp(-λ), the noise per unit of data
k    integer noise level of a tabulated schedule, 0 = least noise; t = (k + 1) / K
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kinema.constants import constant


class Schedule(Protocol):
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the times t, of t's shape; exactly (1, 0) at t = 0."""
        ...

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told, float32."""
        ...

    def time_of(self, log_snr_half: Tensor) -> Tensor:
        """The time whose λ is the given one (the nearest there is); +inf gives 0, -inf gives 1."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """u in [0, 1) → time, such that uniform u make every noise level equally likely."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path x_t = (1 - t)·x0 + t·noise (arXiv 2209.03003); the network is told 1000·t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        return t.float() * 1000

    def time_of(self, log_snr_half: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr_half)

    def quantile(self, u: Tensor) -> Tensor:
        return u.float()


class Tabulated:
    """K noise levels from a table of ᾱ = alpha². Times off the grid snap to the nearest level."""

    steps: int
    beta: tuple[float, float]

    def abar(self) -> Tensor:
        """`[K]` float64: ᾱ of level k."""
        raise NotImplementedError

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = _table(self, t.device)[:, self._row(t)].to(t.dtype)
        return alpha, sigma

    def timestep(self, t: Tensor) -> Tensor:
        return self._row(t).float() - 1

    def time_at(self, k: Tensor) -> Tensor:
        """The time of level k; `timestep` is its inverse."""
        return (k + 1).float() / self.steps

    def time_of(self, log_snr_half: Tensor) -> Tensor:
        row = torch.bucketize(-log_snr_half.double(), _borders(self, log_snr_half.device))
        return row.float() / self.steps

    def quantile(self, u: Tensor) -> Tensor:
        k = (u.double() * self.steps).floor().clamp(0, self.steps - 1)
        return self.time_at(k)

    def _row(self, t: Tensor) -> Tensor:
        # always from float32, so that a sampler's float64 coefficients and the network's timestep snap alike
        return (t.float() * self.steps).round().long().clamp(0, self.steps)


@dataclass(frozen=True)
class ZeroSNR(Tabulated):
    """Scaled-linear betas, an SNR shift, and a rescale to zero terminal SNR (arXiv 2305.08891): CogVideoX's schedule.

    shift        divides the SNR of every level, before the rescale or, with `shift_after`, after it
    keep_start   starts the betas lower, so that level 0 is as noisy as without the shift
    """

    shift: float = 1.0
    steps: int = 1000
    beta: tuple[float, float] = (0.00085, 0.012)
    keep_start: bool = False
    shift_after: bool = False

    def abar(self) -> Tensor:
        first, last = self.beta
        if self.keep_start:
            first = first / (self.shift + (1 - self.shift) * first)
        abar = torch.cumprod(1 - _betas(first, last, self.steps), dim=0)
        return self._shifted(_rescaled(abar)) if self.shift_after else _rescaled(self._shifted(abar))

    def _shifted(self, abar: Tensor) -> Tensor:
        return abar / (self.shift + (1 - self.shift) * abar)


@dataclass(frozen=True)
class LegacyDDPM(Tabulated):
    """The same betas, neither shifted nor rescaled: σ̃ from 0.0292 to 14.61 and no zero terminal SNR."""

    steps: int = 1000
    beta: tuple[float, float] = (0.00085, 0.012)

    def abar(self) -> Tensor:
        return torch.cumprod(1 - _betas(*self.beta, self.steps), dim=0)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 (arXiv 2206.00364) in variance-preserving coordinates, for data divided by `sigma_data`.

    The paper's noise level σ(t) = (σmin^1/ρ + t·(σmax^1/ρ - σmin^1/ρ))^ρ is σ̃·sigma_data here. Its network output is
    -v, so it is read by `V(sign=-1)`; its c_in·x is x_t and its c_noise = ln(σ) / 4 is `timestep`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def sigma(self, t: Tensor) -> Tensor:
        """The paper's noise level σ(t)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)) ** self.rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.where(t == 0, 0, self.sigma(t))  # σmin is where sampling ends, not what clean data holds
        norm = torch.sqrt(sigma**2 + self.sigma_data**2)
        return self.sigma_data / norm, sigma / norm

    def timestep(self, t: Tensor) -> Tensor:
        return self.sigma(t.float()).log() / 4

    def time_of(self, log_snr_half: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = torch.exp((math.log(self.sigma_data) - log_snr_half) / self.rho)
        # finite noise below σmin is the least noise there is, not none
        return torch.where(log_snr_half == math.inf, 0, ((root - low) / (high - low)).clamp(2.0**-24, 1))

    def quantile(self, u: Tensor) -> Tensor:
        return u.float()


def _betas(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2


def _rescaled(abar: Tensor) -> Tensor:
    """√ᾱ moved and stretched so that the last level is pure noise and the first is kept."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@constant
def _table(schedule: Tabulated, device: torch.device) -> Tensor:
    """`[2, K + 1]` float64: alpha and sigma of t = row / K, clean data in row 0."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.abar()])
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()]).to(device)


@constant
def _borders(schedule: Tabulated, device: torch.device) -> Tensor:
    """`[K]` float64, ascending: -λ half way between neighbouring rows; only an infinite λ reaches an infinite row."""
    alpha, sigma = _table(schedule, torch.device("cpu"))
    log_snr_half = alpha.log() - sigma.log()
    middle = -(log_snr_half[1:] + log_snr_half[:-1]) / 2
    largest = torch.finfo(torch.float64).max
    return middle.clamp(-largest, largest).to(device)
