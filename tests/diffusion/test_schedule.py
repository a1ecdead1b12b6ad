"""Schedules: published table values, both ends, and the ways back from level and λ to time."""

import math

import pytest
import torch
from known import SCHEDULES, draw, name_of

from kinema.diffusion.schedule import EDM, LegacyDDPM, RectifiedFlow, ZeroSNR

LEVELS = [0, 10, 19, 100, 250, 500, 750, 900, 998, 999]
PUBLISHED = {
    ZeroSNR(): "0.99915 0.98979373 0.98101046 0.88676128 0.65245702 0.24101878 0.03279912 0.00296039 1.968e-7 0",
    ZeroSNR(3.0): "0.99745433 0.97078577 0.94657298 0.72824193 0.38905371 0.09532810 0.01083890 0.00094545 6.231e-8 0",
    ZeroSNR(3.0, keep_start=True): (
        "0.99915 0.98968378 0.98041813 0.86602303 0.56163062 0.16013721 0.01996648 0.00182679 1.231e-7 0"
    ),
}


@pytest.mark.parametrize("table", PUBLISHED, ids=name_of)
def test_table_has_the_published_values(table):
    assert table.abar()[LEVELS].tolist() == pytest.approx([*map(float, PUBLISHED[table].split())], abs=6e-9, rel=3e-4)


def test_shift_after_the_rescale_is_another_table():
    assert ZeroSNR(3.0, shift_after=True).abar()[500].item() == pytest.approx(0.09571977, abs=6e-9)


@pytest.mark.parametrize("shift, first, last", [(1.0, 3.5347, -7.7206), (3.0, 2.9854, -8.2956)])
def test_log_snr_spans_the_published_range(shift, first, last):
    alpha, sigma = ZeroSNR(shift)(torch.tensor([1, 999]).double() / 1000)
    assert (alpha / sigma).log().tolist() == pytest.approx([first, last], abs=6e-5)


def test_legacy_noise_spans_the_published_range():
    alpha, sigma = LegacyDDPM()(torch.tensor([0.001, 1.0]))
    assert (sigma / alpha).tolist() == pytest.approx([0.02917, 14.61], rel=5e-4)


def test_shift_divides_the_signal_to_noise_ratio_before_the_rescale():
    plain = LegacyDDPM().abar()
    shifted = ZeroSNR(3.0)._shifted(plain)
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / 3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_clean_data_hold_no_noise(schedule):
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = schedule(torch.zeros(2, 1, dtype=dtype))
        assert alpha.dtype == sigma.dtype == dtype and torch.equal(alpha, torch.ones(2, 1, dtype=dtype))
        assert not sigma.any()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_noise_grows_with_time_and_never_in_two_ways(schedule):
    alpha, sigma = schedule(torch.arange(1001) / 1000)
    assert (alpha.diff() < 0).all() and (sigma.double().diff() >= 0).all() and sigma.isfinite().all()
    if not isinstance(schedule, RectifiedFlow):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1001))


@pytest.mark.parametrize("table", [ZeroSNR(), ZeroSNR(3.0), LegacyDDPM()], ids=name_of)
def test_levels_survive_the_way_through_float32_times(table):
    k = torch.arange(-1, 1000)
    t = table.time_at(k)
    assert t.dtype == torch.float32 and torch.equal(table.timestep(t).long(), k)
    assert torch.equal(table(t)[0].double()[1:], table.abar().sqrt().float().double())


@pytest.mark.parametrize("table", [ZeroSNR(), ZeroSNR(3.0), LegacyDDPM()], ids=name_of)
def test_times_off_the_grid_are_those_of_the_nearest_level(table):
    t = table.time_at(torch.arange(-1, 1000))
    for off in (-0.0004, 0.0004):
        near = (t + off).clamp(0, 1)
        assert torch.equal(table.timestep(near), table.timestep(t))
        assert all(map(torch.equal, table(near), table(t)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_log_snr_leads_back_to_its_time(schedule):
    t = torch.arange(1, 1000).double() / 1000
    alpha, sigma = schedule(t)
    torch.testing.assert_close(schedule.time_of(alpha.log() - sigma.log()).double(), t, rtol=1e-6, atol=1e-7)
    ends = schedule.time_of(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_only_infinite_log_snr_is_clean(schedule):
    assert (schedule.time_of(torch.tensor([50.0, 9.0, 4.0])) > 0).all()


def test_quantiles_reach_every_level_equally_often():
    u = (torch.arange(5000).double() + 0.5) / 5000
    levels = ZeroSNR().timestep(ZeroSNR().quantile(u)).long()
    assert torch.equal(levels.bincount(minlength=1000), torch.full((1000,), 5))
    assert ZeroSNR().quantile(torch.tensor([0.0, 1 - 2.0**-24])).tolist() == pytest.approx([0.001, 1.0])


def test_rectified_flow_is_told_a_thousand_times_the_time():
    t = draw(20).uniform(1)
    assert torch.equal(RectifiedFlow().timestep(t), t * 1000)
    assert torch.equal(RectifiedFlow()(t)[0], 1 - t) and torch.equal(RectifiedFlow()(t)[1], t)


def test_edm_noise_runs_between_its_two_levels():
    schedule = EDM()
    assert schedule.sigma(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.002, 80.0], rel=1e-4)
    alpha, sigma = schedule(torch.tensor([1.0]))
    assert (sigma / alpha * schedule.sigma_data).item() == pytest.approx(80.0, rel=1e-4)
