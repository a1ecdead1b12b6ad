"""Samplers: `(denoise, path, x, times, draw) → x0`, for any Gaussian path and any clean-estimating `denoise(x_t, t)`.

`times` is decreasing in (0, 1]; the final 0 is implied, and the last step always returns the estimate. Coefficients are
Python floats computed in float64 on the host, so a step never waits for the device. State between steps is local.

s → u     the step from the current level to the next cleaner one
h         λ_u - λ_s, λ = ln(alpha / sigma); infinite when leaving pure noise or reaching data: limits are written out
shrink    e^-h = alpha_s·sigma_u / (alpha_u·sigma_s), finite everywhere
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kinema.diffusion.guidance import Denoise
from kinema.diffusion.path import GaussianPath
from kinema.seeds import Draw

Each = Callable[[int], None]  # told how many steps are done


class Sampler(Protocol):
    def __call__(
        self, denoise: Denoise, path: GaussianPath, x: Tensor, times: Sequence[float], draw: Draw, each: Each = ...
    ) -> Tensor:
        """From noise x `[B, T, …]` at times[0] to a clean video. Step i draws from `draw.fold(i)`."""
        ...


class Level(NamedTuple):
    time: float
    alpha: float
    sigma: float

    @property
    def log_snr_half(self) -> float:
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    def of(self, x: Tensor) -> Tensor:
        """This level's time for every video of x, `[B, 1]` float32."""
        return torch.full((len(x), 1), self.time, device=x.device)


class Step(NamedTuple):
    index: int
    s: Level
    u: Level

    @property
    def last(self) -> bool:
        return self.u.sigma == 0

    @property
    def h(self) -> float:
        return self.u.log_snr_half - self.s.log_snr_half

    @property
    def shrink(self) -> float:
        return self.s.alpha * self.u.sigma / (self.u.alpha * self.s.sigma)


def steps(path: GaussianPath, times: Sequence[float], each: Each | None = None) -> Iterator[Step]:
    """The steps from times[0] down to 0. Raises where times do not decrease within (0, 1]."""
    listed = [*map(float, times), 0.0]
    if not times or listed[0] > 1 or any(t <= u for t, u in pairwise(listed)):
        raise ValueError(
            f"times must decrease within (0, 1], without the final 0, which is implied; got {tuple(times)}"
        )
    t = torch.tensor(listed)  # float32 first: coefficients belong to the very times the network is told
    alpha, sigma = path.schedule(t.double())
    levels = list(map(Level, t.tolist(), alpha.tolist(), sigma.tolist()))
    for i, (s, u) in enumerate(pairwise(levels)):
        yield Step(i, s, u)
        if each is not None:
            each(i + 1)


@dataclass(frozen=True)
class DDIM:
    """arXiv 2010.02502, eq. 12: deterministic at eta = 0, ancestral at eta = 1."""

    eta: float = 0.0

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw | None = None,
        each: Each | None = None,
    ) -> Tensor:
        for i, s, u in steps(path, times, each):
            estimate = denoise(x, s.of(x))
            x = path.step(x, s.of(x), u.of(x), estimate, None if draw is None else draw.fold(i), self.eta)
        return x


@dataclass(frozen=True)
class Euler:
    """Euler's method in (x / alpha, σ̃), which is the same as DDIM on every Gaussian path.

    churn       raises the noise by σ̃·(1 + min(churn / (n - 1), √2 - 1)) before each step (arXiv 2206.00364,
    algorithm 2)
    ancestral   replaces that part of the noise which a step would keep by fresh noise; 1 is all that the path allows
    """

    churn: float = 0.0
    ancestral: float = 0.0

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw | None = None,
        each: Each | None = None,
    ) -> Tensor:
        gamma = min(self.churn / max(len(times) - 1, 1), math.sqrt(2) - 1)
        for i, s, u in steps(path, times, each):
            t = s.of(x)
            if gamma and s.alpha > 0:  # there is nothing noisier than pure noise
                if draw is None:
                    raise ValueError("churn draws noise; give the sampler a draw")
                more = path.schedule.time_of(torch.tensor(s.log_snr_half - math.log1p(gamma))).item()
                noisier = torch.full_like(t, max(more, s.time))
                x, t = path.raise_noise(x, t, noisier, draw.fold(i).fold("churn")), noisier
            x = path.step(x, t, u.of(x), denoise(x, t), None if draw is None else draw.fold(i), self.ancestral)
        return x


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method in (x / alpha, σ̃) (arXiv 2206.00364, algorithm 1); two estimates a step.

    The step that leaves pure noise and the step that reaches data are Euler's: σ̃ is infinite, or no noise is left
    to read.
    """

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw | None = None,
        each: Each | None = None,
    ) -> Tensor:
        for step in steps(path, times, each):
            s, u = step.s, step.u
            estimate = denoise(x, s.of(x))
            x_u = path.step(x, s.of(x), u.of(x), estimate)
            if s.alpha > 0 and not step.last:
                noise = (x - s.alpha * estimate) / s.sigma
                noise_u = (x_u - u.alpha * denoise(x_u, u.of(x))) / u.sigma
                x_u = x_u + 0.5 * (u.sigma - u.alpha * s.sigma / s.alpha) * (noise_u - noise)
            x = x_u
        return x


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, from the estimates of two steps."""

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw | None = None,
        each: Each | None = None,
    ) -> Tensor:
        before, h_before = x, math.inf
        for step in steps(path, times, each):
            s, u = step.s, step.u
            estimate = denoise(x, s.of(x))
            if step.last:
                x = estimate
                continue
            ahead = _extrapolated(estimate, before, step.h, h_before)
            x = u.sigma / s.sigma * x + u.alpha * (1 - step.shrink) * ahead
            before, h_before = estimate, step.h
        return x


