"""What only a GPU can show of the fast paths: graphs, generated kernels and 8-bit products equal the plain networks."""

import threading

import pytest
import torch
from tiny_causal import network, noise
from tiny_vae import autoencoder
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from kinema import seeds
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.models import fp8, fused, layers
from kinema.models.attention import attend, attend_balanced, kept, put_together
from kinema.models.wan import vae_fast
from kinema.models.wan.fast import FastWanCausal
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.transformer import WanSize
from kinema.models.wan.vae import VideoAutoencoder
from kinema.models.wan.vae_fast import FastVideoAutoencoder
from kinema.models.wan.vae_fast_encoder import FastVideoEncoder
from kinema.streaming import Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SIZE = WanSize(dim=256, ffn_dim=512, heads=2, layers=4, text_dim=32, text_len=64, freq_dim=64)
OPTIONS = [{}, {"window": 6}, {"window": 6, "sink": 1, "reanchor": False}, {"window": 6, "sink": 1}]


class Words:
    unconditional = ""

    def __call__(self, prompts):
        return {"text": torch.stack([noise(f"prompt {prompt}", 20, SIZE.text_dim) for prompt in prompts]).cuda()}


def streamed(backbone, options, frames=18, prompt="a", codec=None, switch=None):
    denoiser = LatentDenoiser(backbone, GaussianPath(), Flow())
    spec = WanCausal(size=SIZE, **options)
    draw = seeds.keys(0, "sample", [0], device="cuda")
    session = Session(spec, denoiser, Words(), codec, [prompt], draw, (16, 16, 16), frames)
    if switch:
        session.switch(*switch)
    return torch.cat([*(session.latents() if codec is None else session.frames())], dim=1)


def off(a, b):
    """The deviation of a from b in parts of b's own."""
    return float((a.float() - b.float()).std() / b.float().std())


@pytest.mark.parametrize("options", OPTIONS)
def test_graphs_of_fused_kernels_equal_the_network(options):
    module = network(torch.bfloat16, SIZE, **options).cuda()
    fast = FastWanCausal(module, compiled=True, graphs=True)
    for prompt in ("a", "b", "a"):  # the second and third video take over memory and graphs of the first
        assert off(streamed(fast, options, prompt=prompt), streamed(module, options, prompt=prompt)) < 3e-2
    assert len(fast._tapes) == 0 and len(fast._idle) == 1
    new = ["b"], 9
    assert off(streamed(fast, options, switch=new), streamed(module, options, switch=new)) < 3e-2


@pytest.mark.parametrize("eight", [False, True])
def test_kernels_written_by_hand_stream_what_generated_ones_do(eight):
    module = network(torch.bfloat16, SIZE).cuda()
    fast, generated = (FastWanCausal(module, compiled=True, graphs=True, eight=eight) for _ in range(2))
    assert len(fast.kernels) == 8
    generated.kernels = {}
    plain = streamed(module, {})
    apart, bound = off(streamed(fast, {}), streamed(generated, {})), off(streamed(generated, {}), plain)
    assert apart < 1.5 * bound + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "hidden", "times"), [(1536, 8960, 1), (5120, 13824, 3)])  # those of 1.3B and of 14B
def test_kernels_are_the_plain_functions_at_full_size(dim, hidden, times, dtype):
    from kinema.models.fused_kernels import KERNELS

    tokens, heads = 4680, dim // 128
    x, y, hot = (noise(name, 1, tokens, n).cuda().to(dtype) for name, n in (("x", dim), ("y", dim), ("z", hidden)))
    shift, scale, gate = noise("vectors", 1, times, 6, 1, dim).cuda().unbind(2)[:3]
    affine = [noise(name, dim).cuda().to(dtype) for name in ("weight", "bias")]
    qkv, angles = noise("qkv", 1, tokens, 3 * dim).cuda().to(dtype), noise("angles", tokens, 64).cuda()
    rings = [[torch.zeros(1, 3 * tokens, heads, 128, dtype=dtype, device="cuda") for _ in "kv"] for _ in range(2)]
    parts, logs = noise("parts", 5, 1, heads, 456, 128).cuda().to(dtype), noise("logs", 5, 1, heads, 456).cuda()
    first = noise("first", 1, tokens - 456, heads, 128).cuda().to(dtype).transpose(1, 2)
    one = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5  # a sum rounded otherwise is normed too

    def eighths(rows):
        return rows.numbers.float() * rows.scale

    for function, args in (
        (fused.modulated, (x, scale, shift, 1e-6)),
        (fused.gated_affine, (x, gate, y, *affine, 1e-6)),
        (fused.added_modulated, (x, y, scale, shift, 1e-6)),
        (fused.gated_modulated, (x, gate, y, scale, shift, 1e-6)),
        (fused.activated, (hot,)),
        (fused.as_operand, (y,)),
    ):
        for eight in (False, True):
            made, plain = KERNELS[function](*args, eight), function(*args, eight)
            if isinstance(plain, tuple) and not isinstance(plain, fp8.Rows):
                assert off(made[0], plain[0]) < one
                made, plain = made[1], plain[1]
            if eight:
                torch.testing.assert_close(made.scale, plain.scale, rtol=one, atol=0)
                assert made.numbers.dtype == plain.numbers.dtype and off(eighths(made), eighths(plain)) < 5e-3
            else:
                assert made.dtype == dtype and off(made, plain) < one
    turning = qkv, *affine, angles.cos(), angles.sin(), 1e-6
    places = [[ring[:, tokens : 2 * tokens] for ring in pair] for pair in rings]
    made, plain = KERNELS[fused.turned](*turning, *places[0]), fused.turned(*turning, *places[1])
    assert off(made, plain) < one and off(rings[0][0], rings[1][0]) < one and torch.equal(rings[0][1], rings[1][1])
    made, plain = KERNELS[put_together](parts, logs, first), put_together(parts, logs, first)
    assert off(made, plain) < one and made.stride() == plain.stride()


