"""Paths of discrete tokens, 0 … K-1: metric (arXiv 2412.03487), uniform mixture and masking, each as three verbs.

A categorical draw takes one uniform number per token, so it depends on nothing but the token: not on chunks, ranks or
neighbours. Probabilities over K codes are in float32 or wider, in log space, and exist for a chunk of tokens at a time:
there is no K x K table. Shapes: tokens `[B, T, H, W]`, times `[B, 1]` or `[B, T]`, n tokens of a chunk, d code width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from kinema.diffusion.logits import Logits, categorical, first_above, tokens
from kinema.seeds import Draw

LEAST = 1e-3  # the cleanest time a path is asked about; 0 itself is exact
Integral = Literal["exact", "reference"]


@dataclass(frozen=True)
class TokenTimes:
    """What the laws of `times.py` ask of a schedule: uniform times in (0.001, 1], and what a network is told."""

    def timestep(self, t: Tensor) -> Tensor:
        return t.float() * 1000

    def quantile(self, u: Tensor) -> Tensor:
        return 1 - (1 - LEAST) * u.float()


class TokenPath(Protocol):
    @property
    def schedule(self) -> TokenTimes: ...
    @property
    def codes(self) -> int: ...
    def prior(self, shape: tuple[int, ...], draw: Draw) -> Tensor: ...
    def corrupt(self, x0: Tensor, t: Tensor, draw: Draw) -> Tensor: ...
    def step(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        integral: Integral = ...,
        temperature: float = ...,
        top_p: float = ...,
    ) -> Tensor: ...
    def end(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        temperature: float = ...,
        top_p: float = ...,
    ) -> Tensor: ...
    def likelihood(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor: ...
    def noisy(self, x_t: Tensor) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class MetricPath:
    """p_t(x | x0) ∝ exp(-β(t)·d(x, x0)), β(t) = c·((1 - t) / t)^alpha.

    d is the *squared* euclidean distance of the codes' vectors, `codebook` `[K, d]`, each divided by its norm (at least
    `eps`): 0 … 4. It is not the fourth power, which related work uses. `rows` tokens are worked on at once.
    """

    codebook: Tensor
    alpha: float
    c: float
    eps: float = 1e-5
    rows: int = 1024

    schedule = TokenTimes()

    @property
    def codes(self) -> int:
        return len(self.codebook)

    @cached_property
    def unit(self) -> Tensor:
        """The normalised codebook `[K, d]`."""
        book = self.codebook.to(torch.promote_types(self.codebook.dtype, torch.float32))
        return book / book.norm(dim=-1, keepdim=True).clamp(min=self.eps)

    @cached_property
    def _squares(self) -> Tensor:
        return self.unit.square().sum(-1)

    def beta(self, t: Tensor) -> Tensor:
        """β at times t (at least 0.001): 0 at t = 1."""
        t = t.clamp(min=LEAST)
        return self.c * ((1 - t) / t) ** self.alpha

    def beta_slope(self, t: Tensor) -> Tensor:
        """-dβ/dt; 0 at t = 1 where for alpha < 1 it is infinite: the public sampler's convention."""
        t = t.clamp(min=LEAST)
        slope = self.c * self.alpha * (1 - t) ** (self.alpha - 1) / t ** (self.alpha + 1)
        return torch.where(t < 1, slope, 0)

    def distances(self, codes: Tensor) -> Tensor:
        """d from each of `codes` `[n]` to all codes, `[n, K]`."""
        with torch.autocast(codes.device.type, enabled=False):
            d = torch.addmm(self._squares, self.unit[codes], self.unit.T, alpha=-2)
        return d.add_(self._squares[codes, None]).clamp_(min=0)

    def log_prob(self, x0: Tensor, t: Tensor) -> Tensor:
        """log p_t(· | x0) `[n, K]` of tokens and their times `[n]`."""
        return (-self.beta(t)[:, None] * self.distances(x0)).log_softmax(-1)

    def log_rates(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """log r(x) `[n, K]`, r = p_t(x | x0)·max(0, d(x_t, x0) - d(x, x0)): jumps only lead nearer to x0."""
        d = self.distances(x0)
        nearer = (d.gather(-1, x_t[:, None]) - d).clamp(min=0)
        return (-self.beta(t)[:, None] * d).log_softmax(-1) + nearer.log()

    def hazard(self, log_rates: Tensor, t: Tensor, s: Tensor, integral: Integral = "exact") -> Tensor:
        """Λ `[n]`, the expected number of jumps from t to s < t with rates frozen at t.

        "exact" integrates time, β(s) - β(t); "reference" takes (t - s)·(-dβ/dt), which is 0 at t = 1.
        """
        return self._passed(t, s, integral) * log_rates.logsumexp(-1).exp()

    def _passed(self, t: Tensor, s: Tensor, integral: Integral) -> Tensor:
        return self.beta(s) - self.beta(t) if integral == "exact" else (t - s) * self.beta_slope(t)

    def prior(self, shape: tuple[int, ...], draw: Draw) -> Tensor:
        return draw.integers(self.codes, *shape[1:])

    def corrupt(self, x0: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """x_t ~ p_t(· | x0); x0 itself where t = 0."""
        u = draw.uniform(*x0.shape[1:])

        def chosen(x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
            return categorical(-self.beta(t)[:, None] * self.distances(x0), u)

        at = _each(t, x0)
        return torch.where(at > 0, _by_rows(chosen, self.rows, x0, at, u), x0)

    def step(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        integral: Integral = "exact",
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """x_t → x_s, s <= t: a target x0 is drawn from the estimate, and a token may jump once towards its target.

        At s = 0 every token becomes its target; where s = t nothing moves. The rates are those of `log_rates`, in half
        as many passes over K codes, without logarithms: relative to the target, at distance 0, nothing that counts is
        too small for a float.
        """
        shape = x_t.shape[1:]
        x0 = _target(estimate, draw, shape, temperature, top_p)
        jump, where = draw.fold("jump").uniform(*shape), draw.fold("to").uniform(*shape)
        t, s = _each(t, x_t), _each(s, x_t)

        def moved(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, jump: Tensor, where: Tensor) -> Tensor:
            d = self.distances(x0)
            nearer = (d.gather(-1, x_t[:, None]) - d).clamp_(min=0)
            likely = d.mul_(-self.beta(t)[:, None]).exp_()
            rates = nearer.mul_(likely).cumsum(-1)
            jumps = jump < -torch.expm1(-self._passed(t, s, integral) * rates[:, -1] / likely.sum(-1))
            return torch.where(jumps, first_above(rates, where), x_t)

        made = torch.where(s > 0, _by_rows(moved, self.rows, x_t, x0, t, s, jump, where), x0)
        return torch.where(s < t, made, x_t)

    def end(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """`step` where every s is 0 or t: the same tokens, without looking at any distance."""
        x0 = _target(estimate, draw, x_t.shape[1:], temperature, top_p)
        return torch.where(_each(s, x_t) < _each(t, x_t), x0, x_t)

    def likelihood(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """p_t(x_t | x0) of every token."""

        def found(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
            return self.log_prob(x0, t).gather(-1, x_t[:, None])[:, 0].exp()

        return _by_rows(found, self.rows, x_t, x0, _each(t, x0))

    def noisy(self, x_t: Tensor) -> Tensor | None:
        """Tokens known to be noise; here one cannot tell."""
        return None


@dataclass(frozen=True)
class MixturePath:
    """x_t is noise with probability t, else x0. Noise is a uniform token, or with `noise="mask"` the token [MASK] = K.

    `exact_count` makes exactly max(1, round(t·N)) of the N tokens that share a time noise, instead of each by chance.
    """

    codes: int
    noise: Literal["uniform", "mask"] = "uniform"
    exact_count: bool = False

    schedule = TokenTimes()

    def prior(self, shape: tuple[int, ...], draw: Draw) -> Tensor:
        codes = draw.integers(self.codes, *shape[1:])
        return torch.full_like(codes, self.codes) if self.noise == "mask" else codes

    def corrupt(self, x0: Tensor, t: Tensor, draw: Draw) -> Tensor:
        u = draw.uniform(*x0.shape[1:])
        noise = self.prior(tuple(x0.shape), draw.fold("code"))
        if not self.exact_count:
            return torch.where(u < _each(t, x0), noise, x0)
        groups = u.flatten(1)[:, None] if t.shape[1] == 1 else u.flatten(2)  # [B, 1 or T, tokens that share a time]
        count = (t * groups.shape[-1]).round().clamp(min=1)
        chosen = groups.argsort(-1).argsort(-1) < count[..., None]
        return torch.where(chosen.view(x0.shape) & (_each(t, x0) > 0), noise, x0)

    def step(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        integral: Integral = "exact",
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """x_t → x_s, s <= t: a token becomes one drawn from the estimate with probability 1 - s/t.

        Of a masked path only [MASK] does. "reference" jumps with 1 - exp(-(t - s)/t); at s = 0 all jump.
        """
        shape = x_t.shape[1:]
        x0 = _target(estimate, draw, shape, temperature, top_p)
        jump, t, s = draw.fold("jump").uniform(*shape), _each(t, x_t), _each(s, x_t)
        passed = (t - s) / t.clamp(min=LEAST)
        jumps = (jump < (passed if integral == "exact" else -torch.expm1(-passed))) | (s == 0)
        noisy = self.noisy(x_t)
        return torch.where(jumps & (s < t) & (True if noisy is None else noisy), x0, x_t)

    def end(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        estimate: Logits,
        draw: Draw,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """`step` where every s is 0 or t."""
        return self.step(x_t, t, s, estimate, draw, temperature=temperature, top_p=top_p)

    def likelihood(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        t = _each(t, x0)
        noise = t * self.noisy(x_t) if self.noise == "mask" else t / self.codes  # type: ignore[operator]
        return noise + (1 - t) * (x_t == x0)

    def noisy(self, x_t: Tensor) -> Tensor | None:
        """Tokens known to be noise: those that are masked. Of uniform noise one cannot tell."""
        return x_t == self.codes if self.noise == "mask" else None


@dataclass(frozen=True)
class Start:
    """What a one-step student of a masked model starts from instead of all [MASK] (arXiv 2503.15457).

    mask          exactly round(mask·N) tokens are [MASK], the others uniform codes; two numbers are an interval, from
                  which each sample draws its own
    embed_noise   σ: embeddings e of all video tokens become σ·rms·ε + √(1 - σ²)·e
    """

    mask: float | tuple[float, float] | None = None
    embed_noise: float = 0.0

    def tokens(self, path: TokenPath, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """`[B, T, H, W]`: the path's prior unless `mask` is given."""
        if self.mask is None:
            return path.prior(shape, draw.fold("prior"))
        codes = draw.fold("prior").integers(path.codes, *shape[1:])
        low, high = self.mask if isinstance(self.mask, tuple) else (self.mask, self.mask)
        ratio = low + (high - low) * draw.fold("ratio").uniform(1)
        return exactly_masked(codes, ratio, draw.fold("rank").uniform(math.prod(shape[1:])).argsort(-1), path.codes)


def exactly_masked(codes: Tensor, ratio: Tensor, rank: Tensor, mask: int) -> Tensor:
    """`codes` `[B, …]` with `mask` where the token's `rank` `[B, N]` is below round(ratio·N); `ratio` `[B, 1]`."""
    return torch.where((rank < (ratio * rank.shape[1]).round()).view(codes.shape), mask, codes)


def fit_path(codebook: Tensor, tokens: int = 256, points: int = 19) -> tuple[float, float, Tensor]:
    """(alpha, c, curve) with which E d(x_t, x0) / E d(x_1, x0) is nearly t: noise that grows evenly with time.

    Measured on `tokens` evenly spaced codes: the β that gives each of `points` ratios, and through their logarithms the
    line ln β = ln c + alpha·ln((1 - t) / t). `curve` `[points, 2]` are the times and the ratios of the proposal.
    """
    codes = torch.linspace(0, len(codebook) - 1, min(tokens, len(codebook)), device=codebook.device).round().long()
    d = MetricPath(codebook, 1.0, 1.0).distances(codes).double()
    t = torch.arange(1, points + 1, device=d.device, dtype=d.dtype) / (points + 1)

    def ratios(betas: Tensor) -> Tensor:
        return torch.stack([((-beta * d).softmax(-1) * d).sum(-1).mean() for beta in betas]) / d.mean()

    betas = torch.logspace(-2, 4, 61, device=d.device, dtype=d.dtype)
    seen = ratios(betas)  # falls as β grows
    above = (seen > t[:, None]).sum(-1).clamp(1, len(betas) - 1)
    share = (seen[above - 1] - t) / (seen[above - 1] - seen[above])
    log_beta = betas[above - 1].log() + share * (betas[above] / betas[above - 1]).log()
    odds = ((1 - t) / t).log()
    alpha = ((odds - odds.mean()) * log_beta).sum() / ((odds - odds.mean()).square().sum())
    alpha = round(alpha.item(), 1)
    c = float(f"{(log_beta - alpha * odds).mean().exp().item():.2g}")
    return alpha, c, torch.stack([t, ratios(MetricPath(codebook, alpha, c).beta(t))], dim=-1)


def _target(estimate: Logits, draw_: Draw, shape: torch.Size, temperature: float, top_p: float) -> Tensor:
    return tokens(estimate, draw_.fold("x0").uniform(*shape), temperature, top_p)


def _each(t: Tensor, x: Tensor) -> Tensor:
    """The time of every token."""
    return t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)).expand(x.shape)


def _by_rows(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """A function of every token, computed on `rows` tokens at a time."""
    flat = [tensor.flatten() for tensor in tensors]
    parts = [function(*(f[i : i + rows] for f in flat)) for i in range(0, flat[0].numel(), rows)]
    return torch.cat(parts).view(tensors[0].shape)
