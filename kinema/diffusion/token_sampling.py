"""The sampler of tokens: from noise to codes by the path's steps, with guidance while there is noise enough to use it.

Tokens are `[B, T, H, W]`. Every frame may have times of its own. So frames that are known, of an image or of the video
that goes on, are frames whose time stands still.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.diffusion.logits import Logits
from kinema.diffusion.logits import tokens as tokens_of
from kinema.diffusion.token_path import Integral, TokenPath
from kinema.errors import UsageError
from kinema.seeds import Draw

Times = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Known:
    """Latent frames `at` of a video whose `codes` `[B, len(at), H, W]` are given.

    They are shown to the network corrupted to the time `noise` and come out as they are given. `clamp=False` lets them
    be resampled like all others, as the public sampler does.
    """

    codes: Tensor
    at: tuple[int, ...]
    noise: float = 0.0
    clamp: bool = True


class TokenSampler(Protocol):
    @property
    def guided_above(self) -> float: ...

    def __call__(
        self,
        denoise: Callable[..., Any],
        path: TokenPath,
        x: Tensor,
        times: Times,
        draw: Draw,
        each: Callable[[int], None] = ...,
        known: Known | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Jumps:
    """Any number of steps along a token path; one step is a single draw of every token from the estimate.

    guided_above         guidance ends at this time: below it the pass for the unconditional text is not made
    integral             of time within a step, see the path
    temperature, top_p   act on the estimate before it is drawn from
    """

    guided_above: float = 0.1
    integral: Integral = "exact"
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        _check(self.temperature, self.top_p)

    def __call__(
        self,
        denoise: Callable[..., Any],
        path: TokenPath,
        x: Tensor,
        times: Times,
        draw: Draw,
        each: Callable[[int], None] = lambda done: None,
        known: Known | None = None,
    ) -> Tensor:
        """From noise x to codes. `denoise` is a result of `guided`; step i draws from `draw.fold(i)`.

        `times` decrease from at most 1, one number per step, or one row per step with a number for each of the T
        frames; the final 0 is implied. Raises ValueError for other times.
        """
        how = {"temperature": self.temperature, "top_p": self.top_p}

        def step(x: Tensor, t: Tensor, s: Tensor, estimate: Logits, draw: Draw, last: bool) -> Tensor:
            if last:
                return path.end(x, t, s, estimate, draw, **how)
            return path.step(x, t, s, estimate, draw, self.integral, **how)

        return _descend(denoise, path, x, times, draw, each, known, self.guided_above, step)


@dataclass(frozen=True)
class Redraws:
    """Draws all tokens at every step and corrupts them to the next time: how students of a few steps were trained."""

    guided_above: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        _check(self.temperature)

    def __call__(
        self,
        denoise: Callable[..., Any],
        path: TokenPath,
        x: Tensor,
        times: Times,
        draw: Draw,
        each: Callable[[int], None] = lambda done: None,
        known: Known | None = None,
    ) -> Tensor:
        def step(x: Tensor, t: Tensor, s: Tensor, estimate: Logits, draw: Draw, last: bool) -> Tensor:
            made = tokens_of(estimate, draw.fold("x0").uniform(*x.shape[1:]), self.temperature)
            moved = made if last else path.corrupt(made, s, draw.fold("noise"))
            still = (t == s).reshape(*t.shape, *[1] * (x.ndim - t.ndim))
            return torch.where(still, x, moved)

        return _descend(denoise, path, x, times, draw, each, known, self.guided_above, step)


def _descend(
    denoise: Callable[..., Any],
    path: TokenPath,
    x: Tensor,
    times: Times,
    draw: Draw,
    each: Callable[[int], None],
    known: Known | None,
    guided_above: float,
    step: Callable[[Tensor, Tensor, Tensor, Logits, Draw, bool], Tensor],
) -> Tensor:
    """What all samplers share: times, guidance while it is of use, and frames that are known.

    `step(x, t, s, estimate, draw, last)` is told the last step, after which every frame is clean or as it was.
    """
    rows = _rows(times, x.shape[1])
    held = dict.fromkeys(known.at, known.noise) if known is not None and known.clamp else {}
    if known is not None:
        x = _written(x, known, path, draw.fold("known"))
    for i, (now, after) in enumerate(pairwise(rows)):
        t, s = _times(now, held, x), _times(after, held, x)
        moving = [time for frame, time in enumerate(now * (x.shape[1] // len(now))) if frame not in held]
        guided = [time > guided_above for time in moving]
        where: Tensor | bool = t > guided_above if any(guided) and not all(guided) else any(guided)
        x = step(x, t, s, denoise(x, t, where=where), draw.fold(i), not any(after))
        each(i + 1)
    return _put(x, known.codes, known.at) if known is not None and known.clamp else x


def _check(temperature: float, top_p: float = 1.0) -> None:
    if not 0 < temperature < math.inf or not 0 < top_p <= 1:
        raise UsageError(f"temperature is {temperature} and top_p {top_p}; use numbers above 0, top_p at most 1")


def _rows(times: Times, frames: int) -> list[list[float]]:
    """Every step's times, one for all frames or one each, and the final 0."""
    rows = [[float(f) for f in row] if isinstance(row, Sequence) else [float(row)] for row in times]
    if not rows or {len(row) for row in rows} not in ({1}, {frames}):
        raise ValueError(f"times are one number per step, or one row of {frames}, one per frame; got {times}")
    rows.append([0.0] * len(rows[0]))
    steps = [pair for before, after in pairwise(rows) for pair in zip(before, after, strict=True)]
    if max(rows[0]) > 1 or any(t < s for t, s in steps) or not all(any(row) for row in rows[:-1]):
        raise ValueError(f"times must decrease within (0, 1], without the final 0, which is implied; got {times}")
    return rows


def _times(row: list[float], held: dict[int, float], x: Tensor) -> Tensor:
    """`[B, 1]`, or `[B, T]` where frames differ; filled in place, so that nothing is copied to the device."""
    if len(row) == 1 and not held:
        return torch.full((len(x), 1), row[0], device=x.device)
    t = torch.empty(len(x), x.shape[1], device=x.device)
    for frame in range(x.shape[1]):
        t[:, frame] = held.get(frame, row[frame] if len(row) > 1 else row[0])
    return t


def _written(x: Tensor, known: Known, path: TokenPath, draw: Draw) -> Tensor:
    """x with the known frames in it, corrupted."""
    t = torch.full((len(x), 1), known.noise, device=x.device)
    return _put(x, path.corrupt(known.codes, t, draw) if known.noise else known.codes, known.at)


def _put(x: Tensor, codes: Tensor, at: tuple[int, ...]) -> Tensor:
    x = x.clone()
    for place, frame in enumerate(at):
        x[:, frame] = codes[:, place]
    return x
