"""Weights: stated once, they are one loss in every space, with their limits where nothing or all is noise."""

import math

import pytest
import torch
from known import PREDICTIONS, SCHEDULES, draw, name_of

from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Clean, Epsilon, Flow, V
from kinema.diffusion.schedule import EDM, RectifiedFlow, ZeroSNR
from kinema.diffusion.times import shifted
from kinema.diffusion.weighting import Bell, EDMWeight, Even, MinSNR

SHARED = [MinSNR(), MinSNR(plus_one=True), MinSNR(gamma=1.0), EDMWeight(), *(Even(on=space) for space in PREDICTIONS)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("weigh", SHARED, ids=repr)
def test_min_snr_in_every_space_is_one_loss(weigh, schedule):
    path, t = GaussianPath(schedule), torch.tensor([[0.2], [0.5], [0.7], [0.9]]).double()
    x0, noise, guess = (draw(4).fold(name).normal(1, 8).double() for name in ("x0", "noise", "guess"))
    alpha, sigma = path.at(t, x0)
    guessed_noise = (alpha * x0 + sigma * noise - alpha * guess) / sigma
    losses = []
    for predicts in PREDICTIONS:
        error = predicts.target(guess, guessed_noise, alpha, sigma) - predicts.target(x0, noise, alpha, sigma)
        losses.append(weigh(path, predicts, t) * error.square().mean(2))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


def test_min_snr_batch_of_four():
    """Each row has its own weight, min(SNR, γ) / (SNR + 1) on v, and not the batch's smallest."""
    path, t = GaussianPath(ZeroSNR()), torch.tensor([[0.02], [0.3], [0.6], [0.95]]).double()
    alpha, sigma = path.schedule(t)
    snr = alpha**2 / sigma**2
    weights = MinSNR()(path, V(), t)
    assert weights.shape == (4, 1)
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(MinSNR()(path, Clean(), t), snr.clamp(max=5))
    torch.testing.assert_close(MinSNR()(path, Epsilon(), t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(MinSNR(plus_one=True)(path, V(), t), (5 * sigma**2).clamp(max=1))
    assert torch.equal(weights[2:3], MinSNR()(path, V(), t[2:3]))


@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZeroSNR(), ZeroSNR(3.0)], ids=name_of)
@pytest.mark.parametrize("predicts", [V(), Flow()], ids=name_of)
def test_weights_have_their_limits_at_both_ends(schedule, predicts):
    path, ends = GaussianPath(schedule), torch.tensor([0.0, 1.0])
    assert MinSNR()(path, predicts, ends).tolist() == [0, 0]
    assert MinSNR(plus_one=True)(path, predicts, ends).tolist() == [0, 1]
    assert EDMWeight()(path, predicts, ends).tolist() == [1, 4]
    assert Even(on=Clean())(path, predicts, ends).tolist() == [0, 1]
    assert Even(on=Epsilon())(path, predicts, ends).tolist() == [1, 0]


def test_edm_weight_is_the_papers_and_even_on_v_is_edms_own():
    path, t, data = GaussianPath(EDM(sigma_data=1.0)), torch.arange(1, 1001).double() / 1000, 0.5
    level = EDM(sigma_data=1.0).sigma(t)
    on_clean = (level**2 + data**2) / (level * data) ** 2
    torch.testing.assert_close(EDMWeight(data)(path, Clean(), t), on_clean)
    torch.testing.assert_close(EDMWeight(data)(path, Epsilon(), t), on_clean * level**2)
    alpha, sigma = path.schedule(t)
    torch.testing.assert_close(EDMWeight(data)(path, V(), t), alpha**2 + sigma**2 / data**2)

    own = EDM(sigma_data=data)  # here the data are divided by sigma_data, so an error of theirs counts sigma_data² less
    level = own.sigma(t)
    theirs = (level**2 + data**2) / (level * data) ** 2 * data**2
    torch.testing.assert_close(Even(on=V(-1))(GaussianPath(own), Clean(), t), theirs)


@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_even_is_one_on_the_networks_own_error(predicts):
    t = torch.tensor([[0.0], [0.3], [1.0]])
    assert torch.equal(Even()(GaussianPath(ZeroSNR()), predicts, t), torch.ones(3, 1))
    inner = torch.tensor([[0.1], [0.5], [0.9]])
    torch.testing.assert_close(Even(on=predicts)(GaussianPath(ZeroSNR()), predicts, inner), torch.ones(3, 1))


@pytest.mark.parametrize("shift, c", [(1, 4.01456), (3, 4.56919), (5, 5.27717), (8, 6.28413)])
def test_bell_is_zero_at_both_ends_and_one_on_average(shift, c):
    weigh, path = Bell(shift), GaussianPath()
    assert weigh(path, Flow(), torch.tensor([0.0, 1.0])).abs().max() < 1e-6
    grid = torch.tensor(shifted(1000, shift), dtype=torch.float64)
    assert weigh(path, Flow(), grid).mean().item() == pytest.approx(1, abs=1e-12)
    assert weigh(path, Flow(), torch.tensor([0.5])).item() == pytest.approx(c * (1 - math.exp(-0.5)), rel=3e-6)
    assert weigh(path, Flow(), grid).max().item() <= c * 0.393470


@pytest.mark.parametrize("weigh", [Even(), Bell(), MinSNR(), EDMWeight()], ids=repr)
def test_every_frame_is_weighed_by_its_own_time(weigh):
    path, t = GaussianPath(), draw(3).uniform(5)
    weights = weigh(path, Flow(), t)
    assert weights.shape == (3, 5) and weights.dtype == torch.float32
    torch.testing.assert_close(weights[:, 2:3], weigh(path, Flow(), t[:, 2:3]))
