"""The causal Wan against the bidirectional one, and its ways of seeing a video against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_causal import SIZE, by_chunks, network, noise, times
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from kinema.diffusion.chunks import Chunks
from kinema.errors import UsageError
from kinema.models import lora
from kinema.models.attention import attend
from kinema.models.cache import Cache
from kinema.models.causality import ChunkedAttention, Sight, Window, block_mask
from kinema.models.layers import rotary, rotary_widths, rotate
from kinema.models.lora import LoRA
from kinema.models.wan.spec import Wan, WanCausal
from kinema.models.wan.transformer import WanSize, WanTransformer

F64, CPU = torch.float64, torch.device("cpu")
NARROW = WanSize(
    dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)
quick = settings(deadline=None, max_examples=30, derandomize=True)
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SIZES = [(2, 2), (4, 6), (2, 16)]  # rows and columns of latents: 1, 6 and 8 tokens of a frame


@st.composite
def layouts(draw):
    """Chunks, whole videos of them, and windows with sinks that hold them."""
    chunk, alone = draw(st.integers(1, 3)), draw(st.booleans())
    frames = alone + chunk * draw(st.integers(1, 5))
    sink = draw(st.integers(0, 3))
    window = draw(st.one_of(st.none(), st.integers(sink + chunk, sink + chunk + 4)))
    spec = {"chunk": chunk, "first_frame_alone": alone, "window": window, "sink": sink if window else 0}
    return frames, {**spec, "reanchor": draw(st.booleans())}


@quick
@given(layouts(), st.sampled_from(SIZES), st.integers(1, 2), st.booleans(), st.sampled_from([0, 7]))
def test_cached_equals_masked(layout, size, batch, graded, position):
    frames, spec = layout
    module = network(F64, NARROW, **spec)
    x, t = noise("x", batch, frames, 4, *size, dtype=F64), times("t", batch, frames, dtype=F64)
    text = noise("text", batch, 5, 8, dtype=F64)
    with torch.set_grad_enabled(graded):
        masked = module(x, t, text=text, first_position=position)
        cache = module.new_cache(frames, graded=frames if graded else 0)
        cached = by_chunks(module, x, t, module.chunks.lengths(frames), cache, text, first_position=position)
    torch.testing.assert_close(cached, masked, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("frames", "size"), [(16, (2, 16)), (4, (16, 32)), (8, (16, 16))])  # 128, 512 and 512 tokens
def test_cached_equals_masked_where_tokens_fill_blocks_of_128(frames, size):
    module = network(F64, NARROW, chunk=2, window=6, sink=1)
    x, t = noise("x", 1, frames, 4, *size, dtype=F64), times("t", 1, frames, dtype=F64)
    text = noise("text", 1, 5, 8, dtype=F64)
    with torch.no_grad():
        masked = module(x, t, text=text)
        cached = by_chunks(module, x, t, module.chunks.lengths(frames), module.new_cache(), text)
    assert masked.any() and (frames * size[0] * size[1] // 4) % 128 == 0
    torch.testing.assert_close(cached, masked, atol=1e-11, rtol=1e-11)


@quick
@given(layouts(), st.sampled_from(SIZES), st.booleans())
def test_teacher_forcing_equals_noisy_chunks_on_a_clean_cache(layout, size, augmented):
    frames, spec = layout
    module = network(F64, NARROW, **spec)
    x, clean = noise("x", 2, frames, 4, *size, dtype=F64), noise("clean", 2, frames, 4, *size, dtype=F64)
    t, text = times("t", 2, frames, dtype=F64), noise("text", 2, 5, 8, dtype=F64)
    t_clean = times("clean t", 2, frames, dtype=F64) / 20 if augmented else torch.zeros(2, frames, dtype=F64)
    with torch.no_grad():
        more = {"clean_timestep": t_clean} if augmented else {}
        forced = module(x, t, text=text, clean=clean, **more)
        cache, made, begin = module.new_cache(frames), [], 0
        for n in module.chunks.lengths(frames):
            part = slice(begin, begin + n)
            made.append(module(x[:, part], t[:, part], text=text, cache=cache))
            module(clean[:, part], t_clean[:, part], text=text, cache=cache, write=True)
            begin += n
    torch.testing.assert_close(torch.cat(made, dim=1), forced, atol=1e-11, rtol=1e-11)


def test_a_chunk_of_all_frames_equals_the_bidirectional_network():
    module = network(chunk=5)
    both = WanTransformer(SIZE)
    both.load_state_dict(module.state_dict())
    x, t, text = noise("x", 2, 5, 4, 4, 6), times("t", 2, 5), noise("text", 2, 9, 20)
    torch.testing.assert_close(module(x, t, text=text), both(x, t, text=text), atol=1e-5, rtol=1e-5)


def test_float32_is_float64_rounded():
    options = {"window": 6, "sink": 1}
    x, t, text = noise("x", 2, 9, 4, 4, 6), times("t", 2, 9), noise("text", 2, 9, 20)
    with torch.no_grad():
        exact = network(F64, **options)(x.double(), t.double(), text=text.double())
        module = network(**options)
        for made in (module(x, t, text=text), by_chunks(module, x, t, (3, 3, 3), module.new_cache(), text)):
            torch.testing.assert_close(made.double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("options", [{}, {"window": 4, "sink": 1}, {"window": 4, "sink": 1, "reanchor": False}])
def test_nothing_comes_from_the_future(options):
    module = network(chunk=2, **options)
    x, t, text = noise("x", 1, 8, 4, 4, 4).requires_grad_(), times("t", 1, 8), noise("text", 1, 9, 20)
    for end in (2, 4, 6):
        (slope,) = torch.autograd.grad(module(x, t, text=text)[:, end - 2 : end].sum(), x)
        assert not slope[:, end:].any() and slope[:, :end].flatten(2).any(2).sum() == end


def test_what_left_the_window_is_not_seen_at_all():
    size = WanSize(**{**vars(SIZE), "layers": 1})  # with more layers, what was seen is passed on
    module = network(size=size, chunk=2, window=4, sink=1)
    x, t, text = noise("x", 1, 8, 4, 4, 4).requires_grad_(), times("t", 1, 8), noise("text", 1, 9, 20)
    (slope,) = torch.autograd.grad(module(x, t, text=text)[:, 6:].sum(), x)
    assert slope[0].flatten(1).any(1).tolist() == [True, False, False, False, False, True, True, True]


def test_teacher_forcing_hides_its_answers():
    """A noisy chunk sees no other noisy one, and clean frames only before its own."""
    module = network(chunk=2, first_frame_alone=True)
    x, clean = (noise(name, 1, 5, 4, 4, 4).requires_grad_() for name in ("x", "clean"))
    flow = module(x, times("t", 1, 5), text=noise("text", 1, 9, 20), clean=clean)
    seen = [torch.autograd.grad(flow[:, part].sum(), (x, clean), retain_graph=True) for part in ([0], [1, 2], [3, 4])]
    found = [[each[0].flatten(1).any(1).int().tolist() for each in pair] for pair in seen]
    assert found == [[[1, 0, 0, 0, 0], [0] * 5], [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]]


@pytest.mark.parametrize("position", [0, 3000])
def test_positions_have_no_end_and_only_differences_count(position):
    module = network(F64, window=6, sink=1)
    x, t, text = noise("x", 1, 9, 4, 4, 4, dtype=F64), times("t", 1, 9, dtype=F64), noise("text", 1, 9, 20, dtype=F64)
    with torch.no_grad():
        expected = module(x, t, text=text)
        masked = module(x, t, text=text, first_position=position + 5000)
        cached = by_chunks(module, x, t, (3, 3, 3), module.new_cache(9), text, first_position=position + 5000)
    torch.testing.assert_close(masked, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(cached, expected, atol=1e-9, rtol=1e-9)


def test_positions_far_away_are_as_good_in_float32():
    module = network()
    x, t, text = noise("x", 1, 6, 4, 4, 4), times("t", 1, 6), noise("text", 1, 9, 20)
    with torch.no_grad():
        far = module(x, t, text=text, first_position=5000)
        torch.testing.assert_close(far, module(x, t, text=text), atol=1e-4, rtol=1e-4)


def test_reanchored_sinks_are_those_of_keys_rotated_to_their_new_position():
    window, tokens, dim = Window(5, sink=2), 3, 12
    q, k, v = (noise(name, 1, 2, 9 * tokens, dim, dtype=F64) for name in "qkv")
    widths, spots = rotary_widths(dim), [torch.arange(3), torch.arange(1)]

    def turned(x, positions):
        return rotate(x, *rotary([torch.tensor(positions), *spots], widths, F64))

    sight = Sight((3, 3, 3), window)
    made = ChunkedAttention(sight, tokens, dim, CPU, F64)(turned(q, range(9)), turned(k, range(9)), v)
    # The last chunk sees 0, 1 as if they were 4, 5, right before frames 6, 7, 8.
    rows = [*range(2 * tokens), *range(6 * tokens, 9 * tokens)]
    expected = attend(turned(q, range(9))[:, :, 6 * tokens :], turned(k[:, :, rows], range(4, 9)), v[:, :, rows])
    torch.testing.assert_close(made[:, :, 6 * tokens :], expected, atol=1e-12, rtol=1e-12)


def test_the_window_of_the_worked_example():
    window = Window(6, sink=1)
    assert [[*a, *b] for a, b in (window.seen(e) for e in (3, 6, 9, 12))] == [
        [0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 4, 5, 6, 7, 8],
        [0, 7, 8, 9, 10, 11],
    ]
    assert [window.shift(e) for e in (3, 6, 9, 12)] == [0, 0, 3, 6]
    cache = Cache(1, 6, window)
    assert sorted(cache.slot(g) for g in (1, 2, 3)) == sorted(cache.slot(g) for g in (6, 7, 8))


@quick
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 5), st.integers(0, 9), st.integers(0, 300))
def test_frames_that_are_seen_have_slots_of_their_own(sink, chunk, more, graded, begin):
    window = Window(sink + chunk + more, sink)
    cache, end = Cache(1, window.frames + graded, window), begin + chunk
    seen = [g for part in window.seen(end) for g in part]
    assert len({cache.slot(g) for g in seen}) == len(seen) <= window.frames
    assert all(0 <= cache.slot(g) < cache.capacity for g in seen)


@UNCOMPILED
@pytest.mark.parametrize("tokens", [5, 16, 32])  # 40, 128 and 256 tokens in all: full, and not, of blocks of 128
@pytest.mark.parametrize("clean", [False, True])
def test_one_masked_kernel_equals_one_attention_for_each_chunk(tokens, clean):
    sight = Sight((2, 2, 4), Window(6, sink=1, reanchor=False), clean)
    q, k, v = (noise(name, 1, 2, 8 * tokens * (1 + clean), 16) for name in "qkv")
    mask = sight.mask(tokens, CPU)
    expected = ChunkedAttention(sight, tokens, 16, CPU, torch.float32)(q, k, v)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)
    kernel = flex_attention(q, k, v, block_mask=block_mask(sight, tokens, CPU))
    torch.testing.assert_close(kernel, expected, atol=1e-5, rtol=1e-5)


@UNCOMPILED
def test_masks_of_other_sequences_do_not_mix():
    for sight in [Sight((2, 2), Window()), Sight((2, 2, 2), Window()), Sight((2, 2), Window(), clean=True)] * 2:
        q, k, v = (noise(name, 1, 1, sight.frames * (1 + sight.clean) * 2, 16) for name in "qkv")
        kernel = flex_attention(q, k, v, block_mask=block_mask(sight, 2, CPU))
        torch.testing.assert_close(kernel, attend(q, k, v, sight.mask(2, CPU)), atol=1e-5, rtol=1e-5)
    assert block_mask(sight, 2, CPU) is block_mask(Sight((2, 2), Window(), clean=True), 2, CPU)


def rollout_like(module, x, t, text, capacity):
    """Exit passes with gradients and commits without, as training does; the loss reads all of them."""
    cache = module.new_cache(x.shape[1], graded=capacity)
    made = by_chunks(module, x, t, module.chunks.lengths(x.shape[1]), cache, text)
    module.zero_grad()
    (made * noise("weight", *made.shape, dtype=made.dtype)).sum().backward()
    return [p.grad.clone() for p in module.parameters()]


def recomputed(module):
    for block in module.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    return module


@pytest.mark.parametrize(
    "options", [{}, {"window": 6}, {"window": 6, "sink": 1}, {"window": 6, "sink": 2, "reanchor": False}]
)
def test_gradients_recomputed_equal_plain(options):
    x, t, text = noise("x", 1, 15, 4, 4, 4, dtype=F64), times("t", 1, 15, dtype=F64), noise("text", 1, 9, 20, dtype=F64)
    plain = rollout_like(network(F64, **options), x, t, text, 0)
    again = rollout_like(recomputed(network(F64, **options)), x, t, text, 15)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("again", [False, True])
def test_compiled_blocks_need_no_program_for_each_chunk(again):
    torch._dynamo.reset()
    plain, compiled, programs = network(window=6, sink=1), network(window=6, sink=1), CompileCounter()
    for block in (recomputed(compiled) if again else compiled).blocks:
        block.compile(backend=programs)
    x, t, text = noise("x", 1, 12, 4, 4, 4), times("t", 1, 12)[:, :1].expand(1, 12), noise("text", 1, 9, 20)
    counts = []
    for _ in range(2):
        for a, b in zip(rollout_like(plain, x, t, text, 12), rollout_like(compiled, x, t, text, 12), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        counts.append(programs.frame_count)
    assert 0 < counts[0] == counts[1] <= 8
    torch._dynamo.reset()


def test_a_ring_too_small_for_recomputation_is_noticed():
    x, t, text = noise("x", 1, 15, 4, 4, 4), times("t", 1, 15), noise("text", 1, 9, 20)
    with pytest.raises(RuntimeError, match="written over"):
        rollout_like(recomputed(network(window=6, sink=1)), x, t, text, 0)


def test_a_new_video_leaves_what_a_backward_still_needs():
    module = recomputed(network(F64))
    x, t, text = noise("x", 1, 6, 4, 4, 4, dtype=F64), times("t", 1, 6, dtype=F64), noise("text", 1, 9, 20, dtype=F64)
    expected = rollout_like(module, x, t, text, 6)
    cache = module.new_cache(6, graded=6)
    made = by_chunks(module, x, t, (3, 3), cache, text)
    cache.reset()
    with torch.no_grad():
        by_chunks(module, -x, t, (3, 3), cache, text)
    module.zero_grad()
    (made * noise("weight", *made.shape, dtype=F64)).sum().backward()
    for a, p in zip(expected, module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, atol=1e-9, rtol=1e-9)


def test_without_gradients_a_new_video_uses_the_same_memory():
    module = network(window=6, sink=1)
    x, t, text = noise("x", 1, 6, 4, 4, 4), times("t", 1, 6), noise("text", 1, 9, 20)
    cache = module.new_cache()
    with torch.no_grad():
        first = by_chunks(module, x, t, (3, 3), cache, text)
        places = [store.k.data_ptr() for store in cache.stores]
        cache.reset()
        assert torch.equal(by_chunks(module, x, t, (3, 3), cache, text), first)
    assert places == [store.k.data_ptr() for store in cache.stores]


def test_the_text_is_embedded_once_without_gradients_and_learns_with_them():
    module = network(F64)
    x, t, text = noise("x", 1, 6, 4, 4, 4, dtype=F64), times("t", 1, 6, dtype=F64), noise("text", 1, 9, 20, dtype=F64)
    calls = []
    module.text_embedding.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cached = rollout_like(module, x, t, text, 0)
    assert calls == [True, False, True]
    names = [name for name, _ in module.named_parameters()]
    assert cached[names.index("blocks.1.cross_attn.k.weight")].any()

    module.zero_grad()  # the gradient of the same chunks, with nothing kept: their context is a constant beside them
    total = 0
    for k in range(2):
        cache = module.new_cache(6)
        with torch.no_grad():
            for j in range(k):
                module(x[:, 3 * j : 3 * j + 3], t[:, 3 * j : 3 * j + 3], text=text, cache=cache, write=True)
        part = slice(3 * k, 3 * k + 3)
        flow = module(x[:, part], t[:, part], text=text, cache=cache)
        total = total + (flow * noise("weight", 1, 6, 4, 4, 4, dtype=F64)[:, part]).sum()
    total.backward()
    for a, p in zip(cached, module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, atol=1e-9, rtol=1e-9)


def test_another_prompt_is_heard_once_the_old_one_is_forgotten():
    module, cache = network(), network().new_cache(6)
    x, t = noise("x", 1, 3, 4, 4, 4), times("t", 1, 3)
    old, new = noise("old", 1, 9, 20), noise("new", 1, 4, 20)
    with torch.no_grad():
        module(x, t, text=old, cache=cache)
        cache.forget_text()
        heard = module(x, t, text=new, cache=cache)
        assert torch.equal(heard, module(x, t, text=new, cache=module.new_cache(6)))
        assert torch.equal(heard, module(x, t, text=new, cache=cache))


def test_several_chunks_at_once_write_what_they_write_one_by_one():
    module = network(F64, first_frame_alone=True)
    x, t, text = noise("x", 1, 10, 4, 4, 4, dtype=F64), times("t", 1, 10, dtype=F64), noise("text", 1, 9, 20, dtype=F64)
    one, all_ = module.new_cache(10), module.new_cache(10)
    with torch.no_grad():
        by_chunks(module, x[:, :7], t[:, :7], (1, 3, 3), one, text)
        module(x[:, :7], t[:, :7], text=text, cache=all_, write=True, lengths=(1, 3, 3))
        flows = [module(x[:, 7:], t[:, 7:], text=text, cache=cache) for cache in (one, all_)]
        torch.testing.assert_close(*flows, atol=1e-11, rtol=1e-11)
        with pytest.raises(ValueError, match="can only begin a sequence"):
            module(x, t, text=text, cache=one, lengths=(1, 3, 3, 3))


def test_misuse_is_refused():
    module = network(window=6, sink=1)
    x, t, text = noise("x", 1, 3, 4, 4, 4), times("t", 1, 3), noise("text", 1, 9, 20)
    with pytest.raises(ValueError, match="no_grad"):
        module(x, t, text=text, cache=module.new_cache(), write=True)
    with pytest.raises(ValueError, match="do not fill chunks of 3; use 3 or 6"):
        module(noise("x", 1, 5, 4, 4, 4), times("t", 1, 5), text=text)
    with pytest.raises(ValueError, match="not both"):
        module(x, t, text=text, clean=x, cache=module.new_cache())
    with pytest.raises(ValueError, match="endless"):
        network().new_cache()
    with pytest.raises(
        ValueError, match="begin at frame 1 only with gradients, and a cache that has the frames before"
    ):
        module(x, t, text=text, cache=module.new_cache(), at=1)
    with torch.no_grad():
        with pytest.raises(ValueError, match="begin at frame 0 only with gradients"):
            module(x, t, text=text, cache=module.new_cache(), at=0)
        cache = network().new_cache(3)
        network()(x, t, text=text, cache=cache, write=True)
        with pytest.raises(ValueError, match="room for 3"):
            network()(x, t, text=text, cache=cache)
        with pytest.raises(ValueError, match="the cache holds"):
            network()(x.repeat(2, 1, 1, 1, 1), t, text=text, cache=cache)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"window": 3, "sink": 1}, "use 4 or more"),
        ({"sink": 1}, "needs a window"),
        ({"chunk": 0}, "at least 1 frame"),
        ({"steps_at": (0.5, 1.0)}, "must decrease"),
        ({"steps_at": ()}, "must decrease"),
    ],
)
def test_specs_that_cannot_work_say_why(spec, message):
    with pytest.raises(UsageError, match=message):
        WanCausal(size=SIZE, **spec)


def test_a_final_zero_is_left_out():
    assert WanCausal(size=SIZE, steps_at=(1.0, 0.5, 0.0)).steps_at == (1.0, 0.5)


def test_the_default_steps_are_the_published_ones():
    spec = WanCausal(size=SIZE)
    assert spec.times(4) == spec.steps_at == pytest.approx((1, 0.9375, 0.8333333, 0.625))
    assert spec.times(50) == Wan(size=SIZE).times(50)


@pytest.mark.parametrize("layout", ["kinema", "wan", "diffusers", "self_forcing"])
@pytest.mark.parametrize("fuse", [False, True])
def test_exports_say_how_they_are_sampled_and_have_whole_tensors(tmp_path, layout, fuse):
    options = {
        "chunk": 2,
        "first_frame_alone": True,
        "window": 7,
        "sink": 2,
        "reanchor": False,
        "steps_at": (1.0, 0.25),
    }
    spec = WanCausal(size=SIZE, shift=3.0, fuse_qkv=fuse, **options)
    module = spec.load(spec.build(), "cpu")
    folder = spec.export(module, tmp_path / "out", layout)
    again = WanCausal.from_pretrained(str(folder))
    assert again == WanCausal(size=SIZE, weights=str(folder), shift=3.0, **options)
    split = again.load(again.build(), "cpu").state_dict()
    plain = WanCausal(size=SIZE)
    assert all(
        torch.equal(tensor, split[name]) for name, tensor in plain.load(plain.build(), "cpu").state_dict().items()
    )


def test_fused_equals_split():
    split = network()
    spec = WanCausal(size=SIZE, fuse_qkv=True)
    fused = spec.build()
    from kinema.models.wan import layouts
    from kinema.models.weights import load_into

    load_into(fused, layouts.fused(split.state_dict().items()), "cpu")
    x, t, text = noise("x", 1, 6, 4, 4, 4), times("t", 1, 6), noise("text", 1, 9, 20)
    torch.testing.assert_close(fused(x, t, text=text), split(x, t, text=text), atol=1e-5, rtol=1e-5)


def test_bidirectional_weights_become_causal(tmp_path):
    wan = Wan(size=SIZE, shift=4.0, seed=3)
    folder = wan.export(wan.load(wan.build(), "cpu"), tmp_path / "wan", "diffusers")
    spec = WanCausal.from_pretrained(str(folder))
    assert (spec.shift, spec.chunks) == (4.0, Chunks(3))
    state = spec.load(spec.build(), "cpu").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in wan.load(wan.build(), "cpu").state_dict().items())


def test_adapters_of_a_causal_network_go_into_its_weights(tmp_path):
    spec = WanCausal(size=SIZE, chunk=2, edits=(LoRA(rank=2),))
    module = spec.load(spec.build(), "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.5, 0.25, generator=generator)
    assert len(lora.adapted(module)) == 2 * 2 * 4
    again = WanCausal.from_pretrained(str(spec.export(module, tmp_path / "out", "diffusers")))
    assert again.edits == () and again.chunk == 2
    x, t, text = noise("x", 1, 4, 4, 4, 4), times("t", 1, 4), noise("text", 1, 9, 20)
    whole = again.load(again.build(), "cpu")(x, t, text=text)
    torch.testing.assert_close(whole, module(x, t, text=text), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for _, layer in lora.adapted(module):
            layer.lora_B.zero_()
    assert not torch.allclose(whole, module(x, t, text=text), atol=1e-2)


def test_edits_of_what_is_fused_are_refused():
    with pytest.raises(UsageError, match="set fuse_qkv False"):
        WanCausal(size=SIZE, fuse_qkv=True, edits=(LoRA(rank=2),))
