"""Rollouts of a tiny causal Wan: what they call, what has gradients, and the ways that must make the same video."""

import gc
from functools import partial
from itertools import count

import pytest
import torch
from tiny_causal import network, noise
from torch.utils.checkpoint import checkpoint

from kinema import seeds
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import Branches, guided
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.rollout import Recompute, exit_steps, regraded, rollout
from kinema.diffusion.samplers import DDIM, UniPC
from kinema.diffusion.times import shifted, warped

TIMES = warped((1, 0.75, 0.5, 0.25), 5)
TEXT = noise("text", 2, 9, 20)
DRAW = seeds.keys(0, "rollout", [0, 1])


class Recorder:
    """A denoiser that says what it was asked; its estimate is a constant, so that its chunks can be told apart."""

    def __init__(self):
        self.calls = []
        self.seen = []

    def __call__(self, x, t, *, cache, write=False, first_position=0, lengths=None):
        self.calls.append((x.shape[1], round(float(t[0, 0]), 4), write, torch.is_grad_enabled()))
        self.seen.append((x, lengths))
        return torch.full_like(x, len(self.calls))


class Nothing:
    """A memory of nothing that counts how often it was asked to forget."""

    resets = rewinds = 0

    def reset(self):
        self.resets += 1

    def rewind(self):
        self.rewinds += 1

    def forget_text(self):
        pass


def reading(module, text=TEXT):
    denoiser = LatentDenoiser(module, GaussianPath(), Flow())
    return partial(denoiser, cond={"text": text})


def roll(module, frames, exit_step=None, cache=None, text=TEXT, chunks=None, times=TIMES, x=None, **options):
    """The whole video of a tiny causal network."""
    x = noise("x", 2, frames, 4, 4, 4) if x is None else x
    given = options["prefix"].shape[1] if "prefix" in options else 0
    cache = cache or module.new_cache(frames + given, graded=frames)
    made = rollout(
        reading(module, text), GaussianPath(), x, times, cache, chunks or module.chunks, DRAW, exit_step, **options
    )
    return torch.cat([*made], dim=1)


def recorded(frames, exit_step=None, chunks=Chunks(), noise_=None, **options):
    recorder, memory = Recorder(), Nothing()
    x = noise("x", 1, frames, 4, 2, 2) if noise_ is None else noise_
    made = [*rollout(recorder, GaussianPath(), x, TIMES, memory, chunks, DRAW[:1], exit_step, **options)]
    return recorder, made, memory


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_each_chunk_takes_its_steps_and_all_but_the_last_are_written_clean(exit_step):
    recorder, made, memory = recorded(9, exit_step)
    steps = [(3, round(t, 4), False) for t in TIMES[: exit_step + 1]]
    assert [call[:3] for call in recorder.calls] == [*steps, (3, 0, True), *steps, (3, 0, True), *steps]
    assert len(recorder.calls) == 3 * (exit_step + 1) + 2 and memory.resets == 1
    graded = [call for call in recorder.calls if call[3]]
    assert [call[1] for call in graded] == [round(TIMES[exit_step], 4)] * 3
    first_write = recorder.seen[exit_step + 1][0]
    assert torch.equal(first_write, made[0])  # bit for bit: nothing is mixed in at noise level 0


def test_each_chunk_may_have_an_exit_step_of_its_own():
    recorder, _, _ = recorded(9, (2, 0, 3))
    times = [call[1] for call in recorder.calls]
    at = [round(t, 4) for t in TIMES]
    assert times == [*at[:3], 0, at[0], 0, *at]
    with pytest.raises(ValueError, match="2 exit steps were given for 3 chunks"):
        recorded(9, (2, 0))
    with pytest.raises(ValueError, match="not among the 4 steps"):
        recorded(9, 4)


def test_exit_steps_are_shared_and_pure():
    draws = [exit_steps("shared", 4, 7, step) for step in range(200)]
    assert set(draws) == {0, 1, 2, 3} and draws == [exit_steps("shared", 4, 7, step) for step in range(200)]
    assert min(draws.count(k) for k in range(4)) > 25
    each = exit_steps("per_chunk", 4, 7, 3)
    assert len(each) == 7 and len(set(each)) > 1
    assert exit_steps("last", 4, 7, 3) == 3


def test_only_the_last_frames_are_graded():
    recorder, _, _ = recorded(12, 0, graded_frames=6)
    assert [call[3] for call in recorder.calls if not call[2]] == [False, False, True, True]
    module = network()
    x = noise("x", 2, 12, 4, 4, 4).requires_grad_()
    (slope,) = torch.autograd.grad(roll(module, 12, 0, x=x, graded_frames=6).sum(), x)
    assert not slope[:, :6].any() and slope[:, 6:].flatten(2).any(2).all()


