"""The fast paths of Wan are the plain networks in another order: without their kernels, on a CPU, they are equal."""

import gc
from functools import partial

import pytest
import torch
from tiny_causal import SIZE, network, noise
from tiny_vae import autoencoder
from torch.utils.checkpoint import checkpoint

from kinema import seeds
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.rollout import Recompute, rollout
from kinema.models import attention, fp8, fused
from kinema.models.attention import attend, attend_balanced, in_parts, put_together, rounds
from kinema.models.wan.fast import FastWanCausal, Rehearsal, _Tape
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.vae import VideoAutoencoder
from kinema.models.wan.vae_fast import FastVideoAutoencoder
from kinema.models.wan.vae_fast_encoder import FastVideoEncoder, activated, activated_in_place

OPTIONS = [
    {},
    {"window": 6},
    {"window": 6, "sink": 1, "reanchor": False},
    {"window": 6, "sink": 1},
    {"window": 7, "sink": 2},  # its chunks lie around the end of the ring
    {"first_frame_alone": True, "fuse_qkv": True},
]


def fast_of(module, **how):
    return FastWanCausal(module, compiled=False, graphs=False, **how)


def made(backbone, frames, module, prompt="a", dtype=torch.float64, **options):
    draw, denoiser = seeds.keys(0, "sample", [0, 1]), LatentDenoiser(backbone, GaussianPath(), Flow())
    x, text = draw.normal(frames, 4, 4, 6).to(dtype), noise(f"prompt {prompt}", 2, 5, 20, dtype=dtype)
    cache = backbone.new_cache(frames)

    def denoise(x, t, **more):
        return denoiser(x, t, {"text": text}, **more)

    return torch.cat([*rollout(denoise, GaussianPath(), x, (1.0, 0.6), cache, module.chunks, draw, **options)], dim=1)


@pytest.mark.parametrize("options", OPTIONS)
def test_fast_equals_the_network(options):
    module = network(torch.float64, **options)
    frames, fast = 12 + module.chunks.first_alone, fast_of(module)
    with torch.no_grad():
        for prompt in "ab":  # the second video takes over the first one's memory
            plain = made(module, frames, module, prompt)
            torch.testing.assert_close(made(fast, frames, module, prompt), plain, atol=1e-10, rtol=1e-10)
            gc.collect()
        assert len(fast._tapes) == 0 and len(fast._idle) == 1


def test_passes_it_is_not_made_for_are_the_networks_own():
    module = network(torch.float64)
    fast, x, text = fast_of(module), noise("x", 1, 6, 4, 4, 6, dtype=torch.float64), noise("text", 1, 5, 20).double()
    t = torch.full((1, 1), 500.0)
    assert torch.equal(fast(x, t, text=text), module(x, t, text=text))
    assert fast(x[:, :3], t, text=text, cache=fast.new_cache(6)).requires_grad
    with torch.no_grad():
        plain, again = (made(backbone, 9, module, context=Recompute(3)) for backbone in (module, fast))
    torch.testing.assert_close(again, plain, atol=1e-10, rtol=1e-10)


def test_memory_that_a_backward_still_reads_is_not_taken_over():
    fast = fast_of(network())
    for block in fast.module.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    cache, x, text = fast.new_cache(6, 6), noise("x", 1, 3, 4, 4, 6), noise("text", 1, 5, 20)
    t = torch.full((1, 1), 500.0)
    with torch.no_grad():
        fast(x, t, text=text, cache=cache, write=True)
    flow, stores = fast(x, t, text=text, cache=cache), cache.stores
    del cache
    gc.collect()
    other = fast.new_cache(6, 6)
    assert other.stores is not stores
    flow.sum().backward()
    del flow, other
    gc.collect()
    assert len(fast._tapes) == 0 and len(fast._idle) == 1


