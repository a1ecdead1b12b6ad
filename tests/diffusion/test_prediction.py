"""Predictions: each turns its own target back into the data and the noise, on every path."""

import pytest
import torch
from known import PREDICTIONS, SCHEDULES, draw, name_of

from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Clean, Epsilon, Flow, V
from kinema.diffusion.schedule import EDM, RectifiedFlow, ZeroSNR


def corrupted(schedule, t):
    x0, noise = (draw(len(t)).fold(name).normal(2, 3).to(t.dtype) for name in ("x0", "noise"))
    alpha, sigma = GaussianPath(schedule).at(t, x0)
    return x0, noise, alpha, sigma, alpha * x0 + sigma * noise


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_the_target_holds_the_data_and_the_noise(predicts, schedule):
    t = draw(1000).fold("t").uniform(1).double().clamp(0.002, 0.99)
    x0, noise, alpha, sigma, x_t = corrupted(schedule, t)
    target = predicts.target(x0, noise, alpha, sigma)
    worst = (1 / alpha.min() + 1 / sigma.min()).item()  # what Epsilon and Clean divide by
    torch.testing.assert_close(predicts.to_clean(target, x_t, alpha, sigma), x0, rtol=0, atol=1e-14 * worst)
    torch.testing.assert_close(predicts.to_noise(target, x_t, alpha, sigma), noise, rtol=0, atol=1e-14 * worst)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_float32_keeps_the_data_at_a_thousand_times(predicts, schedule):
    t = draw(1000).fold("t").uniform(1)
    x0, noise, alpha, sigma, x_t = corrupted(schedule, t)
    found = predicts.to_clean(predicts.target(x0, noise, alpha, sigma), x_t, alpha, sigma)
    if isinstance(predicts, Epsilon):  # dividing by alpha is what it is
        found, x0 = alpha * found, alpha * x0
    torch.testing.assert_close(found, x0, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("predicts", [Flow(), V(), V(-1), Clean()], ids=name_of)
def test_pure_noise_and_clean_data_are_read_without_division_by_zero(predicts):
    x0, noise, alpha, sigma, x_t = corrupted(ZeroSNR(), torch.tensor([[0.0], [1.0]]))
    target = predicts.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(predicts.to_clean(target, x_t, alpha, sigma), x0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_factors_carry_an_error_between_the_spaces(predicts, schedule):
    t = draw(200).fold("t").uniform(1).double().clamp(0.002, 0.99)
    x0, noise, alpha, sigma, x_t = corrupted(schedule, t)
    own = draw(200, "error").normal(2, 3).double()
    out = predicts.target(x0, noise, alpha, sigma) + own
    f, f_snr = predicts.factors(alpha, sigma)
    clean, noise_hat = predicts.to_clean(out, x_t, alpha, sigma), predicts.to_noise(out, x_t, alpha, sigma)
    torch.testing.assert_close((clean - x0).square(), f * own.square(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close((noise_hat - noise).square(), f_snr * own.square(), rtol=1e-6, atol=1e-9)
    for space in PREDICTIONS:
        there = space.target(clean, noise_hat, alpha, sigma) - space.target(x0, noise, alpha, sigma)
        measured = space.measure(f, f_snr) * own.square()
        torch.testing.assert_close(there.square(), measured, rtol=1e-6, atol=1e-9)


def test_error_spaces_of_the_straight_path():
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    factors = Flow().factors(*RectifiedFlow()(t))
    torch.testing.assert_close(Clean().measure(*factors), t**2)
    torch.testing.assert_close(Epsilon().measure(*factors), (1 - t) ** 2)
    torch.testing.assert_close(V().measure(*factors), t**2 + (1 - t) ** 2)
    torch.testing.assert_close(Flow().measure(*factors), torch.ones(3).double())


def test_edm_is_minus_v_in_its_coordinates():
    schedule, data, t = EDM(), EDM().sigma_data, draw(1000).uniform().double()
    alpha, sigma = schedule(t)
    level = schedule.sigma(t)
    norm = (level**2 + data**2).sqrt()
    x, out = draw(1000).fold("x").normal().double(), draw(1000).fold("f").normal().double()
    c_skip, c_out, c_in, c_noise = data**2 / norm**2, level * data / norm, 1 / norm, level.log() / 4
    torch.testing.assert_close(data * V(-1).to_clean(out, c_in * x, alpha, sigma), c_skip * x + c_out * out)
    torch.testing.assert_close(schedule.timestep(t).double(), c_noise, atol=1e-6, rtol=1e-5)
    x0, noise = out, draw(1000).fold("n").normal().double()
    mixed = GaussianPath(schedule).mix(x0 / data, noise.float(), t)  # c_in · (x0 + σ·noise) is x_t of the scaled data
    torch.testing.assert_close(mixed.double(), c_in * (x0 + level * noise), atol=1e-5, rtol=1e-5)
