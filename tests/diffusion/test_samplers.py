"""Samplers: with the exact denoiser of a known distribution they reach it, at the order of their method."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from known import MEAN, MODES, SCHEDULES, STD, draw, gaussian, mixture, name_of, of_mixture
from torch import Tensor

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import guided
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.samplers import DDIM, DPMpp2M, DPMpp2MSDE, Euler, Heun, UniPC, pinned
from kinema.diffusion.schedule import RectifiedFlow, Tabulated, ZeroSNR
from kinema.diffusion.times import karras, shifted, trailing, unwarp, warp
from kinema.models.wan.spec import Wan

DETERMINISTIC = [DDIM(), Euler(), Heun(), DPMpp2M(), UniPC()]
RANDOM = [DDIM(1.0), Euler(churn=5.0), Euler(ancestral=1.0), DPMpp2MSDE()]
SAMPLERS = DETERMINISTIC + RANDOM
PURE = [RectifiedFlow(), ZeroSNR(), ZeroSNR(shift=3.0)]  # schedules whose t = 1 is noise alone

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)


@every_schedule
@every_sampler
def test_every_sampler_on_every_schedule_reaches_the_mixture(sampler, schedule):
    path = GaussianPath(schedule)
    times = tuple(dict.fromkeys((1.0, *karras(schedule, 150, 0.02, 30.0))))
    start = path.corrupt(of_mixture(40, 2, 4, 5, 5), torch.ones(40, 1), draw(40, "prior"))  # 8,000 numbers
    made = sampler(mixture(path), path, start, times, draw(40, "steps"))
    assert made.shape == start.shape and made.dtype == torch.float32
    alpha, sigma = (value.item() for value in schedule(torch.tensor(times[-1])))
    upper = made > 0
    assert upper.float().mean().item() == pytest.approx(MODES[1][0], abs=0.015)  # three deviations
    ancestral = sampler in (DDIM(1.0), Euler(ancestral=1.0))  # converge in steps, of first order, from below
    for rows, (_, mean, std) in zip((~upper, upper), MODES, strict=True):
        estimates = std**2 / math.hypot(std, sigma / alpha)  # the deviation of what the last step returns
        assert made[rows].mean().item() == pytest.approx(mean, abs=0.012)
        assert made[rows].std().item() == pytest.approx(estimates, rel=0.09 if ancestral else 0.035)


def rms(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def error(sampler, path: GaussianPath, times) -> float:
    """The rms error of what the last step returns. All is affine in the noise, so that ±1 stand for all of it."""
    (first, last), (noisiest, cleanest) = (
        v.tolist() for v in path.schedule(torch.tensor([times[0], times[-1]]).double())
    )
    z = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    start = first * MEAN + math.hypot(first * STD, noisiest) * z
    end = last * MEAN + math.hypot(last * STD, cleanest) * z
    exact = gaussian(path)(end, torch.tensor([[times[-1]]]))
    return rms(sampler(gaussian(path), path, start, times), exact)


@pytest.mark.parametrize(
    "sampler, ratio", [(DDIM(), 1.97), (Euler(), 1.97), (Heun(), 4.12), (DPMpp2M(), 3.88), (UniPC(), 7.92)], ids=repr
)
def test_doubling_the_steps_divides_the_error_by_the_order_of_the_method(sampler, ratio):
    """Times even in λ from -6 to 3. UniPC's corrector makes it third order."""
    path = GaussianPath(RectifiedFlow())
    coarse, fine = (
        error(sampler, path, torch.sigmoid(-torch.linspace(-6, 3, n + 1).double()).tolist()) for n in (40, 80)
    )
    assert coarse / fine == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize("sampler, published", [(DDIM(), 0.0327), (Euler(), 0.0327), (DPMpp2M(), 0.0164)], ids=repr)
def test_error_at_fifty_steps_is_the_published_one(sampler, published):
    path = GaussianPath(ZeroSNR())
    z = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    made = sampler(gaussian(path), path, z, trailing(50))
    assert rms(made, MEAN + STD * z) == pytest.approx(published, abs=6e-5)


class Unit:
    """Draws that are 1 in the row of the step they belong to and 0 elsewhere."""

    def __init__(self, step: int = -1):
        self.step = step

    def fold(self, step: int) -> "Unit":
        return Unit(step)

    def normal(self, *shape: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.step), 52).double().reshape(52, 1)


def test_spread_of_the_stochastic_solver_at_fifty_steps_is_the_published_one():
    """Each row carries one of the 51 noises and the last none, so the spread needs no samples."""
    path = GaussianPath(ZeroSNR())
    made = DPMpp2MSDE()(gaussian(path), path, Unit(50).normal(), trailing(50), Unit())
    assert made[51].item() == pytest.approx(MEAN)
    assert (made[:51] - made[51]).norm().item() == pytest.approx(0.4895, abs=6e-4)


