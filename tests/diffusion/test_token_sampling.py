"""Samplers of tokens: how many passes they cost, which frames they leave alone, and that rows and runs keep apart."""

import itertools

import pytest
import torch
from heads import PLAIN
from known import draw as keys

from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import Above, guided
from kinema.diffusion.times import shifted
from kinema.diffusion.token_path import MetricPath, MixturePath
from kinema.diffusion.token_sampling import Jumps, Known, Redraws
from kinema.errors import UsageError

BOOK = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
PATH = MetricPath(BOOK, 0.9, 3.0)
SHAPE = (3, 4, 2, 2)
COND, UNCOND = ({"text": keys(3, name).normal(1)} for name in ("cond", "uncond"))
SAMPLERS = [Jumps(), Redraws()]


@pytest.fixture
def calls() -> list[int]:
    """The batch size of every pass."""
    return []


@pytest.fixture
def denoiser(calls):
    """Sees neighbours, text and nothing of the time."""

    def backbone(x, timestep, *, text):
        calls.append(len(x))
        turned = torch.nn.functional.one_hot(x.roll(1, dims=1), 13).float()[..., :12]
        return 3 * turned.roll(2, dims=-1) + text[:, :, None, None, None] * turned.roll(5, dims=-1)

    return TokenDenoiser(backbone, PLAIN, PATH)


def run(sampler, denoiser, times, scale=3.0, rows=slice(None), name="run", **known):
    cond, uncond = ({"text": c["text"][rows]} for c in (COND, UNCOND))
    draw = keys(3, name)[rows]
    x = denoiser.path.prior((len(draw), *SHAPE[1:]), draw.fold("x"))
    return sampler(guided(denoiser, cond, uncond, scale), denoiser.path, x, times, draw, **known)


