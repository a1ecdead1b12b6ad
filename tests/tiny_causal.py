"""A causal Wan of two layers with every weight random, for tests of models, rollouts and streams."""

from typing import Any

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.transformer import WanSize

SIZE = WanSize(
    dim=48, ffn_dim=64, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=20, text_len=12, freq_dim=32
)


def network(dtype: torch.dtype = torch.float32, size: WanSize = SIZE, **spec) -> WanCausalTransformer:
    """Of this spec, in any dtype: in float64 twins are equal to 1e-12, so that a wrong frame cannot hide."""
    described = WanCausal(size=size, **spec)
    return randomised(described.load(described.build(), "cpu")).to(dtype)


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """With every tensor random, those that start at zero or one too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(float("norm" in name and name.endswith("weight")), 0.25, generator=generator)
    return module


def noise(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers `[*shape]` that the name alone decides."""
    return seeds.keys(0, name, [0]).normal(*shape)[0].to(dtype)


def times(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network times in 0 … 1000."""
    return 1000 * seeds.keys(0, name, [0]).uniform(*shape)[0].to(dtype)


def by_chunks(
    module: WanCausalTransformer, x: Tensor, t: Tensor, lengths: tuple[int, ...], cache, text, **more
) -> Tensor:
    """The cached twin of a masked forward: each chunk is evaluated and written noisy as it is."""
    made, begin = [], 0
    for n in lengths:
        part = slice(begin, begin + n)
        made.append(module(x[:, part], t[:, part], text=text, cache=cache, **more))
        with torch.no_grad():
            module(x[:, part], t[:, part], text=text, cache=cache, write=True, **more)
        begin += n
    return torch.cat(made, dim=1)
