"""What only a GPU can show of the mixers: their kernels against the PyTorch path, bfloat16, and passes that wait for
nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize
from kinema.models.ttt import door
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
        (LaCT(heads=2, group="segment"), SIZE),
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
