"""Streams of a tiny causal Wan: equal to whole videos, constant in memory, open to new prompts, and stoppable."""

import gc
import queue
import threading

import pytest
import torch
from tiny_causal import SIZE, network, noise

from kinema import seeds
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.rollout import Recompute, rollout
from kinema.errors import UsageError
from kinema.models.causality import Window
from kinema.models.wan.spec import WanCausal
from kinema.streaming import Session


class Words:
    """A text encoder that makes of each prompt five rows, which its letters alone decide."""

    unconditional = ""

    def __call__(self, prompts):
        return {"text": torch.stack([noise(f"prompt {prompt}", 5, SIZE.text_dim) for prompt in prompts])}


class Squares:
    """A codec whose pixels are its latents, one frame for the first, four for each further one."""

    stride = (4, 8)

    def encode(self, pixels):
        return torch.nn.functional.pad(pixels, (0, 0, 0, 0, 0, 1))

    def decode_next(self, latents, state=None):
        repeats = torch.tensor([4] * latents.shape[1])
        repeats[0] = 4 if state else 1
        return latents[:, :, :3].repeat_interleave(repeats, dim=1), True

    def decode(self, latents):
        return self.decode_next(latents)[0]


def session(frames=None, prompts=("a",), module=None, seed=0, videos=(0,), **options):
    spec = {
        name: options.pop(name)
        for name in ("chunk", "first_frame_alone", "window", "sink", "steps_at")
        if name in options
    }
    if "view" in options:
        options["window"] = options.pop("view")
    denoiser = LatentDenoiser(module or network(**spec), GaussianPath(), Flow())
    draw = seeds.keys(seed, "sample", list(videos))
    described = WanCausal(size=SIZE, **spec)
    return Session(described, denoiser, Words(), Squares(), list(prompts), draw, (4, 4, 4), frames, **options)


def whole(*args, **options):
    return torch.cat([*session(*args, **options).latents()], dim=1)


