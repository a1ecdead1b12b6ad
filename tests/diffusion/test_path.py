"""The path: both ends bit for bit, a time for each frame, and steps that stay on it."""

import pytest
import torch
from known import SCHEDULES, draw, name_of

from kinema.diffusion.path import GaussianPath, offset_noise
from kinema.diffusion.schedule import EDM, LegacyDDPM, RectifiedFlow, ZeroSNR


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_corrupting_to_time_zero_is_the_data_bit_for_bit(schedule):
    x0 = draw(3).normal(2, 4, 2, 2)
    assert torch.equal(GaussianPath(schedule).corrupt(x0, torch.zeros(3, 1), draw(3, "n")), x0)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZeroSNR(), ZeroSNR(shift=3.0)], ids=name_of)
def test_corrupting_to_time_one_is_the_noise_bit_for_bit(schedule):
    noise = draw(3, "n").normal(2, 4)
    x_1 = GaussianPath(schedule).corrupt(draw(3).normal(2, 4), torch.ones(3, 1), draw(3, "n"))
    assert torch.equal(x_1, noise)
    assert torch.equal(GaussianPath(schedule).prior((3, 2, 4), draw(3, "n")), noise)


def test_corrupting_bfloat16_data_is_float32():
    x0 = draw(3).normal(2, 4).bfloat16()
    x_t = GaussianPath(ZeroSNR()).corrupt(x0, torch.full((3, 1), 0.002), draw(3, "n"))
    assert x_t.dtype == torch.float32 and not torch.equal(x_t, x0.float())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_frames_have_their_own_times(schedule):
    path, x0, noise = GaussianPath(schedule), draw(2).normal(3, 4, 2, 2), draw(2, "n").normal(3, 4, 2, 2)
    t, s = torch.tensor([[0.3, 0.5, 1.0], [0.2, 0.2, 0.7]]), torch.tensor([[0.0, 0.4, 0.3], [0.1, 0.2, 0.6]])
    x_t = path.mix(x0, noise, t)
    x_s = path.step(x_t, t, s, x0)
    for b in range(2):
        for f in range(3):
            alpha, sigma = schedule(t[b, f])
            assert torch.equal(x_t[b, f], alpha * x0[b, f] + sigma * noise[b, f])
            alone = path.step(
                x_t[b : b + 1, f : f + 1], t[b : b + 1, f : f + 1], s[b : b + 1, f : f + 1], x0[b, f][None]
            )
            torch.testing.assert_close(x_s[b, f], alone[0, 0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_one_time_for_all_frames_is_that_time_for_each(schedule):
    path, x0, noise, t = (
        GaussianPath(schedule),
        draw(2).normal(3, 4),
        draw(2, "n").normal(3, 4),
        draw(2, "t").uniform(1),
    )
    assert torch.equal(path.mix(x0, noise, t), path.mix(x0, noise, t.expand(2, 3)))
    assert torch.equal(path.step(x0, t, t / 2, noise), path.step(x0, t.expand(2, 3), t.expand(2, 3) / 2, noise))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_a_step_with_the_true_data_keeps_to_the_path(schedule):
    path, x0, noise = GaussianPath(schedule), draw(5).normal(3), draw(5, "n").normal(3)
    t, s = torch.tensor([[1.0], [0.9], [0.5], [0.2], [0.01]]), torch.tensor([[0.7], [0.3], [0.0], [0.1], [0.005]])
    torch.testing.assert_close(
        path.step(path.mix(x0, noise, t), t, s, x0), path.mix(x0, noise, s), atol=3e-6, rtol=1e-5
    )


def test_ddim_is_a_rotation_of_x_and_v():
    path = GaussianPath(ZeroSNR())
    s, u = torch.full((1, 1), 0.7), torch.full((1, 1), 0.6)
    x, v = draw(1).normal(1, 5).double(), draw(1, "v").normal(1, 5).double()
    (alpha_s, sigma_s), (alpha_u, sigma_u) = path.at(s.double(), x), path.at(u.double(), x)
    turn = torch.atan2(sigma_s, alpha_s) - torch.atan2(sigma_u, alpha_u)
    torch.testing.assert_close(path.step(x, s, u, alpha_s * x - sigma_s * v), turn.cos() * x - turn.sin() * v)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t, s", [(1.0, 0.6), (0.6, 0.4), (0.02, 0.01)])
def test_a_step_of_any_eta_keeps_the_spread_of_the_path(schedule, eta, t, s):
    path, x0, n = GaussianPath(schedule), torch.full((1, 20000), 0.8), 20000
    t, s = torch.tensor([[t]]), torch.tensor([[s]])
    x_s = path.step(path.mix(x0, draw(1, "n").normal(n), t), t, s, x0, draw(1, "z"), eta)
    alpha, sigma = (value.item() for value in schedule(s))
    assert x_s.mean().item() == pytest.approx(0.8 * alpha, abs=0.03)
    assert x_s.std().item() == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("schedule", [ZeroSNR(), ZeroSNR(3.0), LegacyDDPM(), EDM()], ids=name_of)
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("t, s", [(1.0, 0.6), (0.6, 0.4), (0.02, 0.01)])
def test_fresh_noise_of_a_step_is_that_of_ddim(schedule, eta, t, s):
    """arXiv 2010.02502, eq. 16: eta = 1 is the ancestral step of DDPM."""
    t, s, nothing = torch.tensor([[t]]), torch.tensor([[s]]), torch.zeros(1, 50)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t.double()), schedule(s.double())
    spread = eta * sigma_s / sigma_t * (1 - alpha_t**2 / alpha_s**2).sqrt()
    made = GaussianPath(schedule).step(nothing, t, s, nothing, draw(1, "z"), eta)
    torch.testing.assert_close(made.double(), spread * draw(1, "z").normal(50), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_to_data_is_the_estimate(schedule, eta):
    path, x, estimate = GaussianPath(schedule), draw(2).normal(3), draw(2, "e").normal(3)
    for t in (1.0, 0.5, 0.001):
        made = path.step(x, torch.full((2, 1), t), torch.zeros(2, 1), estimate, draw(2, "z"), eta)
        assert torch.equal(made, estimate)


@pytest.mark.parametrize("schedule", [ZeroSNR(), LegacyDDPM(), EDM(), RectifiedFlow()], ids=name_of)
def test_raising_noise_lands_on_the_path(schedule):
    path, x0 = GaussianPath(schedule), torch.full((1, 20000), 0.8)
    t, s = torch.tensor([[0.3]]), torch.tensor([[0.5]])
    x_s = path.raise_noise(path.mix(x0, draw(1, "n").normal(20000), t), t, s, draw(1, "z"))
    alpha, sigma = (value.item() for value in schedule(s))
    assert x_s.mean().item() == pytest.approx(0.8 * alpha, abs=0.03)
    assert x_s.std().item() == pytest.approx(sigma, rel=0.02)


def test_a_random_step_without_a_draw_is_an_error():
    with pytest.raises(ValueError, match="give it a draw"):
        GaussianPath().step(torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), 0.5), torch.zeros(1, 1), eta=1.0)


def test_offset_noise_is_one_number_per_sample():
    noise = draw(4).normal(3, 2, 2, 2)
    added = offset_noise(noise, draw(4, "offset"), 0.1) - noise
    assert added.flatten(1).std(1).max() < 1e-6 and added[:, 0, 0, 0, 0].unique().numel() == 4
    torch.testing.assert_close(added[:, 0, 0, 0, 0], 0.1 * draw(4, "offset").normal())
