"""What only a GPU can show of the mixers: their kernels against the PyTorch path, bfloat16, and passes that wait for
nothing."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize
from kinema.models.ttt import door, large_chunk, scan
from kinema.models.ttt.edit import KINDS, TTT
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP
from kinema.recipes.sprites_ttt import KINDS as SPRITES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SIZE = CogVideoXSize(heads=4, layers=2, time_dim=64, text_dim=32, text_tokens=16, grid=(5, 16, 16))
TINY = replace(SIZE, heads=5, head_dim=32)


def noise(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, generator=generator).cuda()


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


@pytest.mark.parametrize(("b", "steps", "d"), [(16, 37, 64), (64, 5, 64), (64, 33, 64), (64, 33, 32)])
def test_kernel_of_ttt_mlp_is_the_scan_in_float32(b, steps, d):
    from kinema.models.ttt import kernels

    made, gradients = scanned(kernels.scan, torch.float32, b, steps, d)
    exact, true = scanned(scan.scan, torch.float64, b, steps, d)
    assert max(apart(x, y) for x, y in zip(made, exact, strict=True)) < 1e-4
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < 1e-3


def test_kernel_of_ttt_mlp_may_be_recomputed():
    from kinema.models.ttt import kernels

    again = partial(checkpoint, kernels.scan, use_reentrant=False)
    plain, recomputed = (scanned(path, torch.float32, 64, 33) for path in (kernels.scan, again))
    for x, y in zip(plain[1], recomputed[1], strict=True):
        assert torch.equal(x, y)


def test_kernel_of_ttt_mlp_takes_bfloat16_streams():
    from kinema.models.ttt import kernels

    made, gradients = scanned(kernels.scan, torch.bfloat16, 64, 21)
    plain, true = scanned(scan.scan, torch.bfloat16, 64, 21)
    # both round the output to bfloat16, so of it only the states are compared as closely as they are computed
    assert max(apart(x, y) for x, y in zip(made[1:], plain[1:], strict=True)) < 1e-3
    assert apart(made[0], plain[0]) < 3e-3
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < 1e-2


def test_kernel_is_compiled_once_for_all_lengths():
    from kinema.models.ttt import kernels

    scanned(kernels.scan, torch.float32, 64, 17)
    compiled = [len(cache[0]) for cache in kernels._forward.device_caches.values()]
    scanned(kernels.scan, torch.float32, 64, 31)
    scanned(kernels.scan, torch.float32, 64, 16)
    assert [len(cache[0]) for cache in kernels._forward.device_caches.values()] == compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_lact_is_the_plain_one(dtype):
    from kinema.models.ttt import lact_kernels

    m, groups = 192, (1100, 900, 1000)
    streams = [noise(name, 2, 2, sum(groups), m).to(dtype) for name in "qkv"]
    eta = 1e-3 * noise("rate", 2, 2, sum(groups), 3).sigmoid()
    state = [m**-0.5 * noise(f"w{n}", 2, 2, m, m) for n in range(3)]
    results = []
    for fused in (None, (lact_kernels.learned, lact_kernels.read)):
        leaves = [x.clone().requires_grad_() for x in (*streams, eta, *state)]
        lengths = large_chunk.lengths_of(tuple(leaves[4:]))
        out, last = large_chunk.scan(*leaves[:4], tuple(leaves[4:]), lengths, groups, fused)
        loss = (out * noise("loss", *out.shape).to(dtype)).sum() + sum((w * noise("w", *w.shape)).sum() for w in last)
        results.append(([out.detach(), *last], torch.autograd.grad(loss, leaves)))
    (plain, true), (made, gradients) = results
    forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (6e-3, 2e-2)  # of bfloat16 products
    assert max(apart(x.detach(), y.detach()) for x, y in zip(made, plain, strict=True)) < forward
    assert max(apart(x, y) for x, y in zip(gradients, true, strict=True)) < backward


def network(mixer, size: CogVideoXSize = SIZE):
    spec = CogVideoX(size, edits=(TTT(mixer),))
    module = spec.load(spec.build(), torch.device("cuda"))
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.05 * noise(name, *p.shape) + float("norm" in name and name.endswith("weight")))
    return module


def inputs(segments: int):
    return noise("x", 1, 4 * segments + 1, 16, 16, 16), torch.tensor([[500.0]]).cuda(), noise("t", 1, segments, 16, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_train_in_bfloat16_without_waiting(kind):
    module = network(KINDS[kind]())
    x, t, text = inputs(3)
    valid = torch.arange(16, device="cuda").expand(1, 3, 16) < 11

    def step():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            out = module(x, t, text=text, valid=valid)
        out.float().square().mean().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("mixer", "size"),
    [
        (TTTMLP(), SIZE),
        (TTTMLP(passes="parallel", order="segments"), SIZE),
        (LaCT(heads=2), SIZE),
        (SPRITES["ttt_mlp"], TINY),
        (SPRITES["lact"], TINY),
    ],
)
def test_whole_networks_agree_with_the_torch_path(mixer, size):
    module = network(mixer, size)
    x, t, text = inputs(3)
    made = []
    for path in ("auto", "torch"):
        door.prefer(path)
        try:
            with torch.no_grad():
                made.append(module(x, t, text=text))
        finally:
            door.prefer("auto")
    assert apart(*made) < 1e-3