@pytest.mark.parametrize("n", [5, 10, 20, 50])
@pytest.mark.parametrize("schedule, grid", [(RectifiedFlow(), partial(shifted, shift=3.0)), (ZeroSNR(), trailing)])
def test_higher_orders_beat_euler_at_equal_steps(schedule, grid, n):
    path = GaussianPath(schedule)
    errors = {sampler: error(sampler, path, grid(n)) for sampler in (Euler(), DPMpp2M(), UniPC())}
    assert max(errors[UniPC()], errors[DPMpp2M()]) < errors[Euler()]


@every_schedule
@every_sampler
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_nan_for_any_n(sampler, schedule, n):
    path, seen = GaussianPath(schedule), []

    def denoise(x, t):
        seen.append(gaussian(path)(x, t))
        return seen[-1]

    made = sampler(denoise, path, draw(2).normal(1, 2, 2, 2), trailing(n), draw(2, "s"))
    assert made.isfinite().all() and torch.equal(made, seen[-1])
    assert all(estimate.isfinite().all() for estimate in seen)


@every_sampler
def test_last_step_returns_the_estimate(sampler):
    path = GaussianPath(ZeroSNR())
    for n in range(1, 101):
        asked = []

        def denoise(x, t, asked=asked):
            asked.append(t.item())
            return torch.full_like(x, len(asked))

        made = sampler(denoise, path, torch.zeros(1, 1), trailing(n), draw(1))
        assert made.item() == len(asked)  # estimates tell which they are: the result is the last, unmixed


@every_schedule
@every_sampler
@pytest.mark.parametrize("n", [1, 2, 7])
def test_number_of_network_calls(sampler, schedule, n):
    path, asked, done = GaussianPath(schedule), [], []

    def denoise(x, t):
        assert t.shape == (2, 1) and t.dtype == torch.float32
        asked.append(t[0, 0].item())
        return gaussian(path)(x, t)

    sampler(denoise, path, draw(2).normal(1, 2), trailing(n), draw(2, "s"), done.append)
    assert done == list(range(1, n + 1))
    if sampler == Heun():  # two estimates a step, but one when leaving pure noise and one when reaching data
        first = 1 if schedule in PURE else 2
        assert len(asked) == (1 if n == 1 else first + 2 * (n - 2) + 1)
    else:
        assert len(asked) == n
        if sampler != Euler(churn=5.0):
            assert asked == pytest.approx(trailing(n))


@pytest.mark.parametrize("table", [ZeroSNR(), ZeroSNR(shift=3.0)], ids=name_of)
def test_sampling_alphas_are_training_alphas(table: Tabulated):
    """Each step takes its numbers from the table that training used, at the level the network is told."""
    path, k = GaussianPath(table), torch.arange(-1, 1000)
    root = torch.cat([torch.ones(1).double(), table.abar().sqrt()])
    assert torch.equal(path.schedule(table.time_at(k).double())[0], root)
    for n in range(1, 101):
        told = []
        DDIM()(
            lambda x, t, told=told: (told.append(table.timestep(t).item()), x)[1], path, torch.ones(1, 1), trailing(n)
        )
        assert told == [round(1000 * (n - j) / n) - 1 for j in range(n)]


@every_schedule
def test_euler_is_ddim(schedule):
    path, x = GaussianPath(schedule), draw(3).normal(2, 4)
    assert torch.equal(Euler()(gaussian(path), path, x, trailing(9)), DDIM()(gaussian(path), path, x, trailing(9)))
    ancestral = [s(gaussian(path), path, x, trailing(9), draw(3, "s")) for s in (Euler(ancestral=1.0), DDIM(1.0))]
    assert torch.equal(*ancestral)


def test_euler_on_the_straight_path_is_eulers_method():
    path, x, times = GaussianPath(), draw(3).normal(2, 4).double(), shifted(9)
    made = Euler()(gaussian(path), path, x, times)
    for t, s in zip(times, (*times[1:], 0), strict=True):
        velocity = (x - gaussian(path)(x, torch.full((3, 1), t))) / t
        x = x + (s - t) * velocity
    torch.testing.assert_close(made, x, atol=1e-6, rtol=1e-6)


class Counted:
    """A draw that counts what is drawn from it, by stream."""

    def __init__(self, keys, counts: list, name: tuple = ()):
        self.keys, self.counts, self.name = keys, counts, name

    def fold(self, name) -> "Counted":
        return Counted(self.keys.fold(name), self.counts, (*self.name, name))

    def normal(self, *shape: int) -> Tensor:
        self.counts.append(self.name)
        return self.keys.normal(*shape)


@every_sampler
def test_noise_draw_count(sampler):
    path, drawn = GaussianPath(ZeroSNR()), []
    sampler(gaussian(path), path, draw(2).normal(3), trailing(7), Counted(draw(2, "s"), drawn))
    assert len(drawn) == len(set(drawn)) <= 7  # each stream once, at most one a step
    if sampler in DETERMINISTIC:
        assert not drawn