def alive():
    """How many tensors there are, and their memory."""
    gc.collect()
    sizes = [x.untyped_storage().nbytes() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return len(sizes), sum(sizes)


def test_a_stream_is_a_rollout_of_its_own_noise():
    module, draw = network(window=6, sink=1), seeds.keys(0, "sample", [0])
    denoiser = LatentDenoiser(module, GaussianPath(), Flow())
    x = torch.cat([draw.fold("noise").fold(k).normal(3, 4, 4, 4) for k in (0, 3, 6)], dim=1)
    cond = Words()(["a"])

    def denoise(x, t, **more):
        return denoiser(x, t, cond, **more)

    with torch.no_grad():
        made = rollout(
            denoise,
            GaussianPath(),
            x,
            WanCausal(size=SIZE).steps_at,
            module.new_cache(9),
            module.chunks,
            draw.fold("steps").fold(0),
        )
        expected = torch.cat([*made], dim=1)
    assert torch.equal(whole(9, window=6, sink=1), expected)


def test_an_endless_stream_begins_as_a_finite_one():
    endless = session(window=6, sink=1).latents()
    first = torch.cat([next(endless) for _ in range(4)], dim=1)
    torch.testing.assert_close(first, whole(12, window=6, sink=1), atol=1e-5, rtol=1e-5)


def test_a_video_does_not_depend_on_its_batch():
    both = whole(6, ("a", "b"), videos=(0, 5))
    torch.testing.assert_close(both[1:], whole(6, ("b",), videos=(5,)), atol=1e-5, rtol=1e-5)


def test_frames_are_the_decoded_latents():
    frames = [*session(9, window=6, sink=1).frames()]
    assert [len(part[0]) for part in frames] == [9, 12, 12]
    assert torch.equal(torch.cat(frames, dim=1), Squares().decode(whole(9, window=6, sink=1)))


def test_a_chunk_is_begun_behind_the_decoding_of_the_one_before():
    stream, order, queued = session(9, steps_at=(1.0,)), [], queue.Queue()
    denoise = stream._denoise
    stream._denoise = lambda *args, **more: order.append("pass") or denoise(*args, **more)
    for _ in stream._in_turn(queued):
        queued.put(lambda: order.append("decoded"))
    assert order == ["pass", "decoded", "pass", "pass", "decoded", "pass", "pass", "decoded"]  # a commit, a step
    stopped = session(9)
    made = stopped._in_turn(queue.Queue())
    next(made)
    stopped.cancel()
    assert [*made] == []


@pytest.mark.parametrize("options", [{"window": 6, "sink": 1}, {"context": Recompute(3)}, {"view": Window(4, 1)}])
def test_memory_is_constant_over_hundreds_of_frames(options):
    stream = session(**options, steps_at=(1.0,))
    made, sizes = stream.latents(), []
    for k in range(110):
        next(made)
        if k in (9, 59, 109):
            sizes.append((stream.nbytes, *alive()))
    assert stream.made == 330 and sizes[0] == sizes[1] == sizes[2] and sizes[0][0] > 0


def test_a_new_prompt_is_heard_from_the_next_chunk_on():
    plain = whole(12, window=6)
    stream = session(12, window=6)
    made = stream.latents()
    first = [next(made), next(made)]
    stream.switch(["b"])
    switched = torch.cat([*first, *made], dim=1)
    assert torch.equal(switched[:, :6], plain[:, :6])
    assert not torch.allclose(switched[:, 6:], plain[:, 6:], atol=1e-2)
    planned = session(12, window=6)
    planned.switch(["b"], at=5)
    assert torch.equal(torch.cat([*planned.latents()], dim=1), switched)


def test_a_new_prompt_may_have_the_video_seen_anew():
    """Then what follows is what would follow these frames, had they been given."""
    old, anew = session(12, window=6), session(12, window=6)
    old.switch(["b"], at=6)
    anew.switch(["b"], at=6, anew=True)
    kept, again = (torch.cat([*stream.latents()], dim=1) for stream in (old, anew))
    assert again.shape[1] == 12 and torch.equal(again[:, :6], kept[:, :6])
    assert not torch.allclose(again[:, 6:], kept[:, 6:], atol=1e-2)
    module, draw = network(window=6), seeds.keys(0, "sample", [0])
    denoiser = LatentDenoiser(module, GaussianPath(), Flow())
    x = torch.cat([draw.fold("noise").fold(k).normal(3, 4, 4, 4) for k in (6, 9)], dim=1)
    with torch.no_grad():
        made = rollout(
            lambda x, t, **more: denoiser(x, t, Words()(["b"]), **more),
            GaussianPath(),
            x,
            WanCausal(size=SIZE).steps_at,
            module.new_cache(9),
            module.chunks,
            draw.fold("steps").fold(6),
            prefix=again[:, 3:6],
        )
        expected = torch.cat([*made], dim=1)
    torch.testing.assert_close(again[:, 6:], expected, atol=1e-4, rtol=1e-4)


def test_context_made_anew_follows_the_new_prompt():
    switched, plain = session(9, context=Recompute(3)), whole(9, context=Recompute(3))
    switched.switch(["b"], at=3)
    made = torch.cat([*switched.latents()], dim=1)
    assert torch.equal(made[:, :3], plain[:, :3]) and not torch.allclose(made[:, 3:], plain[:, 3:], atol=1e-2)


def test_the_empty_prompt_is_a_prompt():
    assert whole(6, ("",)).isfinite().all()


def test_cancelling_ends_the_stream_within_a_chunk_and_frees_its_memory():
    stream = session(window=6)
    made = stream.latents()
    next(made)
    passes = []
    forward = stream.denoiser.backbone.forward

    def stop(*args, **more):
        passes.append(1)
        if len(passes) == 2:
            stream.cancel()
        return forward(*args, **more)

    stream.denoiser.backbone.forward = stop
    assert [*made] == [] and len(passes) == 2 and stream.nbytes == 0


def test_leaving_a_stream_of_frames_ends_its_thread():
    frames = session(window=6).frames()
    next(frames)
    frames.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kinema-stream"]


def test_an_error_while_making_frames_reaches_who_asked_for_them():
    stream = session(9)
    stream.switch(["a", "b"], at=3)  # two prompts for one video
    with pytest.raises((RuntimeError, ValueError)):
        [*stream.frames()]


def test_guidance_and_samplers_change_what_is_made():
    plain, guided = whole(6), whole(6, guidance=3.0)
    assert plain.shape == guided.shape and not torch.allclose(plain, guided, atol=1e-2)
    assert torch.equal(whole(6, steps=4), plain)
    many = whole(6, steps=6)
    assert many.isfinite().all() and not torch.allclose(many, plain, atol=1e-2)


@pytest.mark.parametrize("alone", [False, True])
def test_a_stream_may_begin_with_an_image(alone):
    image = noise("image", 1, 1, 3, 4, 4)
    stream = session(7, image=image, first_frame_alone=alone)
    frames = torch.cat([*stream.frames()], dim=1)
    assert frames.shape[1] == 25 and torch.equal(frames[:, :1], image)
    assert not torch.allclose(whole(7, image=image), whole(7, image=-image), atol=1e-2)


def test_context_may_begin_with_an_image_of_the_frame_it_begins_with():
    plain, imaged = (whole(12, context=Recompute(3, image_first=first)) for first in (False, True))
    assert torch.equal(plain[:, :6], imaged[:, :6])  # until then the video's own first frame is there
    assert not torch.allclose(plain[:, 6:], imaged[:, 6:], atol=1e-3)
    frames = [*session(12, context=Recompute(3, image_first=True)).frames()]
    assert torch.equal(torch.cat(frames, dim=1), Squares().decode(imaged))


def test_what_cannot_be_is_said_at_once():
    with pytest.raises(UsageError, match="needs a window"):
        session()
    with pytest.raises(UsageError, match="8 frames do not fill chunks of 3; use 6 or 9"):
        session(8)
