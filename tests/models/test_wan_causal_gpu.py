"""What only a GPU can show of the causal Wan: its masked kernel, bfloat16, and passes that wait for nothing."""

import pytest
import torch
from tiny_causal import by_chunks, network, noise, times

from kinema.models.causality import ChunkedAttention, Sight, Window, block_mask, causal_attention
from kinema.models.wan.transformer import WanSize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SIZE = WanSize(
    dim=256, ffn_dim=512, heads=2, layers=2, in_channels=16, out_channels=16, text_dim=32, text_len=64, freq_dim=64
)
OPTIONS = [{}, {"window": 6}, {"window": 6, "sink": 1, "reanchor": False}, {"window": 6, "sink": 1}]


def inputs(frames, dtype=torch.float32):
    x, t = noise("x", 1, frames, 16, 16, 16), times("t", 1, frames)
    return x.cuda().to(dtype), t.cuda(), noise("text", 1, 20, 32).cuda().to(dtype)


@pytest.mark.parametrize("tokens", [24, 64, 128])
@pytest.mark.parametrize("clean", [False, True])
def test_masked_kernel_equals_one_attention_for_each_chunk_with_gradients(tokens, clean):
    sight, device = Sight((3, 3, 3, 3), Window(9, sink=2, reanchor=False), clean), torch.device("cuda")
    length = sight.frames * (1 + clean) * tokens
    results = []
    for attention in (
        causal_attention(sight, tokens, 64, device, torch.float32),
        ChunkedAttention(sight, tokens, 64, device, torch.float32),
    ):
        q, k, v = (noise(name, 1, 2, length, 64).cuda().requires_grad_() for name in "qkv")
        out = attention(q, k, v)
        (out * noise("weight", *out.shape).cuda()).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)  # both may use TF32
    assert block_mask(sight, tokens, device) is block_mask(sight, tokens, device)


@pytest.mark.parametrize("options", OPTIONS)
def test_cached_equals_masked_in_bfloat16(options):
    module = network(torch.bfloat16, SIZE, **options).cuda()
    x, t, text = inputs(12, torch.bfloat16)
    with torch.no_grad():
        masked = module(x, t, text=text)
        cached = by_chunks(module, x, t, (3,) * 4, module.new_cache(12), text)
    assert (cached - masked).float().std() < 2e-2 * masked.float().std()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_pass_waits_for_nothing(options):
    module = network(torch.bfloat16, SIZE, **options).cuda()
    x, t, text = inputs(12, torch.bfloat16)
    with torch.no_grad():
        cache = module.new_cache(12)
        by_chunks(module, x[:, :6], t[:, :6], (3, 3), cache, text)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            by_chunks(module, x[:, 6:], t[:, 6:], (3, 3), cache, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
