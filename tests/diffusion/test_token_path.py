"""Token paths: what the spec's numbers, both ends and known distributions say about corrupting and stepping."""

import math

import pytest
import torch
from heads import Largest, plain
from known import draw as keys

from kinema.diffusion.logits import categorical
from kinema.diffusion.logits import draw as tokens_of
from kinema.diffusion.times import NearData, Shifted, SomeShared, shifted
from kinema.diffusion.token_path import MetricPath, MixturePath, Start, fit_path
from kinema.models.ursa.fsq import codebook, lifted

BOOK = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
PATH = MetricPath(BOOK, 0.9, 3.0)
MIXTURE, MASKED = MixturePath(64), MixturePath(64, "mask")
PATHS = [PATH, MIXTURE, MASKED]
SHAPE = (5, 3, 4, 4)


def codes(count: int = 64, name: str = "codes") -> torch.Tensor:
    return keys(SHAPE[0], name).integers(count, *SHAPE[1:])


def sharp(x0: torch.Tensor, codes: int = 64):
    """An estimate that is sure of x0."""
    return plain(60.0 * torch.nn.functional.one_hot(x0, codes).float())


def test_beta_is_that_of_the_paper():
    t = torch.tensor([0.9, 0.75, 0.5, 0.25, 0.1, 0.001, 0.0], dtype=torch.float64)
    wanted = torch.tensor([0.415244, 1.116123, 3, 8.063626, 21.674022, 1502.208, 1502.208], dtype=torch.float64)
    torch.testing.assert_close(PATH.beta(t), wanted, atol=1e-3, rtol=1e-6)


def test_probabilities_are_those_of_the_specification():
    t = torch.tensor([0.9, 0.5, 0.1])
    own = PATH.log_prob(torch.tensor([5, 5, 5]), t).exp()[:, 5]
    torch.testing.assert_close(own, torch.tensor([0.0349989, 0.3982651, 0.9975504]), atol=1e-6, rtol=1e-5)
    p = PATH.log_prob(torch.tensor([5] * 4), torch.tensor([1, 0.9, 0.5, 0.1])).exp()
    entropy = torch.tensor([4.15888, 4.09593, 2.10588, 0.01730])
    torch.testing.assert_close(-torch.special.xlogy(p, p).sum(-1), entropy, atol=1e-5, rtol=1e-5)


def test_rates_are_those_of_the_specification():
    """With codes 0 … 63 on their way to themselves rolled by one, at t = ½ and from there to ¼; and from 1 to ¾."""
    generator = torch.Generator().manual_seed(7)
    torch.randint(300, (2, 8), generator=generator)
    x_t = torch.randint(64, (2, 24), generator=generator)
    x0 = x_t.roll(1, dims=1).flatten()
    half, quarter = torch.full((48,), 0.5), torch.full((48,), 0.25)
    rates = PATH.log_rates(x_t.flatten(), x0, half)
    flow = rates.exp() * PATH.beta_slope(half)[:, None]
    assert flow.sum().item() == pytest.approx(808.1984, rel=1e-5)
    assert flow[0].max().item() == pytest.approx(10.78659, rel=1e-5)
    for integral, total, jump in (("exact", 378.9272, 0.979737), ("reference", 202.0496, 0.935145)):
        hazard = PATH.hazard(rates, half, quarter, integral)
        assert hazard.sum().item() == pytest.approx(total, rel=1e-5)
        assert (-torch.expm1(-hazard)).mean().item() == pytest.approx(jump, rel=1e-5)
    one, rest = torch.ones(48), torch.full((48,), 0.75)
    rates = PATH.log_rates(x_t.flatten(), x0, one)
    assert PATH.hazard(rates, one, rest).sum().item() == pytest.approx(24.37123, rel=1e-5)
    assert (-torch.expm1(-PATH.hazard(rates, one, rest))).mean().item() == pytest.approx(0.344039, rel=1e-5)
    assert PATH.hazard(rates, one, rest, "reference").sum() == 0


