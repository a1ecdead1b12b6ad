"""Guidance: w = 1 is none, both conditions at once or in turn are equal, and a scale may be a function of time."""

import pytest
import torch
from known import PREDICTIONS, draw, name_of

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import Cosine, DynamicSAT, guided
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.schedule import ZeroSNR
from kinema.diffusion.times import trailing

X, T = draw(2).normal(3, 4, 2, 2), torch.tensor([[0.6], [0.3]])
COND, UNCOND = ({"text": draw(2, name).normal(4)} for name in ("cond", "uncond"))


@pytest.fixture
def batches() -> list[int]:
    """The batch size of every call of the network."""
    return []


@pytest.fixture
def denoiser(batches):
    def backbone(x, timestep, *, text):
        batches.append(len(x))
        return torch.tanh(x * text[:, None, :, None, None]) + timestep[..., None, None, None] / 1000

    return LatentDenoiser(backbone, GaussianPath(), Flow())


@pytest.mark.parametrize("batched", [False, True])
def test_guidance_of_one_is_the_denoiser_and_costs_one_call(denoiser, batches, batched):
    made = guided(denoiser, COND, UNCOND, 1.0, batched)(X, T)
    assert batches == [2] and torch.equal(made, denoiser(X, T, COND))


def test_guidance_of_zero_is_unconditional(denoiser):
    assert torch.equal(guided(denoiser, COND, UNCOND, 0.0)(X, T), denoiser(X, T, UNCOND))


@pytest.mark.parametrize("scale", [6.0, Cosine()], ids=repr)
@pytest.mark.parametrize("t", [T, draw(2, "t").uniform(3)], ids=["video", "frames"])
def test_both_conditions_at_once_and_in_turn_are_equal(denoiser, batches, scale, t):
    at_once = guided(denoiser, COND, UNCOND, scale, batched=True)(X, t)
    assert batches == [4]
    in_turn = guided(denoiser, COND, UNCOND, scale)(X, t)
    assert batches == [4, 2, 2]
    torch.testing.assert_close(at_once, in_turn)


def test_guidance_is_the_unconditional_plus_w_times_the_difference(denoiser):
    cond, uncond = denoiser(X, T, COND), denoiser(X, T, UNCOND)
    made = guided(denoiser, COND, UNCOND, 6.0)(X, T)
    torch.testing.assert_close(made, uncond + 6 * (cond - uncond))


@pytest.mark.parametrize("predicts", PREDICTIONS, ids=name_of)
def test_guidance_is_the_same_in_every_space(predicts):
    path = GaussianPath(ZeroSNR())
    denoiser = LatentDenoiser(lambda x, told, *, text: torch.tanh(x * text[:, None, :, None, None]), path, predicts)
    out = [denoiser.backbone(X, None, **given) for given in (UNCOND, COND)]
    there = predicts.to_clean(out[0] + 6 * (out[1] - out[0]), X, *path.at(T, X))
    torch.testing.assert_close(guided(denoiser, COND, UNCOND, 6.0)(X, T), there, rtol=1e-4, atol=1e-5)


def test_scale_is_a_function_of_each_rows_time(denoiser):
    made = guided(denoiser, COND, UNCOND, lambda t: 1 + 10 * t)(X, T)
    for row, w in enumerate((7.0, 4.0)):
        torch.testing.assert_close(made[row], guided(denoiser, COND, UNCOND, w)(X, T)[row])
    frames = torch.tensor([[0.6, 0.0, 0.3]]).expand(2, 3)
    made = guided(denoiser, COND, UNCOND, lambda t: 1 + 10 * t)(X, frames)
    for frame, w in enumerate((7.0, 1.0, 4.0)):
        torch.testing.assert_close(made[:, frame], guided(denoiser, COND, UNCOND, w)(X, frames)[:, frame])


def test_guidance_does_not_change_its_conditions(denoiser):
    cond, uncond = dict(COND), dict(UNCOND)
    guided(denoiser, cond, uncond, 6.0, batched=True)(X, T)
    assert cond == COND and uncond == UNCOND


def test_cosine_guidance_is_monotone():
    w = Cosine(6.0)(torch.tensor(trailing(50)))
    assert w[:5].tolist() == pytest.approx([7.0, 6.864, 6.509, 6.011, 5.438], abs=6e-4)
    assert (w.diff() <= 0).all() and w[-1].item() == pytest.approx(1, abs=1e-6)
    assert w.mean().item() == pytest.approx(1.94, abs=0.006)
    rising = Cosine(6.0, falling=False)(torch.tensor(trailing(50)))
    assert (rising.diff() >= 0).all() and rising[0] == 1
    assert Cosine(6.0, falling=False)(torch.zeros(1)) == 7


def test_dynamic_guidance_has_the_published_values():
    w = DynamicSAT(6.0)(torch.tensor(trailing(50)))
    assert w[:7].tolist() == pytest.approx([2.291, 2.544, 6.974, 6.420, 2.788, 4.272, 1.038], abs=6e-4)
    assert w[-3:].tolist() == pytest.approx([1.0, 1.0, 1.123], abs=6e-4)
    assert w.mean().item() == pytest.approx(3.815, abs=6e-4)
