"""Times: grids with their published levels, laws of training times, and strata that cover every level."""

import math
from itertools import pairwise

import pytest
import torch
from known import SCHEDULES, draw, name_of

from kinema import seeds
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.schedule import EDM, LegacyDDPM, ZeroSNR
from kinema.diffusion.times import (
    LogitNormal,
    LogNormalSigma,
    Partial,
    PerChunk,
    Shifted,
    Stratified,
    Uniform,
    karras,
    karras_sigmas,
    leading,
    linspace,
    sat_trailing,
    shifted,
    strata,
    trailing,
    unwarp,
    warp,
    warped,
)

LAWS = [Uniform(), Partial(300), LogNormalSigma(), LogitNormal(), Shifted(5.0, 0.02, 0.98)]
TABLE = GaussianPath(ZeroSNR())


def told(times) -> list[int]:
    return ZeroSNR().timestep(torch.tensor(times)).long().tolist()


def papers(n: int) -> tuple[float, ...]:
    """The grid of arXiv 2206.00364 on its own schedule, whose network sees data divided by sigma_data."""
    schedule = EDM()
    return karras(schedule, n, schedule.sigma_min / schedule.sigma_data, schedule.sigma_max / schedule.sigma_data)


def of_step(step: int, count: int, name: str = "times") -> seeds.Keys:
    """The draws of all samples of an optimizer step."""
    return seeds.keys(0, name, range(step * count, (step + 1) * count), count=count)


@pytest.mark.parametrize("grid", [trailing, shifted, leading, linspace, sat_trailing, papers])
def test_grid_has_n_decreasing_entries_for_every_n(grid):
    for n in range(1, 1000):
        times = grid(n)
        assert len(times) == n and times[0] <= 1 and times[-1] > 0
        assert all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("grid", [trailing, leading, linspace])
def test_grid_of_every_level_is_the_table(grid):
    assert told(grid(1000)) == list(range(999, -1, -1))


def test_grids_have_distinct_levels_of_the_table():
    for n in range(1, 1001):
        for grid in (trailing, leading, linspace):
            levels = told(grid(n))
            assert len(set(levels)) == n and 0 <= levels[-1] <= levels[0] <= 999


def test_trailing_levels_are_the_published_ones():
    assert told(trailing(4)) == [999, 749, 499, 249]
    assert told(trailing(7)) == [999, 856, 713, 570, 428, 285, 142]
    assert told(trailing(50)) == list(range(999, 18, -20))


def test_sat_levels_are_the_published_ones():
    assert (told(trailing(30))[1], told(trailing(30))[-1]) == (966, 32)
    assert (told(sat_trailing(30))[1], told(sat_trailing(30))[-1]) == (965, 33)


def test_karras_levels_are_evenly_spaced_in_their_root():
    sigma = karras_sigmas(18)
    assert (sigma[0].item(), sigma[-1].item()) == pytest.approx((80.0, 0.002))
    torch.testing.assert_close((sigma ** (1 / 7)).diff(), (sigma ** (1 / 7)).diff().mean().expand(17))
    alpha, noise = EDM(sigma_data=1.0)(torch.tensor(karras(EDM(sigma_data=1.0), 18)[:-1]).double())
    torch.testing.assert_close(noise / alpha, sigma[:-1], rtol=1e-5, atol=0)
    assert papers(11) == pytest.approx([1 - i / 10 for i in range(11)], abs=1e-7)  # that schedule is even in the root
    levels = karras(LegacyDDPM(), 40)
    assert len(set(told(levels))) == len(levels) < 40  # the table's noise spans less, and each level is listed once


def test_warp_has_the_published_values_and_an_inverse():
    quarters = (1, 0.75, 0.5, 0.25)
    assert warped(quarters, 5) == shifted(4, 5) == pytest.approx((1, 0.9375, 0.833333, 0.625), abs=1e-6)
    assert warped(quarters, 8) == pytest.approx((1, 0.96, 0.888889, 0.727273), abs=1e-6)
    assert [1000 * t for t in shifted(1000, 5)[-3:]] == pytest.approx([14.8221, 9.9206, 4.9801], abs=5e-5)
    assert [1000 * t for t in shifted(1000, 8)[-3:]] == pytest.approx([23.5064, 15.7791, 7.9444], abs=5e-5)
    assert tuple(unwarp(t, 5.0) for t in shifted(4, 5.0)) == pytest.approx(quarters)
    u = torch.arange(1001).double() / 1000
    for shift in (1.0, 3.0, 5.0, 8.0):
        torch.testing.assert_close(unwarp(warp(u, shift), shift), u, rtol=0, atol=1e-14)
        assert warp(u, shift)[[0, -1]].tolist() == [0, 1]


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_times_lie_on_the_path_and_do_not_depend_on_their_batch(law, schedule):
    path = GaussianPath(schedule)
    t = law.sample(path, 5, draw(64))
    assert t.shape == (64, 1) and t.dtype == torch.float32 and (t >= 0).all() and (t <= 1).all()
    assert torch.equal(t[10:20], law.sample(path, 5, draw(64)[10:20]))
    ends = law.quantile(path, torch.tensor([0.0, 1 - 2.0**-24]))
    assert ends.isfinite().all() and (ends >= 0).all() and (ends <= 1).all()


def test_uniform_times_draw_every_level():
    levels = ZeroSNR().timestep(Uniform().sample(TABLE, 1, draw(20000))).long().flatten()
    assert set(levels.tolist()) == set(range(1000))