@pytest.mark.parametrize("exit_step", [0, 2])
def test_no_gradient_crosses_chunks(exit_step):
    """A public implementation leaks 4 to 6 % of it through its cache."""
    module = network()
    x = noise("x", 2, 9, 4, 4, 4).requires_grad_()
    made = roll(module, 9, exit_step, x=x)
    for k in range(3):
        (slope,) = torch.autograd.grad(made[:, 3 * k : 3 * k + 3].sum(), x, retain_graph=True, allow_unused=True)
        if exit_step:
            assert slope is None or not slope.any()
        else:
            assert slope.flatten(2).any(2).tolist() == [[j // 3 == k for j in range(9)]] * 2


@pytest.mark.parametrize("exit_step", [1, (2, 0, 1, 1)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 6, "sink": 1}, {"first_frame_alone": True}])
@pytest.mark.parametrize("recomputed", [False, True])
def test_last_steps_graded_at_once_equal_those_graded_one_by_one(options, given, exit_step, recomputed):
    module, alone = network(torch.float64, **options), "first_frame_alone" in options
    held = (1 if alone else 3) if given else 0
    prefix = {"prefix": noise("prefix", 2, held, 4, 4, 4)} if given else {}
    frames = 10 if alone and not given else 12  # four chunks
    if recomputed:
        for block in module.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def slopes(video):
        (video * noise("weight", *video.shape)).sum().backward()
        found = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        return [video.detach(), *found]

    plain = slopes(roll(module, frames, exit_step, **prefix, graded_frames=6)[:, -6:])
    ends, cache = [], module.new_cache(frames + held, graded=6)
    with torch.no_grad():
        roll(module, frames, exit_step, cache, **prefix, ends=ends)
    assert [end.frame for end in ends][-2:] == [held + frames - 6, held + frames - 3]
    for a, b in zip(slopes(regraded(reading(module), ends[-2:], cache)), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_training_to_the_last_step_equals_streaming():
    module = network(window=6, sink=1)
    trained = roll(module, 15)
    chunks = iter(noise("x", 2, 15, 4, 4, 4).split(3, dim=1))
    with torch.no_grad():
        stream = rollout(reading(module), GaussianPath(), chunks, TIMES, module.new_cache(), module.chunks, DRAW)
        torch.testing.assert_close(torch.cat([*stream], dim=1), trained.detach(), atol=1e-5, rtol=1e-5)


def test_a_larger_cache_makes_no_difference():
    module = network(window=6, sink=1)
    with torch.no_grad():
        small, large = (roll(module, 15, 1, module.new_cache(15, graded)) for graded in (0, 15))
    torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-5)


def test_a_stream_has_no_end_and_no_gradients():
    module = network(window=6)
    endless = (noise(f"x{i}", 2, 3, 4, 4, 4) for i in count())
    stream = rollout(reading(module), GaussianPath(), endless, TIMES[:1], module.new_cache(), module.chunks, DRAW)
    with torch.no_grad():
        assert all(next(stream).isfinite().all() for _ in range(20))
    stream = rollout(reading(module), GaussianPath(), endless, TIMES, module.new_cache(), module.chunks, DRAW)
    with pytest.raises(ValueError, match="no_grad"):
        next(stream)


@pytest.mark.parametrize("window", [None, 9])
def test_sixty_frames_go_as_three_do(window):
    with torch.no_grad():
        assert roll(network(window=window), 60, 0).shape[1] == 60


def test_context_noise_is_mixed_in_and_told():
    recorder, made, _ = recorded(6, 0, context_noise=0.2)
    assert recorder.calls[1] == (3, 0.2, True, False)
    written = recorder.seen[1][0]
    fresh = DRAW[:1].fold(0).fold("context").normal(*made[0].shape[1:])
    torch.testing.assert_close(written, 0.8 * made[0] + 0.2 * fresh)


def test_fresh_noise_is_different_for_each_chunk_step_and_sample_and_never_differs_again():
    video = roll(network(), 6, 1)
    assert torch.equal(video, roll(network(), 6, 1))
    noises = [DRAW.fold(k).fold(i).normal(4) for k in range(2) for i in range(3)]
    assert len({tuple(row) for noise_ in noises for row in noise_.tolist()}) == 12


def test_a_lone_chunk_without_fresh_noise_is_the_sampler_ddim():
    module = network(chunk=6)
    with torch.no_grad():
        walked = roll(module, 6, renoise="ode")
        sampled = DDIM()(reading(module), GaussianPath(), noise("x", 2, 6, 4, 4, 4), TIMES)
        torch.testing.assert_close(walked, sampled, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(walked, roll(module, 6), atol=1e-2)


def test_many_steps_of_a_sampler_for_each_chunk():
    """The first chunk is the sampler's own video; the second is the sampler's with the first one clean beside it."""
    module, times = network(), shifted(6, 5)
    x = noise("x", 2, 6, 4, 4, 4)
    with torch.no_grad():
        made = roll(module, 6, times=times, sampler=UniPC())
        first = UniPC()(reading(module), GaussianPath(), x[:, :3], times)

        def beside(x_t, t):
            t = torch.cat([torch.zeros(2, 3), t.expand(2, 3)], dim=1)
            return reading(module)(torch.cat([first, x_t], dim=1), t)[:, 3:]

        second = UniPC()(beside, GaussianPath(), x[:, 3:], times)
    torch.testing.assert_close(made, torch.cat([first, second], dim=1), atol=1e-4, rtol=1e-4)


def test_guidance_has_a_cache_for_each_branch():
    module, other = network(window=6, sink=1), noise("other", 2, 5, 20)
    denoiser = LatentDenoiser(module, GaussianPath(), Flow())
    cond, uncond, x = {"text": TEXT}, {"text": torch.nn.functional.pad(other, (0, 0, 0, 4))}, noise("x", 2, 9, 4, 4, 4)
    with torch.no_grad():
        videos = []
        for batched in (False, True):
            cache = module.new_cache(9) if batched else Branches(module.new_cache(9), module.new_cache(9))
            denoise = guided(denoiser, cond, uncond, 3.0, batched)
            videos.append(torch.cat([*rollout(denoise, GaussianPath(), x, TIMES, cache, module.chunks, DRAW)], dim=1))
        torch.testing.assert_close(*videos, atol=1e-4, rtol=1e-4)
        plain = guided(denoiser, cond, uncond, 1.0)
        alone = torch.cat([*rollout(plain, GaussianPath(), x, TIMES, module.new_cache(9), module.chunks, DRAW)], dim=1)
        torch.testing.assert_close(alone, roll(module, 9), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("given", [0, 1, 4])
def test_a_video_may_begin_with_given_frames(alone, given):
    """One step from pure noise: then the video's last chunk is a teacher-forcing forward with the same clean frames."""
    module = network(torch.float32, first_frame_alone=alone)
    prefix = {"prefix": noise("prefix", 2, given, 4, 4, 4)} if given else {}
    frames = 7 if alone and not given else 6
    with torch.no_grad():
        made = roll(module, frames, 0, **prefix)
        clean = torch.cat([*prefix.values(), made], dim=1)
        x = torch.cat([*prefix.values(), noise("x", 2, frames, 4, 4, 4)], dim=1)
        lengths = (*module.chunks.prefix(given), *module.chunks.lengths(frames, given))
        denoiser = LatentDenoiser(module, GaussianPath(), Flow())
        forced = denoiser(x, torch.ones(2, 1), {"text": TEXT}, clean=clean, lengths=lengths)
    assert lengths == ((1, 3, 3, 3) if given == 4 else (1, 3, 3) if alone or given else (3, 3))
    torch.testing.assert_close(forced[:, given:], made, atol=1e-4, rtol=1e-4)


def test_frames_that_fill_no_chunks_are_refused():
    with pytest.raises(ValueError, match="5 frames do not fill chunks of 3; use 3 or 6"):
        recorded(5)
    with pytest.raises(ValueError, match="8 frames do not fill chunks of 3 after the first; use 7 or 10"):
        recorded(8, chunks=Chunks(3, first_alone=True))
    with pytest.raises(ValueError, match="5 frames do not fill chunks of 3"):
        recorded(6, prefix=noise("prefix", 1, 5, 4, 2, 2))


def test_the_place_in_time_does_not_matter():
    module = network(torch.float32, window=6, sink=1)
    with torch.no_grad():
        torch.testing.assert_close(roll(module, 9, 1, first_position=5000), roll(module, 9, 1), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("prefix", [{}, {"prefix": noise("prefix", 2, 1, 4, 4, 4)}])
def test_context_made_anew_from_everything_equals_what_was_kept(prefix):
    module = network()
    with torch.no_grad():
        again = roll(module, 12, 1, context=Recompute(12), **prefix)
        torch.testing.assert_close(again, roll(module, 12, 1, **prefix), atol=1e-4, rtol=1e-4)


def test_context_made_anew_is_the_latest_latents_at_positions_from_zero():
    recorder, made, memory = recorded(15, 0, context=Recompute(6), context_noise=0.25)
    contexts = [(x.shape[1], lengths) for x, lengths in recorder.seen if lengths]
    assert contexts == [(3, (3,)), (6, (3, 3)), (6, (3, 3)), (6, (3, 3))] and memory.rewinds == 4
    assert {call[1] for call in recorder.calls if call[2]} == {0.25}
    last = recorder.seen[-2][0]
    fresh = DRAW[:1].fold(4).fold("context").normal(6, 4, 2, 2)
    torch.testing.assert_close(last, 0.75 * torch.cat(made[2:4], dim=1) + 0.25 * fresh)


def test_context_may_keep_the_first_frame_or_begin_with_an_image():
    image = noise("image", 1, 1, 4, 2, 2)
    asked = []

    def image_of(frame):
        asked.append(frame)
        return image

    recorder, made, _ = recorded(12, 0, context=Recompute(6, pin_first=True))
    expected = torch.cat([made[0][:, :1], torch.cat(made[:3], dim=1)[:, -5:]], dim=1)
    assert torch.equal(recorder.seen[-2][0], expected)
    recorder, made, _ = recorded(15, 0, context=Recompute(6, image_first=True), image=image_of)
    expected = torch.cat([image, torch.cat(made[:4], dim=1)[:, -5:]], dim=1)
    assert torch.equal(recorder.seen[-2][0], expected) and asked == [3, 6]
    with pytest.raises(ValueError, match="no multiple of chunk 3; use 3"):
        recorded(6, context=Recompute(4))
    with pytest.raises(ValueError, match="needs `image`"):
        recorded(6, context=Recompute(3, image_first=True))


def test_a_chunk_sees_exactly_the_context_that_is_made_anew():
    module = network(chunk=1)
    seen = []

    def spy(x, t, **more):
        if more.get("write"):
            seen.append(x)
        return reading(module)(x, t, **more)

    with torch.no_grad():
        made = [
            *rollout(
                spy,
                GaussianPath(),
                noise("x", 2, 5, 4, 4, 4),
                TIMES,
                module.new_cache(3),
                module.chunks,
                DRAW,
                context=Recompute(2),
            )
        ]
        fresh = module.new_cache(3)
        reading(module)(torch.cat(made[2:4], dim=1), torch.zeros(2, 1), cache=fresh, write=True, lengths=(1, 1))
        x, draw = noise("x", 2, 5, 4, 4, 4)[:, 4:], DRAW.fold(4)
        for i, time in enumerate(TIMES):
            x0 = reading(module)(x, torch.full((2, 1), time), cache=fresh)
            x = GaussianPath().corrupt(x0, torch.full((2, 1), (*TIMES, 0.0)[i + 1]), draw.fold(i))
    assert torch.equal(seen[-1], torch.cat(made[2:4], dim=1))
    torch.testing.assert_close(x0, made[4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"context": Recompute(6)}])
@pytest.mark.parametrize(("frames", "graded"), [(15, 15), (27, 9)])
@pytest.mark.parametrize("spec", [{}, {"window": 9, "sink": 2}, {"window": 9, "reanchor": False}])
def test_gradients_of_a_rollout_recomputed_equal_plain(options, spec, frames, graded):
    """Also in the smallest ring that keeps what graded chunks saw: 9 + 9 - 3 frames of 27."""
    gradients = []
    for again in (False, True):
        module = network(**spec)
        for block in module.blocks if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        cache = module.new_cache(frames, graded=graded)
        assert cache.capacity == (15 if spec else frames)
        made = roll(module, frames, 1, cache, graded_frames=graded, **options)
        (made * noise("weight", *made.shape)).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_memory_after_a_rollout_does_not_grow_with_their_number():
    module, sizes = network(window=6, sink=1), []
    cache = module.new_cache(9, graded=9)
    for _ in range(5):
        roll(module, 9, 1, cache).square().sum().backward()
        module.zero_grad()
        gc.collect()
        sizes.append(sum(x.untyped_storage().nbytes() for x in gc.get_objects() if isinstance(x, torch.Tensor)))
    assert sizes[1] == sizes[4]


def test_the_text_is_embedded_once_and_for_each_graded_pass():
    module, calls = network(), []
    module.text_embedding.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    roll(module, 9, 1)
    assert calls.count(False) == 1 and calls.count(True) == 3