@pytest.mark.parametrize("window", [None, 6])
def test_a_rehearsed_rollout_has_the_same_video_and_gradients(window):
    options = {} if window is None else {"window": window, "sink": 1}
    module = network(torch.float64, **options)
    rehearsal = Rehearsal(WanCausal(size=SIZE, **options), module, torch.float64, compiled=False, graphs=False)
    grads = []
    for backbone in (module, rehearsal):
        video = made(backbone, 12, module, exit_step=1, graded_frames=6)
        (video * noise("weight", *video.shape).double()).sum().backward()
        grads.append([video.detach(), *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
        rehearsal.refresh()
        plain, again = (made(backbone, 9, module) for backbone in (module, rehearsal))
    torch.testing.assert_close(again, plain, atol=1e-9, rtol=1e-9)


def test_eight_bits_keep_every_rows_largest_number_and_round_the_rest_to_a_sixteenth():
    x = noise("x", 8, 64) * torch.logspace(-3, 3, 8)[:, None]
    rows = fp8.quantised(x)
    back = rows.numbers.float() * rows.scale
    largest = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), x.gather(1, largest), rtol=1e-6, atol=0)
    small = 2.0**-6 * rows.scale  # below it e4m3's steps are even
    assert ((back - x).abs() <= (x.abs() / 16).maximum(small / 8)).all()
    w, bias = noise("w", 32, 64), noise("b", 32)
    exact = torch.nn.functional.linear(x, w, bias)
    off = (fp8.linear(rows, fp8.quantised(w), bias) - exact).std(1) / exact.std(1)
    assert (off < 0.06).all() and off.mean() > 1e-3


def test_eight_bits_are_in_all_blocks_but_the_first_and_the_last():
    from dataclasses import replace

    module = network(torch.float32, replace(SIZE, layers=4))
    fast = fast_of(module, eight=True)
    assert [layer.eight for layer in fast.layers] == [False, True, True, False]
    with torch.no_grad():
        eight, plain = made(fast, 6, module, dtype=torch.float32), made(module, 6, module, dtype=torch.float32)
    assert 1e-4 < (eight - plain).std() / plain.std() < 0.2


def test_fused_functions_quantise_what_they_would_have_returned():
    x, y, gate = noise("x", 2, 6, 16), noise("y", 2, 6, 16), noise("g", 2, 3, 1, 16)
    plain, eight = (fused.gated_modulated(x, gate, y, gate, gate, 1e-6, yes) for yes in (False, True))
    assert torch.equal(plain[0], eight[0]) and torch.equal(fp8.quantised(plain[1]).numbers, eight[1].numbers)


def test_the_scale_of_an_activated_row_is_known_before_it_is_activated():
    x = noise("x", 6, 64) * torch.tensor([3.0, 1.0, 0.3, 3.0, 0.01, 0.0])[:, None]
    x[3] = -x[3].abs()  # nothing in it is above 0
    plain = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(fused.activated(x.double()), plain, atol=1e-12, rtol=1e-12)
    rows, exact = fused.activated(x, True), fp8.quantised(plain)
    assert torch.equal(rows.scale[:2], (fp8.quantised(fused.activated(x))).scale[:2])  # rows of any width have such
    assert (rows.scale >= exact.scale * (1 - 1e-6)).all() and plain.min() > -fused.GELU_DEPTH
    back = rows.numbers.float() * rows.scale
    assert ((back - plain).abs() <= (plain.abs() / 16).maximum(2.0**-9 * rows.scale)).all()


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_attention_in_parts_of_its_keys_is_attention_to_all(parts):
    q, k, v = (noise(name, 2, 3, n, 16, dtype=torch.float64) for name, n in (("q", 7), ("k", 30), ("v", 30)))
    apart = put_together(*in_parts(q[:, :, 4:], k, v, parts), attend(q[:, :, :4], k, v))
    torch.testing.assert_close(apart, attend(q, k, v), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("processors", "apart"), [(5, (44, 5)), (6, (0, 1))])
def test_balanced_attention_takes_its_last_queries_apart_and_equals_attention(processors, apart, monkeypatch):
    assert rounds(2, 300, 6000, processors) == apart  # 6 tiles
    looked, plain = [], attention.in_parts
    monkeypatch.setattr(attention, "in_parts", lambda q, *rest: looked.append(q.shape[2]) or plain(q, *rest))
    q, k, v = (
        noise(name, 1, n, 2, 8, dtype=torch.float64).transpose(1, 2)
        for name, n in (("q", 300), ("k", 6000), ("v", 6000))
    )
    made = attend_balanced(q, k, v, processors=processors)
    torch.testing.assert_close(made, attend(q, k, v), atol=1e-12, rtol=1e-12)
    assert made.transpose(1, 2).is_contiguous() and looked == ([44] if processors == 5 else [])


def test_rounds_are_filled_where_that_gains_something():
    assert rounds(12, 4680, 32760, 132) == (4680 - 33 * 128, 5)  # 12 · 33 tiles are exactly three rounds of 132
    assert rounds(12, 4680, 14040, 132) == (456, 5) and rounds(12, 4680, 4680, 132) == (0, 1)
    assert rounds(12, 33 * 128, 32760, 132) == (0, 1) and rounds(1, 64, 64, 132) == (0, 1)
    tail, parts = rounds(12, 4680, 14042, 132)
    assert parts == 2 and (4680 - tail) % 128 == 0