@pytest.mark.parametrize("integral", ["exact", "reference"])
def test_a_step_draws_from_the_rates(integral):
    x_t, z, draws = codes(), plain(keys(5, "z").normal(3, 4, 4, 64)), keys(5)
    x0 = tokens_of(z, draws.fold("x0").uniform(3, 4, 4)).tokens.flatten()
    jump, to = (draws.fold(name).uniform(3, 4, 4).flatten() for name in ("jump", "to"))
    for time in (0.9, 0.5, 0.02):
        t = torch.full((5, 1), time)
        each = torch.full((240,), time)
        rates = PATH.log_rates(x_t.flatten(), x0, each)
        jumps = jump < -torch.expm1(-PATH.hazard(rates, each, each * 0.8, integral))
        moved = torch.where(jumps, categorical(rates, to), x_t.flatten())
        assert torch.equal(PATH.step(x_t, t, t * 0.8, z, draws, integral).flatten(), moved) and jumps.any()


def test_exact_and_reference_integrals_agree_in_small_steps():
    x_t, x0, t = codes().flatten(), codes(name="other").flatten(), torch.full((240,), 0.6, dtype=torch.float64)
    rates = PATH.log_rates(x_t, x0, t)
    near = [PATH.hazard(rates, t, t - h, i).sum() for h in (1e-2, 1e-4) for i in ("exact", "reference")]
    assert near[0] / near[1] == pytest.approx(1, rel=5e-2) and near[2] / near[3] == pytest.approx(1, rel=5e-4)


def test_a_codebook_as_wide_as_long_is_no_special_case():
    """A routine that told its meaning from shapes would be wrong here."""
    book = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = MetricPath(book, 1.0, 1.0)
    unit = book / book.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(path.distances(torch.arange(8)), torch.cdist(unit, unit).square(), atol=1e-12, rtol=0)


def test_distances_are_squared_and_never_negative_even_from_half_precision_books():
    book = codebook((8, 8, 8, 5, 5, 5)).half()
    path = MetricPath(book, 0.9, 3.0)
    some = torch.arange(0, 64_000, 251)
    d = path.distances(some)
    assert d.dtype == torch.float32 and d.min() >= 0 and d.max() <= 4 + 1e-5
    own = d.argmin(-1) == some
    exact = MetricPath(book.double(), 0.9, 3.0).distances(some).argmin(-1) == some
    assert own.float().mean() == pytest.approx(exact.float().mean().item(), abs=0.02)


def test_lifted_codes_all_differ():
    levels = (4, 3, 5)
    d = MetricPath(lifted(codebook(levels)), 1, 1).distances(torch.arange(60))
    assert (d + torch.eye(60) > 1e-3).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_both_ends_of_a_path(path):
    x0 = codes()
    clean, noise = torch.zeros(5, 1), torch.ones(5, 1)
    assert torch.equal(path.corrupt(x0, clean, keys(5)), x0)
    near = path.corrupt(x0, torch.full((5, 1), 1e-3), keys(5))
    assert (near == x0).float().mean() > 0.98
    if path is MASKED:
        assert (path.corrupt(x0, noise, keys(5)) == 64).all()
    else:
        far = path.corrupt(x0.new_zeros(2000, 1, 4, 4), torch.ones(2000, 1), keys(2000))
        counts = torch.bincount(far.flatten(), minlength=64).float() / far.numel()
        assert (counts - 1 / 64).abs().max() < 4 * math.sqrt(1 / 64 / far.numel())


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_corruption_is_as_likely_as_the_path_says(path):
    x0, t = torch.full((4000, 1, 2, 2), 5), torch.full((4000, 1), 0.4)
    x_t = path.corrupt(x0, t, keys(4000))
    vocabulary = 64 + (path is MASKED)
    every = torch.arange(vocabulary)[:, None, None, None]
    p = path.likelihood(every, torch.full_like(every, 5), torch.full((vocabulary, 1), 0.4)).flatten()
    counts = torch.bincount(x_t.flatten(), minlength=vocabulary) / x_t.numel()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert (counts - p).abs().max() < 5 * math.sqrt(0.25 / x_t.numel())


