"""Samplers: with the exact denoiser of a known distribution they must reach it, at the order of their method."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.samplers import DDIM, DPMpp2M, DPMpp2MSDE, Euler, Heun, UniPC, pinned
from kinema.diffusion.schedule import EDM, LegacyDDPM, RectifiedFlow, ZeroSNR
from kinema.diffusion.times import karras, linspace, shifted, trailing

SAMPLERS = [
    DDIM(),
    DDIM(1.0),
    Euler(),
    Euler(churn=5.0),
    Euler(ancestral=1.0),
    Heun(),
    DPMpp2M(),
    DPMpp2MSDE(),
    UniPC(),
]
# Grids that end at little noise: the estimate that the last step returns is narrower than the distribution.
GRIDS = {
    RectifiedFlow(): lambda n: shifted(n, 3.0),
    ZeroSNR(): linspace,
    ZeroSNR(shift=3.0): linspace,
    LegacyDDPM(): linspace,
    EDM(): lambda n: karras(EDM(), n),
}
MODES = ((0.3, -1.0, 0.2), (0.7, 1.0, 0.1))  # share, mean, deviation


def draw(n: int, name: str = "test") -> seeds.Keys:
    return seeds.keys(0, name, range(n))


def mixture(path: GaussianPath):
    """E[x0 | x_t] of the mixture, in float64."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.at(t.double(), x)
        logits, means = [], []
        for share, mean, std in MODES:
            variance = alpha**2 * std**2 + sigma**2
            logits.append(math.log(share) - 0.5 * variance.log() - 0.5 * (x - alpha * mean) ** 2 / variance)
            means.append(mean + alpha * std**2 / variance * (x - alpha * mean))
        return (torch.softmax(torch.stack(logits), 0) * torch.stack(means)).sum(0).float()

    return denoise


def gaussian(path: GaussianPath, mean: float = 0.3, std: float = 0.5):
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.at(t.double(), x)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


