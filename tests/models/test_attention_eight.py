"""Attention in 8 bits: its plain functions are attention but for rounding, its kernels are the plain functions.

The kernels are run as `test_fused_kernels.py` says; in the interpreter what is 8 bits wide is float32 and exact.
"""

from inspect import signature

import on_triton
import pytest
import torch
from tiny_causal import noise

from kinema.models import attention, attention_eight
from kinema.models.attention_eight import BLOCK, attend_eight, in_parts, keep, room, rounded, span_of

GPU = on_triton.GPU
SIZES = pytest.mark.parametrize(
    ("batch", "heads", "tokens", "keys", "head_dim"),
    [(2, 3, 130, 300, 16), (1, 2, 128, 256, 32), (1, 1, 5, 7, 24), (1, 2, 70, 513, 128)],
)


def given(name, *shape, dtype=torch.float32):
    return noise(name, *shape).to(dtype).to("cuda" if GPU else "cpu")


def kept(k, v, slots=None):
    """Keys and values in a ring of so many slots."""
    ring = room(k if slots is None else k.new_empty(k.shape[0], slots, *k.shape[2:]))
    keep(k, v, ring[0][:, : k.shape[1]], ring[1][..., : k.shape[1]])
    return ring


def exact(q, k, v):
    return attention.attend(*(x.double().transpose(1, 2) for x in (q, k, v)))


@pytest.fixture
def unrounded(monkeypatch):
    monkeypatch.setattr(attention_eight, "EIGHT", torch.float32)


@SIZES
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_attention_but_for_rounding(unrounded, batch, heads, tokens, keys, head_dim, parts):
    q, k, v = (given(name, batch, n, heads, head_dim) for name, n in (("q", tokens), ("k", keys), ("v", keys)))
    each = span_of(keys, parts)
    out, normaliser = in_parts(rounded(q), *kept(k, v), parts, q.dtype)
    assert len(out) == len(normaliser) == -(-keys // each) <= parts and each % BLOCK == 0
    made = attention.put_together(out, normaliser, q.transpose(1, 2)[:, :, :0])
    torch.testing.assert_close(made.double(), exact(q, k, v), atol=1e-5, rtol=1e-5)


def test_what_is_seen_is_what_is_attended_to_and_the_last_queries_may_be_apart(unrounded, monkeypatch):
    q, k, v = (given(name, 1, n, 2, 32) for name, n in (("q", 300), ("k", 6000), ("v", 6000)))
    ring = kept(k, v)
    for seen in (((0, 6000),), ((0, 130),), ((256, 700),), ((0, 100), (300, 401))):
        places = torch.cat([torch.arange(a, b) for a, b in seen]).to(k.device)
        made = attend_eight(q, *ring, seen, processors=0)
        assert made.dtype == q.dtype
        torch.testing.assert_close(made.double(), exact(q, k[:, places], v[:, places]), atol=1e-5, rtol=1e-5)
    looked, plain = [], attention_eight.in_parts
    monkeypatch.setattr(attention_eight, "in_parts", lambda q, *rest: looked.append(q.shape[1]) or plain(q, *rest))
    made = attend_eight(q, *ring, ((0, 6000),), processors=5)
    torch.testing.assert_close(made.double(), exact(q, k, v), atol=1e-5, rtol=1e-5)
    assert looked == [256, 44]


def test_rounding_changes_little_and_what_is_too_great_is_cut_off():
    q, k, v = (given(name, 1, n, 4, 128) for name, n in (("q", 64), ("k", 1000), ("v", 1000)))
    plain = attention.attend(*(x.transpose(1, 2) for x in (q, k, v)))
    off = attend_eight(q, *kept(k, v), ((0, 1000),)) - plain
    assert 0.005 < off.std() / plain.std() < 0.06
    assert rounded(torch.tensor([1e6, -1e6, 1.0])).tolist() == [448, -448, 1]
    assert room(k.new_empty(1, 130, 2, 8))[1].stride(2) == 256


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    from kinema.models import attention_kernels

    if not GPU:
        monkeypatch.setattr(attention_eight, "EIGHT", torch.float32)
    return attention_kernels


def on_triton_only(test):
    for mark in reversed(on_triton.marks):
        test = mark(test)
    return test


@on_triton_only
@SIZES
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_kernel_is_the_plain_function(kernels, batch, heads, tokens, keys, head_dim, parts):
    q, k, v = (given(name, batch, n, heads, head_dim) for name, n in (("q", tokens), ("k", keys), ("v", keys)))
    ring = kept(k, v, keys + 40)
    if GPU:  # what is not seen must not be read
        ring[1].view(torch.uint8)[..., keys:] = 127
    else:
        ring[1][..., keys:] = torch.nan
    args = rounded(q), ring[0][:, :keys], ring[1][..., :keys], parts, torch.float32
    (out, normaliser), (expected, log) = kernels.in_parts(*args), in_parts(*args)
    assert out.shape == expected.shape and out[0].transpose(1, 2).is_contiguous()
    off = out.float() - expected.float()
    assert off.std() < (0.03 if GPU else 1e-6) * expected.std()  # on a GPU weights are rounded at other maxima
    torch.testing.assert_close(normaliser, log, atol=1e-3 if GPU else 2e-6, rtol=1e-5)


@on_triton_only
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(2, 70, 3, 24), (1, 5, 2, 128)])
def test_kernels_keep_what_the_plain_functions_keep_and_nothing_else(kernels, batch, tokens, heads, head_dim):
    dtype = torch.bfloat16 if GPU else torch.float32
    k, v = (given(name, batch, tokens, heads, head_dim, dtype=dtype) * 200 for name in "kv")
    found = []
    for function in (kernels.keep, keep):
        ring = room(k.new_empty(batch, tokens + 9, heads, head_dim))
        for x in ring:
            x.copy_(torch.full(x.shape, 7.0))
        function(k, v, ring[0][:, 3 : 3 + tokens], ring[1][..., 3 : 3 + tokens])
        found.append([x.float() for x in ring])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kernels.rounded(k).float(), rounded(k).float()) and k.abs().max() > 448


@on_triton_only
def test_each_kernel_can_be_called_as_its_function(kernels):
    for function, kernel in kernels.KERNELS.items():
        assert function.__name__ == kernel.__name__ and signature(function) == signature(kernel)