def test_exact_count_masks_exactly_so_many():
    x0 = codes()
    path = MixturePath(64, "mask", exact_count=True)
    t = torch.tensor([[0.0], [0.001], [0.3], [0.5], [1.0]])
    assert (path.corrupt(x0, t, keys(5)) == 64).flatten(1).sum(1).tolist() == [0, 1, 14, 24, 48]
    frames = torch.tensor([[0.25, 0.5, 1.0]]).expand(5, -1)
    assert (path.corrupt(x0, frames, keys(5)) == 64).flatten(2).sum(2).tolist() == [[4, 8, 16]] * 5


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("integral", ["exact", "reference"])
def test_a_step_to_the_same_time_moves_nothing_and_one_to_zero_is_a_draw(path, integral):
    z = keys(5, "z").normal(3, 4, 4, 64)
    t = torch.full((5, 1), 0.5)
    x_t = path.corrupt(codes(), t, keys(5, "noise"))
    assert torch.equal(path.step(x_t, t, t, plain(z), keys(5), integral=integral), x_t)
    made = path.step(x_t, t, torch.zeros_like(t), plain(z), keys(5), integral=integral)
    drawn = tokens_of(plain(z), keys(5).fold("x0").uniform(3, 4, 4)).tokens
    assert torch.equal(made, drawn if path is not MASKED else torch.where(x_t == 64, drawn, x_t))


@pytest.mark.parametrize("path", [MIXTURE, MASKED], ids=["uniform", "mask"])
def test_mixture_steps_keep_the_share_of_noise(path):
    """Stepping with a sure estimate from t to s leaves x_s as if corrupted to s."""
    x0 = torch.full((4000, 1, 2, 2), 5)
    t, s = torch.full((4000, 1), 0.8), torch.full((4000, 1), 0.3)
    x_s = path.step(path.corrupt(x0, t, keys(4000, "a")), t, s, sharp(x0), keys(4000, "b"))
    share = (x_s != 5).float().mean().item()
    assert share == pytest.approx(0.3 * (63 / 64 if path is MIXTURE else 1), abs=5 * math.sqrt(0.21 / x_s.numel()))


def test_jumps_only_lead_nearer():
    x_t, x0 = codes(), codes(name="x0")
    t = torch.full((5, 1), 0.7)
    moved = PATH.step(x_t, t, t - 0.3, sharp(x0), keys(5))
    before, after = (PATH.distances(x0.flatten()).gather(1, x.flatten()[:, None])[:, 0] for x in (x_t, moved))
    assert ((after < before) | (moved == x_t).flatten()).all() and (moved != x_t).any()


def test_the_first_step_moves_only_with_the_exact_integral():
    x_t, t = codes(), torch.ones(5, 1)
    z = plain(keys(5, "z").normal(3, 4, 4, 64))
    assert torch.equal(PATH.step(x_t, t, t - 0.25, z, keys(5), integral="reference"), x_t)
    x0 = tokens_of(z, keys(5).fold("x0").uniform(3, 4, 4)).tokens.flatten()
    each = torch.ones(240)
    chance = -torch.expm1(-PATH.hazard(PATH.log_rates(x_t.flatten(), x0, each), each, each - 0.25)).mean()
    share = (PATH.step(x_t, t, t - 0.25, z, keys(5)) != x_t).float().mean()
    assert share.item() == pytest.approx(chance.item(), abs=0.1) and chance > 0.1


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_frames_step_by_their_own_times(path):
    t, s = torch.tensor([[0.9, 0.5, 0.0]]).expand(5, -1), torch.tensor([[0.6, 0.5, 0.0]]).expand(5, -1)
    x_t, z = path.prior(SHAPE, keys(5, "x")), plain(keys(5, "z").normal(3, 4, 4, 64))
    made = path.step(x_t, t, s, z, keys(5))
    assert torch.equal(made[:, 1:], x_t[:, 1:]) and not torch.equal(made[:, 0], x_t[:, 0])


def test_codes_at_one_place_and_times_near_zero_stay_finite():
    path = MetricPath(BOOK[:2].repeat_interleave(3, 0), 0.9, 3.0)
    x_t, z = codes(6), plain(keys(5, "z").normal(3, 4, 4, 6))
    for time in (1.0, 1e-3):
        t = torch.full((5, 1), time)
        made = path.step(x_t, t, t / 2, z, keys(5))
        assert made.min() >= 0 and made.max() < 6
        assert not path.log_prob(x_t.flatten(), t.expand(5, 48).flatten()).isnan().any()