@pytest.mark.parametrize("schedule", GRIDS, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_sampler_with_the_exact_denoiser_reaches_the_mixture(sampler, schedule):
    path, times = GaussianPath(schedule), GRIDS[schedule](150)
    x = path.prior((40, 2, 4, 5, 5), draw(40, "prior"))  # 8,000 numbers
    alpha, sigma = schedule(torch.tensor([times[0]]))
    x = x * torch.sqrt(sigma**2 + alpha**2 * 0.85)  # paths that do not start in pure noise start in their marginal
    made = sampler(mixture(path), path, x, times, draw(40, "steps")).flatten()
    upper = made > 0
    assert upper.float().mean().item() == pytest.approx(0.7, abs=0.03)
    for rows, (_, mean, std) in zip((~upper, upper), MODES, strict=True):
        assert made[rows].mean().item() == pytest.approx(mean, abs=0.05)
        assert made[rows].std().item() == pytest.approx(std, rel=0.35)


@pytest.mark.parametrize("schedule", GRIDS, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_steps_are_finite_and_the_last_returns_the_estimate(sampler, schedule, n):
    path, seen = GaussianPath(schedule), []

    def denoise(x, t):
        seen.append(gaussian(path)(x, t).float())
        return seen[-1]

    made = sampler(denoise, path, draw(2).normal(1, 2, 2, 2), GRIDS[schedule](n), draw(2, "s"))
    assert made.isfinite().all() and torch.equal(made, seen[-1])


def test_last_step_returns_the_estimate_for_every_number_of_steps():
    path = GaussianPath(ZeroSNR())
    for n in range(1, 101):
        calls = itertools.count(1)
        made = DPMpp2MSDE()(
            lambda x, t, calls=calls: x * 0 + next(calls), path, torch.zeros(1, 1), trailing(n), draw(1)
        )
        assert made.item() == n and next(calls) == n + 1


@pytest.mark.parametrize("schedule", GRIDS, ids=str)
def test_euler_is_ddim(schedule):
    path, x, times = GaussianPath(schedule), draw(3).normal(2, 4), GRIDS[schedule](9)
    assert torch.equal(Euler()(gaussian(path), path, x, times), DDIM()(gaussian(path), path, x, times))


def test_ddim_is_a_rotation_of_x_and_v():
    path = GaussianPath(ZeroSNR())
    s, u = torch.full((1, 1), 0.7), torch.full((1, 1), 0.6)
    x, v = draw(1).normal(5).double()[:, :, None], draw(1, "v").normal(5).double()[:, :, None]
    (alpha_s, sigma_s), (alpha_u, sigma_u) = path.at(s.double(), x), path.at(u.double(), x)
    turn = torch.atan2(sigma_s, alpha_s) - torch.atan2(sigma_u, alpha_u)
    torch.testing.assert_close(path.step(x, s, u, alpha_s * x - sigma_s * v), turn.cos() * x - turn.sin() * v)


def errors(sampler, n: int, path: GaussianPath, times) -> float:
    """The rms error against the exact solution, which for a Gaussian is affine in the noise it started from."""
    x = torch.linspace(-2, 2, 200, dtype=torch.float64).reshape(1, 200)
    alpha, sigma = path.schedule(torch.tensor([times[0]], dtype=torch.float64))
    start = math.sqrt(float(alpha**2 * 0.25 + sigma**2))
    exact = 0.3 + 0.5 * (x - float(alpha) * 0.3) / start
    return (sampler(gaussian(path), path, x, times) - exact).square().mean().sqrt().item()


def test_published_errors_at_fifty_steps():
    path = GaussianPath(ZeroSNR())
    x = draw(1, "prior").normal(20000).double()
    made = {s: s(gaussian(path), path, x, trailing(50), draw(1, "s")) for s in (DDIM(), DPMpp2M(), DPMpp2MSDE())}
    exact = 0.3 + 0.5 * x
    rms = {s: (made[s] - exact).square().mean().sqrt().item() for s in (DDIM(), DPMpp2M())}
    assert rms[DDIM()] == pytest.approx(0.0327, rel=0.03) and rms[DPMpp2M()] == pytest.approx(0.0164, rel=0.03)
    assert made[DPMpp2MSDE()].std().item() == pytest.approx(0.4895, abs=0.008)


def test_doubling_the_steps_shows_the_order_of_the_method():
    """Times spaced evenly in λ and fine enough to be told apart: a continuous schedule, from λ = -3 to 6."""
    path = GaussianPath(RectifiedFlow())

    def times(n: int) -> tuple[float, ...]:
        return tuple(torch.sigmoid(-torch.linspace(-3, 6, n + 1, dtype=torch.float64))[:-1].tolist())

    def ratio(sampler) -> float:
        coarse, fine = (errors(sampler, n, path, times(n)) for n in (20, 40))
        return coarse / fine

    assert ratio(DDIM()) == pytest.approx(2, abs=0.35)
    assert errors(DPMpp2M(), 40, path, times(40)) < 0.5 * errors(DDIM(), 40, path, times(40))
    assert errors(UniPC(), 20, path, times(20)) < errors(DPMpp2M(), 20, path, times(20))


def test_times_that_do_not_decrease_are_an_error():
    with pytest.raises(ValueError, match="must decrease"):
        DDIM()(gaussian(GaussianPath()), GaussianPath(), torch.zeros(1, 1), (0.5, 0.6))


def test_stochastic_samples_do_not_depend_on_their_batch():
    path, x, times = GaussianPath(ZeroSNR()), draw(4).normal(2, 3), trailing(7)
    whole = DPMpp2MSDE()(gaussian(path), path, x, times, draw(4, "s"))
    assert torch.equal(whole[1:3], DPMpp2MSDE()(gaussian(path), path, x[1:3], times, draw(4, "s")[1:3]))


def test_pinned_frames_come_out_as_they_went_in():
    path, prefix = GaussianPath(), draw(2, "p").normal(1, 3)
    made = UniPC()(pinned(lambda x, t: gaussian(path)(x, t).float(), prefix), path, draw(2).normal(4, 3), shifted(8))
    torch.testing.assert_close(made[:, :1], prefix)