@pytest.mark.parametrize(("steps", "scale", "passes"), [(25, 3.0, 48), (25, 1.0, 25), (1, 1.0, 1), (1, 3.0, 2)])
def test_guidance_costs_a_pass_only_where_it_is_used(denoiser, calls, steps, scale, passes):
    run(Jumps(), denoiser, shifted(steps, 1.0), scale)
    assert len(calls) == passes


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_one_step_is_one_draw(denoiser, sampler):
    from kinema.diffusion.logits import draw

    made = run(sampler, denoiser, (1.0,), 1.0)
    x = PATH.prior(SHAPE, keys(3, "run").fold("x"))
    logits = denoiser(x, torch.ones(3, 1), COND)
    assert torch.equal(made, draw(logits, keys(3, "run").fold(0).fold("x0").uniform(*SHAPE[1:])).tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("at", [(0,), (0, 1), (1, 3)])
def test_known_frames_come_out_as_they_were_given(denoiser, sampler, noise, at):
    codes = keys(3, "known").integers(12, len(at), 2, 2)
    made = run(sampler, denoiser, shifted(6, 1.0), known=Known(codes, at, noise))
    assert torch.equal(made[:, list(at)], codes)


def test_known_frames_are_shown_as_noisy_as_asked(denoiser):
    seen = []

    def backbone(x, timestep, *, text):
        seen.append(x[:, 0])
        return denoiser.backbone(x, timestep, text=text)

    codes = keys(3, "known").integers(12, 1, 2, 2)
    run(Jumps(), TokenDenoiser(backbone, PLAIN, PATH), shifted(4, 1.0), 1.0, known=Known(codes, (0,), 0.5))
    assert all(torch.equal(x, seen[0]) for x in seen) and not torch.equal(seen[0], codes[:, 0])


def test_known_frames_without_clamping_are_resampled_like_all_others(denoiser):
    codes = keys(3, "known").integers(12, 1, 2, 2)
    made = run(Jumps(), denoiser, shifted(6, 1.0), known=Known(codes, (0,), 0.1, clamp=False))
    assert not torch.equal(made[:, :1], codes)


def test_frames_may_have_times_of_their_own(denoiser, calls):
    together = [[t] * 4 for t in shifted(5, 1.0)]
    assert torch.equal(run(Jumps(), denoiser, together), run(Jumps(), denoiser, shifted(5, 1.0)))
    calls.clear()
    staggered = [[1.0, 1.0, 1.0, 1.0], [0.05, 0.5, 1.0, 1.0], [0.0, 0.05, 0.05, 0.05]]
    made = run(Jumps(), denoiser, staggered)
    assert len(calls) == 2 + 2 + 1 and made.shape == SHAPE


def test_guidance_for_some_frames_only_is_that_of_a_scale_of_time(denoiser):
    t = torch.tensor([[0.05, 0.5, 0.05, 0.9]]).expand(3, -1)
    x = PATH.prior(SHAPE, keys(3))
    by_mask = guided(denoiser, COND, UNCOND, 3.0)(x, t, where=t > 0.1).whole()
    by_scale = guided(denoiser, COND, UNCOND, Above(3.0, 0.1))(x, t).whole()
    assert torch.equal(by_mask, by_scale)
    batched = guided(denoiser, COND, UNCOND, Above(3.0, 0.1), batched=True)(x, t).whole()
    torch.testing.assert_close(batched, by_scale)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_row_is_the_same_alone_and_in_a_batch(denoiser, sampler):
    whole = run(sampler, denoiser, shifted(5, 1.0))
    assert torch.equal(run(sampler, denoiser, shifted(5, 1.0), rows=slice(1, 2)), whole[1:2])


def test_two_samplings_in_turn_are_two_samplings(denoiser):
    alone = [run(Jumps(), denoiser, shifted(4, 1.0), name=name) for name in "ab"]
    mixed: dict[str, torch.Tensor] = {}

    class Interrupted(Exception):
        pass

    def within(done: int) -> None:
        if done == 2:
            mixed["b"] = run(Jumps(), denoiser, shifted(4, 1.0), name="b")

    mixed["a"] = run(Jumps(), denoiser, shifted(4, 1.0), name="a", each=within)
    assert torch.equal(mixed["a"], alone[0]) and torch.equal(mixed["b"], alone[1])


@pytest.mark.parametrize("times", [(), (0.5, 0.5, 0.6), (1.2,), ([1.0, 0.5],), (1.0, 0.0)])
def test_times_that_do_not_fall_are_refused(denoiser, times):
    with pytest.raises(ValueError, match="times"):
        run(Jumps(), denoiser, times)


def test_masked_sampling_unmasks_everything_and_keeps_what_it_unmasked(calls):
    path, seen = MixturePath(12, "mask"), []

    def backbone(x, timestep, *, text):
        seen.append((x, timestep))
        return keys(3, "z").normal(*SHAPE[1:], 12)

    run(Jumps(), TokenDenoiser(backbone, PLAIN, path), shifted(4, 1.0), 1.0)
    for (before, _), (after, _) in itertools.pairwise(seen):
        assert torch.equal(after[before != 12], before[before != 12])
    assert [t[0, 0].item() for _, t in seen] == [1000, 750, 500, 250]
    assert (run(Jumps(), TokenDenoiser(backbone, PLAIN, path), shifted(4, 1.0), 1.0) < 12).all()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_draws_without_a_limit_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Jumps(**wrong)


@pytest.mark.parametrize("path", [PATH, MixturePath(12), MixturePath(12, "mask")], ids=["metric", "mixture", "masked"])
@pytest.mark.parametrize("t", [0.0, 1e-30, 1e-3, 1 - 1e-7, 1.0])
def test_losses_at_the_ends_of_time_are_finite(path, t):
    """Also the gradient, and the chance of a token that the path cannot make there."""
    hidden = torch.randn(2, 3, 2, 2, 12, requires_grad=True)
    denoiser = TokenDenoiser(lambda x, timestep: hidden, PLAIN, path)
    codes, at = keys(2, "codes").integers(12, 3, 2, 2), torch.full((2, 1), t)
    loss = denoiser.loss(codes, at, {}, keys(2, "noise"))
    loss.sum().backward()
    assert loss.isfinite().all() and hidden.grad.isfinite().all()
    for x_t in (codes, (codes + 1) % 12, path.prior(tuple(codes.shape), keys(2, "prior"))):
        assert path.likelihood(x_t, codes, at).isfinite().all()
        assert path.step(x_t, at, at / 2, denoiser(x_t, at, {}), keys(2, "step")).lt(13).all()