@pytest.mark.parametrize("sampler", RANDOM, ids=repr)
def test_random_samples_do_not_depend_on_their_batch(sampler):
    path, x = GaussianPath(ZeroSNR()), draw(4).normal(2, 3)
    whole = sampler(gaussian(path), path, x, trailing(7), draw(4, "s"))
    assert torch.equal(whole[1:3], sampler(gaussian(path), path, x[1:3], trailing(7), draw(4, "s")[1:3]))
    assert not torch.equal(whole, sampler(gaussian(path), path, x, trailing(7), draw(4, "other")))


@every_sampler
def test_samplers_take_guided_denoisers(sampler):
    """A network that puts out its condition as x0 is sampled to uncond + w·(cond - uncond)."""
    path, given = GaussianPath(), {"x0": torch.full((2, 1, 3), 0.5)}
    denoiser = LatentDenoiser(lambda x, told, *, x0: (x - x0) * 1000 / told[..., None], path, Flow())
    denoise = guided(denoiser, given, {"x0": torch.zeros(2, 1, 3)}, 3.0, batched=True)
    made = sampler(denoise, path, draw(2).normal(1, 3), shifted(6), draw(2, "s"))
    torch.testing.assert_close(made, torch.full((2, 1, 3), 1.5), atol=1e-5, rtol=1e-5)


@every_sampler
@pytest.mark.parametrize("corrupted", [False, True])
def test_pinned_frames_come_out_as_they_went_in(sampler, corrupted):
    path, prefix, noise = GaussianPath(), draw(2, "p").normal(1, 3), draw(2, "n").normal(1, 3)
    seen = []

    def denoise(x, t):
        seen.append((x, t))
        return gaussian(path)(x, t)

    held = pinned(denoise, prefix, path, noise) if corrupted else pinned(denoise, prefix)
    made = sampler(held, path, draw(2).normal(4, 3), shifted(8), draw(2, "s"))
    assert torch.equal(made[:, :1], prefix)
    for x, t in seen:
        assert torch.equal(x[:, :1], path.mix(prefix, noise, t) if corrupted else prefix)


@pytest.mark.parametrize("times", [(), (0.5, 0.6), (0.5, 0.5), (1.1, 0.5), (1.0, 0.0), (0.5, -0.1)])
def test_times_that_do_not_decrease_within_their_range_are_an_error(times):
    with pytest.raises(ValueError, match="must decrease"):
        DDIM()(gaussian(GaussianPath()), GaussianPath(), torch.zeros(1, 1), times)


SHIFT = 3.0
NOISE = draw(1, "x").normal(4000)


def diffusers(denoise, n: int = 0, sigmas=None, whole: bool = False) -> tuple[Tensor, list[float]]:
    """What the scheduler of diffusers' WanPipeline makes of NOISE, and its levels. `whole`: the network is told its
    timesteps, which are whole numbers."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=2, solver_type="bh2"
    )
    if sigmas is None:
        scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(sigmas=np.array(sigmas))
    x = NOISE
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        told = (timestep.double() / 1000 if whole else sigma).reshape(1, 1)
        flow = (x - denoise(x, told)) / told.to(x.dtype)
        x = scheduler.step(flow, timestep, x, return_dict=False)[0]
    return x, scheduler.sigmas[:-1].tolist()


@pytest.mark.parametrize("known", [gaussian, mixture])
@pytest.mark.parametrize("n, tolerance", [(4, 1e-4), (12, 3e-5), (50, 1e-6)])
def test_unipc_is_that_of_diffusers(known, n, tolerance):
    """diffusers cannot leave pure noise and starts 1e-6 below it: on its very levels the two agree to rounding, from
    t = 1 to the given tolerance."""
    path, times = GaussianPath(), Wan(shift=SHIFT, size="1.3B").times(n)
    theirs, levels = diffusers(known(path), sigmas=[unwarp(t, SHIFT) for t in times])
    assert levels == pytest.approx(times, abs=2e-6)
    assert rms(UniPC()(known(path), path, NOISE, levels), theirs) < 2e-7
    assert rms(UniPC()(known(path), path, NOISE, times), theirs) < tolerance


@pytest.mark.parametrize("known", [gaussian, mixture])
def test_diffusers_own_levels_and_whole_timesteps_make_nearly_the_same(known):
    """Its levels go from 1 towards 1/1000 and kinema's towards 0, before the shift; and it tells the network ⌊1000·t⌋.
    Next to the border between modes either may send a sample to the other side, so the error is not a mean."""
    path, n = GaussianPath(), 50
    ours = UniPC()(known(path), path, NOISE, Wan(shift=SHIFT, size="1.3B").times(n))
    theirs, levels = diffusers(known(path), n)
    assert levels == pytest.approx([warp(1 - j * 0.999 / n, SHIFT) for j in range(n)], abs=2e-6)
    assert rms(ours, theirs) < 1.5e-3
    theirs, _ = diffusers(known(path), n, whole=True)
    off = (ours - theirs).abs()
    assert off.median() < 1e-3 and off.quantile(0.95) < 3e-3
    assert ((ours > 0) != (theirs > 0)).float().mean() < 1e-3
    assert theirs.std().item() == pytest.approx(ours.std().item(), rel=1e-3)
