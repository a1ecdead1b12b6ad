"""The denoiser's two faces: the estimate, and how wrong it is, frame by frame and in float32."""

import pytest
import torch
from known import PREDICTIONS, SCHEDULES, draw, name_of

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath, offset_noise
from kinema.diffusion.prediction import Flow, V
from kinema.diffusion.schedule import RectifiedFlow, ZeroSNR

X0 = draw(4, "x0").normal(3, 4, 2, 2)
NOISE = draw(4).fold("noise").normal(3, 4, 2, 2)  # what `loss` corrupts with


def perfect(path, predicts, t, dtype=torch.float32):
    """A network that puts out its target."""
    return LatentDenoiser(lambda x, told: predicts.target(X0, NOISE, *path.at(t, X0)).to(dtype), path, predicts)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_perfect_predictor_has_zero_loss(predicts, schedule):
    path, t = GaussianPath(schedule), torch.tensor([[0.0], [0.003], [0.6], [1.0]])
    loss = perfect(path, predicts, t).loss(X0, t, {}, draw(4))
    assert loss.shape == (4, 3) and loss.dtype == torch.float32 and not loss.any()


@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
@pytest.mark.parametrize("k", [0, 1, 2, 500, 999])
def test_perfect_predictor_has_zero_loss_under_bf16(predicts, k):
    """What bfloat16 rounds of the output and nothing more: also where there is next to no noise."""
    path, t = GaussianPath(ZeroSNR()), torch.full((4, 1), (k + 1) / 1000)
    target = predicts.target(X0, NOISE, *path.at(t, X0))
    loss = perfect(path, predicts, t, torch.bfloat16).loss(X0, t, {}, draw(4))
    rounding = (target.bfloat16().float() - target).square().flatten(2).mean(2)
    assert loss.dtype == torch.float32 and torch.equal(loss, rounding) and loss.max() < 3e-5
    of_bfloat16 = perfect(path, predicts, t, torch.bfloat16).loss(X0.bfloat16(), t, {}, draw(4))
    assert of_bfloat16.dtype == torch.float32


def test_estimate_is_float32_whatever_the_network_computes_in():
    path, t = GaussianPath(ZeroSNR()), torch.full((4, 1), 0.003)
    seen = []
    denoiser = LatentDenoiser(lambda x, told: (seen.append((x, told)), (x * 0.1).bfloat16())[1], path, V())
    estimate = denoiser(X0.bfloat16(), t, {})
    assert estimate.dtype == torch.float32 and seen[0][0].dtype == seen[0][1].dtype == torch.float32


@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_estimate_of_a_perfect_predictor_is_the_data(predicts):
    path, t = GaussianPath(ZeroSNR()), torch.tensor([[0.1, 0.5, 0.9]]).expand(4, 3)
    estimate = perfect(path, predicts, t)(path.mix(X0, NOISE, t), t, {})
    torch.testing.assert_close(estimate, X0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
@pytest.mark.parametrize("shape", [(4, 1), (4, 3)])
def test_network_is_told_the_schedules_timestep_and_its_conditions(schedule, shape):
    t, told = draw(4, "t").uniform(*shape[1:]), {}

    def backbone(x, timestep, *, text, cache):
        told.update(timestep=timestep, text=text, cache=cache)
        return x

    text = torch.ones(4, 2)
    LatentDenoiser(backbone, GaussianPath(schedule), V())(X0, t, {"text": text}, cache="cache")
    assert torch.equal(told["timestep"], schedule.timestep(t)) and told["timestep"].shape == shape
    assert told["text"] is text and told["cache"] == "cache"


def test_one_time_for_all_frames_has_the_loss_of_that_time_for_each():
    denoiser, t = LatentDenoiser(lambda x, told: x * 0.3, GaussianPath(), Flow()), draw(4, "t").uniform(1)
    whole = denoiser.loss(X0, t, {}, draw(4))
    torch.testing.assert_close(whole, denoiser.loss(X0, t.expand(4, 3), {}, draw(4)))


def test_loss_of_a_frame_is_that_of_its_own_time():
    denoiser, t = LatentDenoiser(lambda x, told: torch.tanh(x), GaussianPath(ZeroSNR()), V()), draw(4, "t").uniform(3)
    whole = denoiser.loss(X0, t, {}, draw(4))
    for frame in range(3):
        alone = denoiser.loss(X0, t[:, frame : frame + 1], {}, draw(4))
        torch.testing.assert_close(whole[:, frame], alone[:, frame])


def test_loss_of_a_row_does_not_depend_on_its_batch():
    denoiser, t = LatentDenoiser(lambda x, told: x * 0.3, GaussianPath(), Flow()), draw(4, "t").uniform(1)
    whole = denoiser.loss(X0, t, {}, draw(4, "n"), offset=0.1)
    for rows in (slice(0, 1), slice(1, 4)):
        assert torch.equal(whole[rows], denoiser.loss(X0[rows], t[rows], {}, draw(4, "n")[rows], offset=0.1))
    assert whole.unique().numel() == 12


def test_offset_noise_shifts_no_other_draw():
    seen = []
    denoiser = LatentDenoiser(lambda x, told: (seen.append(x), x)[1], GaussianPath(), Flow())
    for offset in (0.0, 0.1):
        denoiser.loss(X0, torch.ones(4, 1), {}, draw(4), offset=offset)
    assert torch.equal(seen[0], NOISE) and torch.equal(seen[1], offset_noise(NOISE, draw(4).fold("offset"), 0.1))


@pytest.mark.parametrize("t", [0.001, 0.003, 0.1, 0.5, 0.9, 1.0])
def test_weighted_error_of_the_data_is_the_plain_error_of_v(t):
    """mean[(x̂0 - x0)² / (1 - ᾱ)], as the public CogVideoX trains, in float64 because it divides by 1 - ᾱ."""
    path, t = GaussianPath(ZeroSNR()), torch.full((4, 1), t)
    denoiser = LatentDenoiser(lambda x, told: torch.tanh(x), path, V())
    alpha, sigma = path.at(t.double(), X0)
    x_t = path.mix(X0, NOISE, t)
    estimate = alpha * x_t - sigma * torch.tanh(x_t)
    mixed = alpha * X0 + sigma * NOISE  # x_t is rounded to float32; its error belongs to neither side
    estimate = estimate + alpha * (mixed - x_t)
    error = ((estimate - X0).square() / sigma**2).flatten(2).mean(2)
    torch.testing.assert_close(denoiser.loss(X0, t, {}, draw(4)).double(), error, rtol=1e-6, atol=1e-6)


def test_error_of_flow_is_the_error_of_the_data_over_t_squared():
    path, t = GaussianPath(RectifiedFlow()), torch.tensor([[0.1], [0.4], [0.8], [1.0]])
    denoiser = LatentDenoiser(lambda x, told: torch.tanh(x), path, Flow())
    error = (denoiser(path.mix(X0, NOISE, t), t, {}) - X0).square().flatten(2).mean(2) / t**2
    torch.testing.assert_close(denoiser.loss(X0, t, {}, draw(4)), error, rtol=1e-4, atol=1e-5)