def test_partial_times_draw_the_least_noisy_levels_alone():
    levels = ZeroSNR().timestep(Partial(30).sample(TABLE, 1, draw(3000))).long().flatten()
    assert set(levels.tolist()) == set(range(30))


@pytest.mark.parametrize("schedule", [EDM(sigma_data=1.0), ZeroSNR(), GaussianPath().schedule], ids=name_of)
def test_log_normal_noise_has_its_mean_and_spread(schedule):
    alpha, sigma = schedule(LogNormalSigma(-0.4, 0.6).sample(GaussianPath(schedule), 1, draw(20000)))
    level = (sigma / alpha).log()
    assert level.mean().item() == pytest.approx(-0.4, abs=0.02) and level.std().item() == pytest.approx(0.6, rel=0.02)


def test_logit_normal_times_have_their_mean_and_spread():
    logit = torch.logit(LogitNormal(0.5, 0.8).sample(GaussianPath(), 1, draw(20000)))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02) and logit.std().item() == pytest.approx(0.8, rel=0.02)


def test_shifted_times_are_the_warp_of_uniform_ones_within_their_limits():
    t = Shifted(5.0, 0.02, 0.98).sample(GaussianPath(), 1, draw(4000))
    u = draw(4000).uniform(1)
    assert torch.equal(t, warp(u, 5.0).clamp(0.02, 0.98))
    assert t.min() == pytest.approx(0.02) and t.max() == pytest.approx(0.98)


def test_chunks_have_times_of_their_own():
    t = PerChunk(Shifted(), chunk=3, first_alone=True).sample(GaussianPath(), 7, draw(4))
    assert t.shape == (4, 7)
    assert torch.equal(t[:, 1:4], t[:, 1:2].expand(4, 3)) and torch.equal(t[:, 4:], t[:, 4:5].expand(4, 3))
    assert all(row.unique().numel() == 3 for row in t)
    frames = PerChunk(Uniform(), chunk=1).sample(GaussianPath(), 7, draw(4))
    assert frames.unique().numel() == 28
    assert torch.equal(frames[:, :3], PerChunk(Uniform(), chunk=1).sample(GaussianPath(), 3, draw(4)))
    with pytest.raises(ValueError, match="use 6"):
        PerChunk(chunk=3).sample(GaussianPath(), 7, draw(1))


@pytest.mark.parametrize("count", [1, 3, 7, 16, 40, 64])
def test_stratified_covers_every_level(count):
    """Each batch hits all its strata; strata · offsets reach all of the 1000 levels, the noisiest included."""
    law = Stratified()
    for step in range(5):
        t = law.sample(TABLE, 1, of_step(step, count))[:, 0]
        u = Stratified(Uniform()).sample(GaussianPath(), 1, of_step(step, count))[:, 0]
        assert sorted((u.double() * count).floor().tolist()) == list(range(count))
        assert torch.equal(ZeroSNR().timestep(t), (u.double() * 1000).floor().float())
    each = torch.arange(count)
    offsets = (torch.arange(1000).double() + 0.5) / 1000
    levels = {
        k for u in offsets for k in ZeroSNR().timestep(Uniform().quantile(TABLE, strata(each, u, count))).tolist()
    }
    assert levels == set(range(1000))


@pytest.mark.parametrize("count", [1, 8])
def test_stratified_rows_are_uniform_on_their_own(count):
    rows = [Stratified().sample(GaussianPath(), 1, of_step(step, count))[:, 0] for step in range(400)]
    for place in range(count):
        observed = torch.histc(torch.stack(rows)[:, place], 10, 0, 1)
        assert ((observed - 40) ** 2 / 40).sum() < 27.9  # χ² with 9 degrees of freedom, one in a thousand


def test_each_place_visits_all_strata():
    count = 8
    t = torch.stack([Stratified().sample(GaussianPath(), 1, of_step(step, count))[:, 0] for step in range(100)])
    visited = (t * count).floor().long()
    assert all(set(visited[:, place].tolist()) == set(range(count)) for place in range(count))
    assert len({tuple(row) for row in visited.tolist()}) > 95  # the order is drawn anew, not turned


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_stratified_times_do_not_depend_on_how_the_batch_is_split(law, parts):
    """As ranks and micro-batches do: each part knows its samples' numbers and places, and the size of the whole."""
    step, count = 3, 40
    whole = Stratified(law).sample(TABLE, 1, of_step(step, count))
    made = torch.empty_like(whole)
    for part in range(parts):
        places = torch.arange(part, count, parts)
        keys = seeds.keys(0, "times", step * count + places, places, count)
        made[places] = Stratified(law).sample(TABLE, 1, keys)
    assert torch.equal(made, whole)


def test_stratified_loss_varies_less_than_an_independent_one():
    """The spread of a batch's mean of t over steps: 1 / (√12 · N^1.5) instead of 1 / √(12 · N)."""
    spread = {
        law: torch.stack([law.sample(GaussianPath(), 1, of_step(s, 16)).mean() for s in range(300)]).std().item()
        for law in (Uniform(), Stratified())
    }
    assert spread[Uniform()] == pytest.approx(1 / math.sqrt(12 * 16), rel=0.15)
    assert spread[Stratified()] == pytest.approx(1 / (math.sqrt(12) * 16**1.5), rel=0.15)