def test_an_estimate_is_not_used_up():
    z = keys(5, "z").normal(3, 4, 4, 64)
    kept = z.clone()
    PATH.step(codes(), torch.full((5, 1), 0.7), torch.full((5, 1), 0.3), plain(z), keys(5))
    assert torch.equal(z, kept)


def test_a_row_is_the_same_alone_and_in_a_batch_and_for_any_chunk():
    x_t, z, t = codes(), keys(5, "z").normal(3, 4, 4, 64), torch.full((5, 1), 0.7)
    whole = PATH.step(x_t, t, t / 2, plain(z), keys(5))
    small = MetricPath(BOOK, 0.9, 3.0, rows=7)
    assert torch.equal(small.step(x_t, t, t / 2, plain(z), keys(5)), whole)
    alone = PATH.step(x_t[3:4], t[3:4], t[3:4] / 2, plain(z[3:4]), keys(5)[3:4])
    assert torch.equal(alone, whole[3:4])


def test_no_tensor_has_a_row_of_all_codes_for_every_token():
    book = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    path = MetricPath(book, 0.9, 3.0, rows=16)
    x0, t = keys(4).integers(300, 4, 8, 8), torch.full((4, 1), 0.5)
    with Largest() as watch:
        path.corrupt(x0, t, keys(4))
        path.likelihood(x0, x0, t)
        path.step(x0, t, t / 2, plain(keys(4, "z").normal(4, 8, 8, 1)), keys(4))
    assert watch.elements < 20 * 300, watch.by


def test_fitted_paths_make_noise_grow_evenly():
    alpha, c, curve = fit_path(codebook((8, 8, 8, 5, 5, 5))[::64], tokens=64)
    assert (curve[:, 1] - curve[:, 0]).square().mean().sqrt() < 0.02
    assert 0.6 <= alpha <= 1.0 and 1 <= c <= 3


def test_times_are_warps_of_one_law():
    assert shifted(4, 1.0) == (1, 0.75, 0.5, 0.25)
    assert shifted(4, 3.0) == pytest.approx((1, 0.9, 0.75, 0.5))
    u = keys(1000).uniform(1)
    t = Shifted(3.0).quantile(PATH, u)
    assert t.min() > 1e-3 and t.max() <= 1 and t.mean() > 0.6
    near = NearData().quantile(PATH, u)
    assert near.mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_some_samples_share_their_time():
    t = SomeShared(Shifted(1.0), 0.3).sample(PATH, 4, keys(4000))
    same = (t == t[:, :1]).all(1)
    assert same.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert len(t[~same].flatten().unique()) > 8000


def test_a_start_masks_exactly_so_many_and_else_is_the_prior():
    path, shape = MASKED, (6, 2, 5, 5)
    made = Start(mask=0.6).tokens(path, shape, keys(6))
    assert ((made == 64).flatten(1).sum(1) == 30).all() and made.max() == 64
    spread = (Start(mask=(0.2, 0.8)).tokens(path, shape, keys(6)) == 64).flatten(1).sum(1)
    assert len(spread.unique()) > 1 and spread.min() >= 10 and spread.max() <= 40
    assert torch.equal(Start().tokens(PATH, shape, keys(6)), PATH.prior(shape, keys(6).fold("prior")))


@pytest.mark.parametrize("path", PATHS, ids=["metric", "mixture", "masked"])
def test_the_end_is_the_step_to_clean_data(path):
    """Also where a frame is held at its time, and without asking the metric path for a distance."""
    x0 = codes()
    estimate = plain(torch.randn(*SHAPE, 64, generator=torch.Generator().manual_seed(0)))
    t = torch.tensor([0.7, 0.2, 0.1]).expand(SHAPE[0], -1)
    s = torch.tensor([0.0, 0.2, 0.0]).expand(SHAPE[0], -1)
    x_t, draw = path.corrupt(x0, t, keys(SHAPE[0], "noise")), keys(SHAPE[0], "step")
    made = path.end(x_t, t, s, estimate, draw, temperature=0.8, top_p=0.9)
    assert torch.equal(made, path.step(x_t, t, s, estimate, draw, temperature=0.8, top_p=0.9))
    assert torch.equal(made[:, 1], x_t[:, 1]) and not torch.equal(made[:, 0], x_t[:, 0])