@dataclass(frozen=True)
class DPMpp2MSDE:
    """The stochastic form of DPM-Solver++(2M), as in arXiv 2211.01095's SDE variant; CogVideoX's default."""

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw,
        each: Each | None = None,
    ) -> Tensor:
        before, h_before = x, math.inf
        for step in steps(path, times, each):
            s, u = step.s, step.u
            estimate = denoise(x, s.of(x))
            if step.last:
                x = estimate
                continue
            ahead, kept = _extrapolated(estimate, before, step.h, h_before), step.shrink
            x = u.sigma / s.sigma * kept * x + u.alpha * (1 - kept**2) * ahead
            x = x + u.sigma * math.sqrt(1 - kept**2) * draw.fold(step.index).normal(*x.shape[1:])
            before, h_before = estimate, step.h
        return x


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 with B(h) = e^-h - 1 ("bh2"), on clean estimates (arXiv 2302.04867).

    Every step is predicted from the two latest estimates, and corrected once the estimate at its end is known; that
    estimate, made at the predicted state, is used for both, so a step costs one. The first step is first order. One
    that leaves pure noise is taken in the limit h = ∞, to which steps from just below t = 1 tend.
    """

    def __call__(
        self,
        denoise: Denoise,
        path: GaussianPath,
        x: Tensor,
        times: Sequence[float],
        draw: Draw | None = None,
        each: Each | None = None,
    ) -> Tensor:
        start = x  # the corrected state before the step last taken
        made: list[tuple[Step, Tensor]] = []  # steps taken, and the estimates at their starts
        for step in steps(path, times, each):
            estimate = denoise(x, step.s.of(x))
            if step.last:
                x = estimate
                continue
            if made:
                x = _corrected(start, estimate, made)
            made = [*made[-1:], (step, estimate)]
            start, x = x, _predicted(x, made)
        return x


def _extrapolated(estimate: Tensor, before: Tensor, h: float, h_before: float) -> Tensor:
    """The estimate half a step ahead, from two; with no step before or an infinite one, the estimate as it is."""
    return estimate + h / (2 * h_before) * (estimate - before) if h_before < math.inf else estimate


def _predicted(x: Tensor, made: list[tuple[Step, Tensor]]) -> Tensor:
    step, estimate = made[-1]
    gain = step.u.alpha * (1 - step.shrink)
    x_u = step.u.sigma / step.s.sigma * x + gain * estimate
    if len(made) == 1:
        return x_u
    before, ratio = made[-2][1], step.h / made[-2][0].h  # ratio 0 after an infinite step
    return x_u + 0.5 * gain * ratio * (estimate - before)


def _corrected(start: Tensor, estimate_u: Tensor, made: list[tuple[Step, Tensor]]) -> Tensor:
    """The state at the end of the last step made, now that the estimate there is known."""
    step, estimate = made[-1]
    h = step.h
    gain = step.u.alpha * (1 - step.shrink)
    x = step.u.sigma / step.s.sigma * start + gain * estimate
    if len(made) == 1:
        return x + 0.5 * gain * (estimate_u - estimate)
    # weights that make the quadrature exact for estimates quadratic in λ: ρ0 + ρ1 = b1, -ρ0/ratio + ρ1 = b2
    phi1 = math.expm1(-h)
    phi2 = -phi1 / h - 1
    phi3 = -phi2 / h - 0.5
    b1, b2 = phi2 / phi1, 2 * phi3 / phi1
    before, ratio = made[-2][1], h / made[-2][0].h
    rho1 = (b1 + ratio * b2) / (1 + ratio)
    slope = ratio * (estimate - before)
    return x + gain * ((b1 - rho1) * slope + rho1 * (estimate_u - estimate))


def pinned(denoise: Denoise, prefix: Tensor, path: GaussianPath | None = None, noise: Tensor | None = None) -> Denoise:
    """Holds the first frames of a video to `prefix` `[B, j, …]` in every sampler.

    The network sees them clean, or with `path` and `noise` (`[B, j, …]`) corrupted to the current time. Their estimate
    is the prefix itself, which is therefore what the sampler returns.
    """

    def held(x_t: Tensor, t: Tensor) -> Tensor:
        frames = prefix.shape[1]
        seen = prefix if path is None or noise is None else path.mix(prefix, noise, t[:, :frames])
        estimate = denoise(torch.cat([seen, x_t[:, frames:]], dim=1), t)
        return torch.cat([prefix, estimate[:, frames:]], dim=1)

    return held