@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_fast_decoder_equals_the_plain_one_in_any_pieces(group):
    module, z = autoencoder(), noise("z", 2, 6, 16, 4, 6)
    plain, fast = VideoAutoencoder(module, 10**9, group), FastVideoAutoencoder(module, 10**9, group, fused=False)
    whole = fast.decode(z)
    torch.testing.assert_close(whole, plain.decode(z), atol=2e-5, rtol=1e-4)
    assert torch.equal(torch.cat([*fast.stream(z.split([1, 2, 3], dim=1))], dim=1), whole) or group == 2
    assert whole.std() > 0.1


@pytest.mark.parametrize("frames", [1, 9, 13, 37])  # pieces of 16 frames, and of 4, 8 and 12 at the end
def test_the_fast_encoder_equals_the_plain_one_at_any_length(frames):
    pixels = noise("pixels", 2, frames, 3, 16, 32).clamp(-1, 1)
    for module, tolerance in ((autoencoder().double(), 1e-12), (autoencoder(), 2e-5)):
        plain, fast = VideoAutoencoder(module, 10**9), FastVideoEncoder(module, 10**9, fused=False)
        given = pixels.to(next(module.parameters()).dtype)
        for ours, theirs in zip(fast.posterior(given), plain.posterior(given), strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
            assert ours.dtype == given.dtype and ours.std() > 0.1
        assert torch.equal(fast.encode(given)[1:], fast.encode(given[1:])), "what is beside a video changes it"


def test_the_fast_encoder_takes_few_large_frames_at_once():
    module, pixels = autoencoder(), noise("pixels", 1, 9, 3, 144, 128).float().clamp(-1, 1)  # of which a cache holds 3
    plain, fast = VideoAutoencoder(module, 10**9), FastVideoEncoder(module, 10**9, fused=False)
    torch.testing.assert_close(fast.encode(pixels), plain.encode(pixels), atol=5e-5, rtol=1e-4)


def test_the_fast_encoder_rounds_bfloat16_as_the_plain_one_does():
    exact, module = autoencoder(), autoencoder().bfloat16()
    pixels = noise("pixels", 1, 9, 3, 16, 32).float().clamp(-1, 1)
    truth = FastVideoEncoder(exact, 10**9, fused=False).encode(pixels)
    plain, fast = VideoAutoencoder(module, 10**9).encode(pixels), FastVideoEncoder(module, 10**9, False).encode(pixels)
    assert (fast - truth).std() < 1.1 * (plain - truth).std() < 0.05 * truth.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [(), ("bias",), ("shortcut",)])
def test_what_gpus_compile_is_what_cpus_run(dtype, given):
    raw, shortcut = (noise(name, 2, 3, 4, 16).to(dtype) for name in ("raw", "shortcut"))
    bias, gamma = (noise(name, 16).to(dtype) for name in ("bias", "gamma"))
    more = (bias if "bias" in given else None, shortcut if "shortcut" in given else None, gamma)
    compiled, written_out = torch.empty_like(raw), torch.empty_like(raw)
    sums = activated(raw, *more, compiled), activated_in_place(raw.clone(), *more, written_out)
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(compiled, written_out)
    assert compiled.std() > 0.1


def test_chunks_of_one_frame_first_are_streamed_fast_too():
    module = network(torch.float64, first_frame_alone=True)
    assert fast_of(module).chunks == Chunks(3, first_alone=True) and fast_of(module).window == module.window


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_kept_in_eight_bits_is_what_lies_in_the_ring(options, monkeypatch):
    """Kept from pass to pass, through moved sinks and the network's own passes, it is that of a ring rounded anew."""
    module = network(torch.float32, **options)
    frames = 12 + module.chunks.first_alone
    contexts = [None] if options else [None, Recompute(3)]
    with torch.no_grad():
        for context in contexts:
            videos, fast = [], fast_of(module, eight_attention=True)
            for anew in (False, True):
                if anew:
                    monkeypatch.setattr(_Tape, "stale", property(lambda tape: True, lambda tape, value: None))
                    fast = fast_of(module, eight_attention=True)
                videos.append(made(fast, frames, module, dtype=torch.float32, context=context))
                monkeypatch.undo()
            assert torch.equal(*videos)
            plain = made(module, frames, module, dtype=torch.float32, context=context)
            assert 1e-3 < (videos[0] - plain).std() / plain.std() < 0.05
