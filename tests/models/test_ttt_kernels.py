"""The kernels of the mixers are the PyTorch path: on a GPU or, at small sizes and in float32, in Triton's interpreter
(`make kernels`)."""

from functools import partial

import on_triton
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kinema.models.ttt import large_chunk, scan

GPU = on_triton.GPU
SCANS = [(16, 37, 64), (64, 5, 64), (64, 33, 64), (64, 33, 32)] if GPU else [(16, 3, 32), (32, 2, 16)]
needs_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU")
pytestmark = on_triton.marks


def noise(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    made = torch.randn(*shape, generator=generator)
    return made.cuda() if GPU else made


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def scanned(path, dtype: torch.dtype, b: int, steps: int, d: int = 64):
    """Outputs and last state, then all gradients, of a scan with a loss on both."""
    length, heads = b * steps, 3
    streams = [noise(name, 2, heads, length, d) for name in ("q", "k", "target")]
    streams[1] = F.normalize(streams[1], dim=-1)
    eta = 0.1 / d / 64 * noise("eta", 2, heads, length).sigmoid()
    state = [
        0.02 * noise(f"s{n}", 2, heads, *shape) for n, shape in enumerate([(d, 4 * d), (1, 4 * d), (4 * d, d), (1, d)])
    ]
    norm = [1 + 0.1 * noise("weight", heads, d), 0.1 * noise("bias", heads, d)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [x.to(torch.bfloat16 if dtype == torch.bfloat16 else dtype) for x in streams]
    leaves = [x.detach().requires_grad_() for x in [*given, *(x.to(wide) for x in [eta, *state, *norm])]]
    out, last = path(*leaves[:4], tuple(leaves[4:8]), (leaves[8], leaves[9]), b)
    loss = (out * noise("loss", *out.shape).to(out.dtype)).sum() + sum((w * noise("w", *w.shape)).sum() for w in last)
    return [out.detach(), *(w.detach() for w in last)], list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("b", "steps", "d"), [(16, 37, 64), (64, 5, 64), (64, 33, 64), (64, 33, 32)] if GPU else [(16, 3, 32), (32, 2, 16)]
)
def test_kernel_of_ttt_mlp_is_the_scan_in_float32(b, steps, d):
    from kinema.models.ttt import kernels

    made, gradients = scanned(kernels.scan, torch.float32, b, steps, d)
    exact, true = scanned(scan.scan, torch.float64, b, steps, d)
    assert max(apart(x, y) for x, y in zip(made, exact, strict=True)) < 1e-4
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < 1e-3


def test_kernel_of_ttt_mlp_may_be_recomputed():
    from kinema.models.ttt import kernels

    again = partial(checkpoint, kernels.scan, use_reentrant=False)
    sizes = (64, 33, 64) if GPU else (16, 5, 16)
    plain, recomputed = (scanned(path, torch.float32, *sizes) for path in (kernels.scan, again))
    for x, y in zip(plain[1], recomputed[1], strict=True):
        assert torch.equal(x, y)


@needs_gpu  # the interpreter cuts bfloat16 off
def test_kernel_of_ttt_mlp_takes_bfloat16_streams():
    from kinema.models.ttt import kernels

    made, gradients = scanned(kernels.scan, torch.bfloat16, 64, 21)
    plain, true = scanned(scan.scan, torch.bfloat16, 64, 21)
    # both round the output to bfloat16, so of it only the states are compared as closely as they are computed
    assert max(apart(x, y) for x, y in zip(made[1:], plain[1:], strict=True)) < 1e-3
    assert apart(made[0], plain[0]) < 3e-3
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < 1e-2


@needs_gpu
def test_kernel_is_compiled_once_for_all_lengths():
    from kinema.models.ttt import kernels

    scanned(kernels.scan, torch.float32, 64, 17)
    compiled = [len(cache[0]) for cache in kernels._forward.device_caches.values()]
    scanned(kernels.scan, torch.float32, 64, 31)
    scanned(kernels.scan, torch.float32, 64, 16)
    assert [len(cache[0]) for cache in kernels._forward.device_caches.values()] == compiled


@pytest.mark.parametrize("groups", [(11, 9, 10), (30,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if GPU else [torch.float32])
def test_fused_lact_is_the_plain_one(dtype, groups, monkeypatch):
    from kinema.models.ttt import lact_kernels

    m, scale = (192, 100) if GPU else (24, 1)
    groups = tuple(scale * n for n in groups)
    monkeypatch.setattr(large_chunk, "PIECE", 13 * scale)
    streams = [noise(name, 2, 2, sum(groups), m).to(dtype) for name in "qkv"]
    eta = 1e-3 * noise("rate", 2, 2, sum(groups), 3).sigmoid()
    state = [m**-0.5 * noise(f"w{n}", 2, 2, m, m) for n in range(3)]
    results = []
    for fused in (None, (lact_kernels.step, lact_kernels.read)):
        leaves = [x.clone().requires_grad_() for x in (*streams, eta, *state)]
        lengths = large_chunk.lengths_of(tuple(leaves[4:]))
        out, last = large_chunk.scan(*leaves[:4], tuple(leaves[4:]), lengths, groups, fused)
        loss = (out * noise("loss", *out.shape).to(dtype)).sum() + sum((w * noise("w", *w.shape)).sum() for w in last)
        results.append(([out.detach(), *last], torch.autograd.grad(loss, leaves)))
    (plain, true), (made, gradients) = results
    forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (6e-3, 2e-2)  # of bfloat16 products
    assert max(apart(x.detach(), y.detach()) for x, y in zip(made, plain, strict=True)) < forward
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < backward