def test_a_replayed_pass_waits_for_nothing():
    module = network(torch.bfloat16, SIZE).cuda()
    fast = FastWanCausal(module, compiled=True, graphs=True)
    cache, text = fast.new_cache(6), Words()(["a"])["text"]
    x, t = noise("x", 1, 3, 16, 16, 16).cuda(), torch.full((1, 1), 500.0).cuda()
    with torch.no_grad():
        passes = [fast(x, t, text=text, cache=cache) for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            passes.append(fast(x, t, text=text, cache=cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(passes[-1], each) for each in passes[1:3])


def test_eight_bits_deviate_as_little_as_they_say():
    module = network(torch.bfloat16, SIZE).cuda()
    plain, eight = (FastWanCausal(module, True, True, eight) for eight in (False, True))
    assert 0 < off(streamed(eight, {}), streamed(plain, {})) < 0.2  # of weights four times as large as trained ones
    x, w = (noise(name, 512, 1024).cuda().bfloat16() for name in "xw")
    bias = noise("bias", 512).cuda().bfloat16()
    rows = fp8.quantised(x), fp8.quantised(w)
    product = fp8.linear(*rows, bias)
    cpu = fp8.linear(*(fp8.Rows(*(part.cpu() for part in each)) for each in rows), bias.cpu())
    assert off(product, cpu.cuda()) < 1e-2 and off(product, torch.nn.functional.linear(x, w, bias)) < 5e-2


@pytest.mark.parametrize("keys", [4680, 14040, 18720, 32760])
def test_balanced_attention_is_as_near_to_float32_as_attention(keys):
    q, k, v = (
        noise(name, 1, n, 12, 128).cuda().bfloat16().transpose(1, 2)
        for name, n in zip("qkv", (4680, keys, keys), strict=True)
    )
    exact = attend(q[:, :, -456:].float(), k.float(), v.float())
    plain = attend(q, k, v)
    for run in (lambda function, *args: function(*args), lambda function, *args: layers.compiled(function)(*args)):
        # What the parts give is rounded to bfloat16 before it is put together, and again after it: at most √2 as far.
        balanced = attend_balanced(q, k, v, run)
        assert balanced.shape == plain.shape and balanced.stride() == plain.stride()
        assert off(balanced, plain) < 1e-2 and off(balanced[:, :, -456:], exact) < 1.45 * off(plain[:, :, -456:], exact)


def test_what_attention_gave_is_kept_without_changing_gradients():
    q, k, v = (noise(name, 1, 300, 2, 128).cuda().bfloat16().transpose(1, 2).requires_grad_() for name in "qkv")

    def block(q, k, v):
        return attend(q * 2, k + 1, v * 3).square()

    block(q, k, v).sum().backward()
    plain = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    made = checkpoint(block, q, k, v, use_reentrant=False, preserve_rng_state=False, context_fn=kept)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        made.sum().backward()
        torch.cuda.synchronize()
    assert not [event.key for event in profiler.key_averages() if "fprop" in event.key or "flash_fwd" in event.key]
    assert all(off(x.grad, grad) < 1e-2 for x, grad in zip((q, k, v), plain, strict=True))


@pytest.mark.parametrize(("group", "beside"), [(1, 0), (3, 0), (3, 8), (3, 96)])
def test_the_fast_decoder_is_as_near_to_float32_as_the_plain_one(group, beside, monkeypatch):
    monkeypatch.setattr(vae_fast, "BESIDE", beside)  # no, some, all convolutions that keep the channels
    latents = noise("z", 1, 7, 16, 8, 12).cuda()
    exact = VideoAutoencoder(autoencoder().cuda(), 10**9).decode(latents)
    network = autoencoder().cuda().bfloat16()
    plain = VideoAutoencoder(network, 10**9, group).decode(latents)
    fast = FastVideoAutoencoder(network, 10**9, group)
    assert off(fast.decode(latents), exact) < 1.5 * off(plain, exact)
    pieces = torch.cat([*fast.stream(latents.split([3, 3, 1], dim=1))], dim=1)
    assert off(pieces, exact) < 1.5 * off(plain, exact)


def test_the_fast_encoder_is_as_near_to_float32_as_the_plain_one_and_knows_no_other_video():
    pixels, other = noise("pixels", 1, 37, 3, 64, 96).cuda().clamp(-1, 1), noise("other", 1, 5, 3, 32, 48).cuda()
    exact = VideoAutoencoder(autoencoder().cuda(), 10**9).encode(pixels)
    assert off(FastVideoEncoder(autoencoder().cuda(), 10**9, fused=True).encode(pixels), exact) < 5e-3  # TF32
    network = autoencoder().cuda().bfloat16()
    plain, fast = VideoAutoencoder(network, 10**9).encode(pixels), FastVideoEncoder(network, 10**9, fused=True)
    before = fast.encode(pixels)
    assert off(before, exact) < 1.5 * off(plain, exact)
    fast.encode(other)
    assert torch.equal(fast.encode(pixels), before)


def test_decoding_beside_recording_changes_nothing():
    """The thread that makes latents records its graphs while this one decodes."""
    module, codec = network(torch.bfloat16, SIZE).cuda(), FastVideoAutoencoder(autoencoder().cuda().bfloat16(), 10**9)
    fast = FastWanCausal(module, compiled=True, graphs=True)
    first = streamed(fast, {}, codec=codec)
    again = streamed(fast, {}, codec=codec)
    assert first.shape[1] == 69 and off(first, again) < 1e-2
    assert not [thread for thread in threading.enumerate() if thread.name == "kinema-stream"]


def gradients(module, fused=False, dtype=torch.float32):
    """Those of every parameter, in float32, of a loss of one video; matrix products are in `dtype`."""
    x, t, text = noise("x", 1, 6, 16, 16, 16).cuda(), torch.full((1, 1), 500.0).cuda(), noise("text", 1, 20, 32).cuda()
    layers.fuse(fused)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            module(x, t, text=text).float().square().mean().backward()
    finally:
        layers.fuse(False)
    made = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return made


def test_fused_elementwise_kernels_equal_plain_ones_with_gradients():
    module = network(torch.float32, SIZE).cuda()
    plain, fused = gradients(module), gradients(module, fused=True)
    assert max(off(fused[name], grad) for name, grad in plain.items()) < 1e-3  # TF32 or not, products are the same


def test_fused_gradients_in_bfloat16_are_as_near_to_float32_as_plain_ones():
    module = network(torch.float32, SIZE).cuda()
    with torch.no_grad():
        # Weights as large as trained ones. At four times that, roundings decide: an input moved by a thousandth changes
        # float32's gradients by less, but plain bfloat16 ones then deviate from them up to 1.4 times as much.
        for p in module.parameters():
            if p.ndim > 1:
                p /= 4
    exact = gradients(module)
    plain, fused = (gradients(module, yes, torch.bfloat16) for yes in (False, True))

    def deviation(found):
        """Over all parameters, each in parts of its own gradient, so that small ones count."""
        return float(torch.cat([((found[name] - grad) / grad.std()).flatten() for name, grad in exact.items()]).std())

    assert 0 < deviation(plain) < 2e-2 and deviation(fused) < 1.2 * deviation(plain)


@pytest.mark.parametrize("shape", [(1, 1, 1, 256), (1, 3, 1, 256)])
def test_generated_backward_of_a_modulated_norm_gives_gradients_the_shapes_of_its_vectors(shape):
    """Of so many rows that one kernel may sum over rows and columns; at fewer tokens that kernel is not generated."""
    rows = 24576
    x, cotangent = (noise(name, 1, shape[1], rows // shape[1], 256).cuda() for name in ("x", "cotangent"))
    found = []
    for yes in (False, True):
        given = [
            tensor.cuda().requires_grad_() for tensor in (x.clone(), noise("scale", *shape), noise("shift", *shape))
        ]
        layers.fuse(yes)
        try:
            layers.modulated_norm(*given, 1e-6).backward(cotangent)
        finally:
            layers.fuse(False)
        found.append([tensor.grad for tensor in given])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
