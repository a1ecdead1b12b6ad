"""Where on the path one looks: laws of training times, and the grids of samplers.

A law turns a uniform number into a time (its inverse CDF), so that any law can be stratified. Grids are tuples of
floats, decreasing from 1; the final 0 is implied. Both know the path only through its schedule's `quantile` and
`time_of`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kinema import seeds
from kinema.constants import constant
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.schedule import Schedule
from kinema.errors import UsageError
from kinema.seeds import Draw

T = TypeVar("T", float, Tensor)


class Times(Protocol):
    def sample(self, path: GaussianPath, frames: int, draw: Draw) -> Tensor:
        """Training times of a batch of videos with `frames` frames: `[B, 1]`, or `[B, frames]` where frames differ."""
        ...


class Law:
    """Times of one kind for a whole video, given by the inverse of their CDF."""

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        """u in [0, 1), float32 or float64 of any shape → times, float32."""
        raise NotImplementedError

    def sample(self, path: GaussianPath, frames: int, draw: Draw) -> Tensor:
        return self.quantile(path, draw.uniform(1))


@dataclass(frozen=True)
class Uniform(Law):
    """Every noise level equally often."""

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.schedule.quantile(u)


@dataclass(frozen=True)
class Partial(Law):
    """Uniform over the `levels` least noisy of `steps` levels."""

    levels: int
    steps: int = 1000

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.schedule.quantile(u.double() * (self.levels / self.steps))


@dataclass(frozen=True)
class LogNormalSigma(Law):
    """σ̃ = sigma / alpha = exp(mean + std·z), z standard normal (arXiv 2206.00364, table 1), on any schedule.

    σ̃ is in units of the data the network sees: on `EDM(sigma_data)` the paper's mean is `mean + ln sigma_data`.
    """

    mean: float = -1.2
    std: float = 1.2

    def sigma(self, z: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * z)

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.schedule.time_of(-(self.mean + self.std * _normal(u))).float()


@dataclass(frozen=True)
class LogitNormal(Law):
    """logit(t) = mean + std·z, z standard normal (arXiv 2403.03206, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.schedule.quantile(torch.sigmoid(self.mean + self.std * _normal(u)))


@dataclass(frozen=True)
class Shifted(Law):
    """Uniform u, warped towards noise by `shift`, then clipped to [low, high]."""

    shift: float = 5.0
    low: float = 0.0
    high: float = 1.0

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return warp(path.schedule.quantile(u), self.shift).clamp(self.low, self.high)


@dataclass(frozen=True)
class NearData(Law):
    """(1 - u)^power, at least `low`: 2 favours little noise, with density 1 / (2√t) and mean 1/3; 1 is uniform."""

    power: float = 2.0
    low: float = 1e-3

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return ((1 - u) ** self.power).clamp(min=self.low).float()


@dataclass(frozen=True)
class Below(Law):
    """Every noise level below `most` equally often: frames near the clean end, or, at 0, clean."""

    most: float = 0.0

    def quantile(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.schedule.quantile(u) * self.most


@dataclass(frozen=True)
class PerChunk:
    """An independent time for every chunk of `chunk` frames (1: for every frame), as diffusion forcing trains.

    With `first_alone` frame 0 is a chunk of its own. Raises where the frames do not fill their chunks.
    """

    base: Times = field(default_factory=Shifted)
    chunk: int = 3
    first_alone: bool = False

    def sample(self, path: GaussianPath, frames: int, draw: Draw) -> Tensor:
        lengths = Chunks(self.chunk, self.first_alone).lengths(frames)
        each = [self.base.sample(path, 1, draw.fold(i)).expand(-1, n) for i, n in enumerate(lengths)]
        return torch.cat(each, dim=1)


@dataclass(frozen=True)
class SomeShared:
    """An independent time for every frame, but one for all frames in a fraction `shared` of the samples."""

    base: Times = field(default_factory=Shifted)
    shared: float = 0.5

    def sample(self, path: GaussianPath, frames: int, draw: Draw) -> Tensor:
        each = PerChunk(self.base, 1).sample(path, frames, draw)
        return torch.where(draw.fold("shared").uniform(1) < self.shared, each[:, :1], each)


def index_per_chunk(n: int, lengths: Sequence[int], draw: Draw) -> Tensor:
    """`[B, T]` int64 in 0..n-1, drawn for each chunk of the given lengths."""
    drawn = [(draw.fold(i).uniform(1) * n).long().clamp(max=n - 1) for i in range(len(lengths))]
    return torch.cat([index.expand(-1, length) for index, length in zip(drawn, lengths, strict=True)], dim=1)


@dataclass(frozen=True)
class Stratified:
    """One sample of the global batch in each of N equal strata of the base law, in an order drawn anew every step.

    The sample at place i of N takes the quantile (π(i) + u) / N: π is a permutation that every rank computes alike, u
    the sample's own uniform number. So each row follows the base law on its own while the batch covers it evenly, on
    any number of ranks and without communication.
    """

    base: Law = field(default_factory=Uniform)

    def sample(self, path: GaussianPath, frames: int, draw: Draw) -> Tensor:
        order = seeds.permutation(draw.count, draw.shared, "strata").to(draw.place.device, non_blocking=True)
        return self.base.quantile(path, strata(order[draw.place], draw.uniform(1)[:, 0], draw.count)[:, None])


def shares_strata(*laws: Times | None) -> bool:
    """Whether one of these laws is `Stratified`, inside another or not: what it draws is decided on the host."""
    return any(
        isinstance(law, Stratified) or (isinstance(law, PerChunk | SomeShared) and shares_strata(law.base))
        for law in laws
    )


def strata(stratum: Tensor, u: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float64: `u` `[B]` inside stratum `[B]` (0 … count - 1) of `count`."""
    return (stratum.double() + u.double()) / count


@constant
def listed(times: tuple[float, ...], device: torch.device) -> Tensor:
    """Times as a float32 tensor `[n]`, moved to the device once."""
    return torch.tensor(times, dtype=torch.float32, device=device)


def _normal(u: Tensor) -> Tensor:
    """The standard normal number at quantile u; the ends are half of a float32 uniform's spacing away from infinity."""
    return torch.special.ndtri(u.double().clamp(2.0**-25, 1 - 2.0**-25))


def warp(u: T, shift: float) -> T:
    """shift·u / (1 + (shift - 1)·u): spends more of a uniform time on noise (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def unwarp(t: T, shift: float) -> T:
    """The inverse of `warp`."""
    return t / (shift - (shift - 1) * t)


def warped(times: Iterable[float], shift: float) -> tuple[float, ...]:
    """A list of times, each warped, for example `steps_at = warped((1, 0.75, 0.5, 0.25), shift=5)`."""
    return tuple(warp(float(u), shift) for u in times)


def trailing(n: int) -> tuple[float, ...]:
    """n times 1 - j/n (arXiv 2305.08891, table 2): starts at pure noise."""
    return tuple((n - j) / n for j in range(n))


def shifted(n: int, shift: float = 5.0) -> tuple[float, ...]:
    """n times: `trailing(n)`, warped. UsageError for fewer than one."""
    if n < 1:
        raise UsageError(f"{n} steps make no video; take 1 step or more")
    return warped(trailing(n), shift)


def leading(n: int, steps: int = 1000) -> tuple[float, ...]:
    """n levels ⌊K/n⌋ apart that start at the cleanest and leave out the noisiest; for parity with models trained so."""
    return tuple((j * (steps // n) + 1) / steps for j in reversed(range(n)))


def linspace(n: int, steps: int = 1000) -> tuple[float, ...]:
    """n levels evenly from the noisiest to the cleanest, both included (n = 1: the noisiest)."""
    return tuple((round((steps - 1) * (n - 1 - j) / max(n - 1, 1)) + 1) / steps if j else 1.0 for j in range(n))


def sat_trailing(n: int) -> tuple[float, ...]:
    """n levels ⌊999·(1 - j/n)⌋ of 1000, as the first CogVideoX sampler lists them; only for comparisons with it."""
    return tuple((999 * (n - j) // n + 1) / 1000 for j in range(n))


def karras(
    schedule: Schedule, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """n noise levels σ̃, evenly spaced in σ̃^(1/rho) (arXiv 2206.00364, eq. 5), as times of the schedule.

    σ̃ is in units of the data the network sees: on `EDM(sigma_data)` the paper's grid is that of its own limits divided
    by sigma_data. Levels that the schedule cannot tell apart are listed once, so there may be fewer than n.
    """
    sigma = karras_sigmas(n, sigma_min, sigma_max, rho)
    return tuple(dict.fromkeys(schedule.time_of(-sigma.log()).tolist()))


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`[n]` float64, decreasing: the σ̃ of `karras`."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho
