"""What must hold exactly: schedules, predictions, weights, grids, guidance and the denoiser's two faces."""

import math
from itertools import pairwise

import pytest
import torch

from kinema import seeds
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import Cosine, guided
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Clean, Epsilon, Flow, V
from kinema.diffusion.schedule import EDM, LegacyDDPM, RectifiedFlow, ZeroSNR
from kinema.diffusion.times import (
    LogitNormal,
    LogNormalSigma,
    Partial,
    PerChunk,
    Shifted,
    Stratified,
    Uniform,
    karras,
    leading,
    linspace,
    shifted,
    trailing,
    unwarp,
    warp,
    warped,
)
from kinema.diffusion.weighting import Bell, EDMWeight, Even, MinSNR

SCHEDULES = [RectifiedFlow(), ZeroSNR(), ZeroSNR(shift=3.0), LegacyDDPM(), EDM()]
PREDICTIONS = [Flow(), V(), V(-1), Epsilon(), Clean()]


def draw(n: int, name: str = "test", **options) -> seeds.Keys:
    return seeds.keys(0, name, range(n), **options)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=str)
def test_clean_estimate_of_the_target_is_the_data(schedule, predicts):
    x0, noise = (draw(1000).fold(name).normal(2).double() for name in ("x0", "noise"))
    t = draw(1000).fold("t").uniform(1).double() * 0.98 + 0.01
    alpha, sigma = schedule(t)
    x_t = alpha * x0 + sigma * noise
    target = predicts.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(predicts.to_clean(target, x_t, alpha, sigma), x0, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(predicts.to_noise(target, x_t, alpha, sigma), noise, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_corrupting_to_time_zero_is_the_data_bit_for_bit(schedule):
    x0 = draw(3).normal(2, 4, 2, 2)
    assert torch.equal(GaussianPath(schedule).corrupt(x0, torch.zeros(3, 1), draw(3, "n")), x0)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZeroSNR(), ZeroSNR(shift=3.0)], ids=str)
def test_time_one_is_noise_alone(schedule):
    noise = draw(3, "n").normal(2, 4)
    x_1 = GaussianPath(schedule).corrupt(draw(3).normal(2, 4), torch.ones(3, 1), draw(3, "n"))
    assert torch.equal(x_1, noise)


def test_frames_have_their_own_times():
    path, x0, noise = GaussianPath(), draw(2).normal(3, 4, 2, 2), draw(2, "n").normal(3, 4, 2, 2)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]])
    x_t = path.mix(x0, noise, t)
    for b in range(2):
        for f in range(3):
            torch.testing.assert_close(x_t[b, f], (1 - t[b, f]) * x0[b, f] + t[b, f] * noise[b, f])


def test_table_has_the_published_values():
    published = {0: 0.99915, 10: 0.98979373, 100: 0.88676128, 500: 0.24101878, 900: 0.00296039, 999: 0.0}
    shifted_by_3 = {0: 0.99745433, 250: 0.38905371, 500: 0.09532810, 750: 0.01083890}
    kept = {0: 0.99915, 250: 0.56163062, 900: 0.00182679}
    for table, values in (
        (ZeroSNR(), published),
        (ZeroSNR(3.0), shifted_by_3),
        (ZeroSNR(3.0, keep_start=True), kept),
    ):
        assert {k: pytest.approx(v, abs=1e-7) for k, v in values.items()} == {k: table.abar()[k].item() for k in values}
    assert ZeroSNR(3.0, shift_after=True).abar()[500].item() == pytest.approx(0.09571977, abs=1e-7)


def test_levels_survive_the_way_through_float32_times():
    table, k = ZeroSNR(), torch.arange(-1, 1000)
    assert torch.equal(table.timestep(table.time_at(k)).long(), k)
    assert torch.equal(table.time_of(-torch.tensor([math.inf, -math.inf])), torch.tensor([1.0, 0.0]))


def test_shift_divides_the_signal_to_noise_ratio_before_the_rescale():
    plain = LegacyDDPM().abar()
    kept = plain / (3 + (1 - 3) * plain)
    torch.testing.assert_close(kept / (1 - kept), plain / (1 - plain) / 3)


def test_warp_has_the_published_values_and_an_inverse():
    assert warped((1, 0.75, 0.5, 0.25), 5) == pytest.approx((1, 0.9375, 0.8333333, 0.625), abs=1e-6)
    assert warped((1, 0.75, 0.5, 0.25), 8) == pytest.approx((1, 0.96, 0.8888889, 0.7272727), abs=1e-6)
    assert [1000 * t for t in shifted(1000, 5)[-3:]] == pytest.approx([14.8221, 9.9206, 4.9801], abs=1e-4)
    u = draw(100).uniform(1).double()
    torch.testing.assert_close(unwarp(warp(u, 5.0), 5.0), u)


def test_every_grid_has_its_number_of_decreasing_times():
    for n in range(1, 1001):
        for grid in (trailing(n), shifted(n), linspace(n)) + ((leading(n),) if n <= 1000 else ()):
            assert len(grid) == n and grid[0] <= 1 and grid[-1] > 0
            assert all(a > b for a, b in pairwise(grid))
    assert len(karras(EDM(), 18)) == 18


def test_trailing_levels_are_the_published_ones():
    told = {n: ZeroSNR().timestep(torch.tensor(trailing(n))).long().tolist() for n in (4, 7)}
    assert told == {4: [999, 749, 499, 249], 7: [999, 856, 713, 570, 428, 285, 142]}


@pytest.mark.parametrize("shift, c", [(1, 4.01456), (3, 4.56919), (5, 5.27717), (8, 6.28413)])
def test_bell_is_zero_at_both_ends_and_one_on_average(shift, c):
    weigh, path = Bell(shift), GaussianPath()
    assert weigh(path, Flow(), torch.tensor([0.0, 1.0])).abs().max() < 1e-6
    assert weigh(path, Flow(), torch.tensor(shifted(1000, shift))).mean().item() == pytest.approx(1, abs=1e-5)
    assert weigh(path, Flow(), torch.tensor([0.5])).item() == pytest.approx(c * 0.393469, abs=1e-4)


@pytest.mark.parametrize("weigh", [MinSNR(), MinSNR(plus_one=True), EDMWeight(), Even(on=V())], ids=str)
def test_a_weight_gives_one_loss_in_every_space(weigh):
    path = GaussianPath(ZeroSNR())
    t = torch.tensor([[0.2], [0.5], [0.7], [0.9]])  # a batch of four different times
    x0, noise, guess = (draw(4).fold(name).normal(1, 8) for name in ("x0", "noise", "guess"))
    alpha, sigma = path.at(t, x0)
    x_t, losses = path.mix(x0, noise, t), []
    n_hat = (x_t - alpha * guess) / sigma
    for predicts in (V(), Epsilon(), Clean(), Flow()):
        error = predicts.target(guess, n_hat, alpha, sigma) - predicts.target(x0, noise, alpha, sigma)
        losses.append(weigh(path, predicts, t) * error.square().mean(2))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-5)


def test_weights_have_their_limits_at_both_ends():
    path, ends = GaussianPath(ZeroSNR()), torch.tensor([0.0, 1.0])
    assert torch.equal(MinSNR()(path, V(), ends), torch.tensor([0.0, 0.0]))
    assert MinSNR(plus_one=True)(path, V(), ends)[1] == 1


def test_edm_is_the_v_prediction_of_its_coordinates():
    schedule, data = EDM(), EDM().sigma_data
    t = draw(50).uniform().double()
    alpha, sigma = schedule(t)
    level = schedule.sigma(t)
    x, out = draw(50).fold("x").normal().double(), draw(50).fold("f").normal().double()
    c_skip, c_out = data**2 / (level**2 + data**2), level * data / (level**2 + data**2).sqrt()
    estimate = c_skip * x + c_out * out  # of data that are not divided by their deviation
    x_t = x / (level**2 + data**2).sqrt()  # c_in · x
    torch.testing.assert_close(data * V(-1).to_clean(out, x_t, alpha, sigma), estimate)
    torch.testing.assert_close(schedule.timestep(t).double(), level.log() / 4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("law", [Uniform(), Partial(300), LogNormalSigma(), LogitNormal(), Shifted(5.0, 0.02, 0.98)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_times_lie_on_the_path_and_rows_do_not_depend_on_their_batch(law, schedule):
    t = law.sample(GaussianPath(schedule), 5, draw(64))
    assert t.shape == (64, 1) and t.dtype == torch.float32 and (t >= 0).all() and (t <= 1).all()
    assert torch.equal(t[10:20], law.sample(GaussianPath(schedule), 5, draw(64)[10:20]))


def test_chunks_have_times_of_their_own():
    t = PerChunk(Shifted(), chunk=3, first_alone=True).sample(GaussianPath(), 7, draw(4))
    assert t.shape == (4, 7)
    assert torch.equal(t[:, 1], t[:, 3]) and not torch.equal(t[:, 0], t[:, 1]) and not torch.equal(t[:, 3], t[:, 4])
    with pytest.raises(ValueError, match="use 6"):
        PerChunk(chunk=3).sample(GaussianPath(), 7, draw(1))


@pytest.mark.parametrize("count", [1, 3, 7, 16, 40, 64])
def test_stratified_times_hit_every_stratum_once(count):
    path, law = GaussianPath(ZeroSNR()), Stratified()
    k = ZeroSNR().timestep(law.sample(path, 1, draw(count))).flatten()
    assert sorted(((k + 0.5) * count / 1000).floor().tolist()) == pytest.approx(list(range(count)), abs=1)
    whole, parts = draw(count), [draw(count)[i : i + 5] for i in range(0, count, 5)]
    assert torch.equal(law.sample(path, 1, whole), torch.cat([law.sample(path, 1, part) for part in parts]))


def test_stratified_rows_are_uniform_and_every_place_visits_all_strata():
    path, law, count = GaussianPath(ZeroSNR()), Stratified(), 8
    rows = [law.sample(path, 1, seeds.keys(0, "s", range(s * count, (s + 1) * count), count=count)) for s in range(400)]
    t = torch.stack(rows)[..., 0]  # [steps, places]
    strata = (t * count).ceil().long() - 1
    assert all(set(strata[:, place].tolist()) == set(range(count)) for place in range(count))
    observed = torch.histc(t[:, 0], 10, 0, 1)
    assert ((observed - 40) ** 2 / 40).sum() < 27.9  # χ² with 9 degrees of freedom, one in a thousand
    assert {tuple(row.tolist()) for row in strata} != {tuple(strata[0].tolist())}


def backbone(calls: list):
    def network(x, timestep, *, text):
        calls.append((x.shape[0], timestep))
        return x * 0.5 + text[:, :, None, None, None] + timestep[..., None, None, None] / 1000

    return network


def test_guidance_of_one_is_the_denoiser_and_costs_one_call():
    calls: list = []
    denoiser = LatentDenoiser(backbone(calls), GaussianPath(), Flow())
    x, t, cond, uncond = draw(2).normal(3, 4, 2, 2), torch.full((2, 1), 0.6), torch.ones(2, 1), torch.zeros(2, 1)
    plain = denoiser(x, t, {"text": cond})
    calls.clear()
    assert torch.equal(guided(denoiser, {"text": cond}, {"text": uncond}, 1.0)(x, t), plain) and len(calls) == 1
    one_by_one = guided(denoiser, {"text": cond}, {"text": uncond}, 3.0)(x, t)
    together = guided(denoiser, {"text": cond}, {"text": uncond}, 3.0, batched=True)(x, t)
    torch.testing.assert_close(one_by_one, together)
    without = denoiser(x, t, {"text": uncond})
    torch.testing.assert_close(one_by_one, without + 3 * (plain - without))


def test_cosine_guidance_is_monotone():
    w = Cosine(6.0, 5.0)(torch.tensor(trailing(50)))
    assert w[:4].tolist() == pytest.approx([7.0, 6.864, 6.509, 6.011], abs=2e-3)
    assert (w.diff() <= 0).all() and w[-1].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("predicts", PREDICTIONS, ids=str)
def test_perfect_predictor_has_no_loss(predicts):
    path, x0, t = GaussianPath(ZeroSNR()), draw(4).normal(3, 4, 2, 2), torch.full((4, 1), 0.3)
    noise = draw(4).fold("noise").normal(3, 4, 2, 2)
    perfect = LatentDenoiser(lambda x, k: predicts.target(x0, noise, *path.at(t, x0)), path, predicts)
    loss = perfect.loss(x0, t, {}, draw(4))
    assert loss.shape == (4, 3) and loss.dtype == torch.float32 and loss.max() == 0
    rounded = LatentDenoiser(lambda x, k: predicts.target(x0, noise, *path.at(t, x0)).bfloat16(), path, predicts)
    assert rounded.loss(x0, t, {}, draw(4)).max() < 1e-4  # what bfloat16 rounds of the output, and nothing more


def test_loss_of_a_row_does_not_depend_on_its_batch():
    denoiser = LatentDenoiser(lambda x, k: x * 0.3, GaussianPath(), Flow())
    x0, t = draw(6).normal(3, 4, 2, 2), draw(6).fold("t").uniform(1)
    whole = denoiser.loss(x0, t, {}, draw(6, "n"))
    assert torch.equal(whole[2:4], denoiser.loss(x0[2:4], t[2:4], {}, draw(6, "n")[2:4]))


def test_weighted_error_of_the_data_is_the_plain_error_of_v():
    path, x0, t = GaussianPath(ZeroSNR()), draw(4).normal(3, 4, 2, 2), torch.tensor([[0.1], [0.4], [0.8], [1.0]])
    denoiser = LatentDenoiser(lambda x, k: torch.tanh(x), path, V())
    noise = draw(4, "n").fold("noise").normal(3, 4, 2, 2)
    _, sigma = path.at(t, x0)
    error = (denoiser(path.mix(x0, noise, t), t, {}) - x0).square() / sigma**2
    torch.testing.assert_close(denoiser.loss(x0, t, {}, draw(4, "n")), error.flatten(2).mean(2), rtol=1e-3, atol=1e-4)
