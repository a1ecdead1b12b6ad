"""Randomness as a pure function: every draw is computed from the run's seed, the sample it belongs to and a name.

There are no generators and so no generator state: a draw is the counter-based stream splitmix64(key + i·gamma)
(Steele, Lea, Flood 2014; the gaussians by Box-Muller), computed with integer tensor operations. The same key gives the
same numbers on any device (up to the rounding of log and cos), in any batch, on any number of ranks, before and after a
resume. Naming another stream with `fold` never shifts an existing one.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: splitmix64's increment


def key_of(*words: int | str) -> int:
    """A signed 64-bit key from a path of numbers and names, for example `key_of(seed, "data", 3)`."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def shared(n: int, *words: int | str) -> int:
    """A number in 0..n-1 that every rank computes alike, for example which denoising step a rollout stops at."""
    return key_of("shared", *words) % n


class Draw(Protocol):
    """Where the pure mathematics of `kinema.diffusion` gets its random numbers from; one row per sample of a batch."""

    @property
    def place(self) -> Tensor: ...  # [B] int64: each sample's place in the global batch of the optimizer step
    @property
    def count(self) -> int: ...  # how many samples that global batch has
    @property
    def shared(self) -> int: ...  # a key equal for all of them, on all ranks

    def fold(self, name: int | str) -> "Draw": ...
    def uniform(self, *shape: int) -> Tensor: ...
    def normal(self, *shape: int) -> Tensor: ...
    def integers(self, high: int, *shape: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Keys:
    """One 64-bit key per row. `uniform(3, 4)` is `[B, 3, 4]` float32 in [0, 1); `normal` likewise; `fold` names a
    stream."""

    key: Tensor  # [B] int64
    place: Tensor  # [B] int64
    count: int
    shared: int

    def fold(self, name: int | str) -> "Keys":
        """The keys of a sub-stream: independent of this one and of every other name."""
        salt = key_of("fold", name)
        return Keys(_mix(self.key ^ salt), self.place, self.count, key_of(self.shared, name))

    def bits(self, *shape: int) -> Tensor:
        """`[B, *shape]` int64, all 64 bits random."""
        counter = torch.arange(1, math.prod(shape) + 1, device=self.key.device) * _signed(GAMMA)
        return _mix(self.key[:, None] + counter).unflatten(1, shape) if shape else _mix(self.key + _signed(GAMMA))

    def uniform(self, *shape: int) -> Tensor:
        return ((self.bits(*shape) >> 40) & 0xFFFFFF).float() * 2.0**-24  # 24 bits: what a float32 below 1 can hold

    def normal(self, *shape: int) -> Tensor:
        bits = self.bits(*shape)
        radius = torch.sqrt(-2 * torch.log(((bits & 0xFFFFFFFF).float() + 0.5) * 2.0**-32))
        return radius * torch.cos(((bits >> 32) & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32))

    def integers(self, high: int, *shape: int) -> Tensor:
        """`[B, *shape]` int64 in 0..high-1 (bias below high / 2^63)."""
        return (self.bits(*shape) & 0x7FFFFFFFFFFFFFFF) % high

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, rows: slice | Tensor) -> "Keys":
        return Keys(self.key[rows], self.place[rows], self.count, self.shared)


def keys(
    seed: int,
    name: str,
    samples: Sequence[int] | Tensor,
    places: Sequence[int] | Tensor | None = None,
    count: int = 0,
    device: torch.device | str = "cpu",
) -> Keys:
    """Keys of the stream `name` for the given sample numbers.

    `places` are the samples' places in the global batch and `count` its size; by default the samples are a batch of
    their own. A training sample's number n = step · batch_size + place names its step and micro-batch too, so every
    visit
    of a clip draws anew although the key holds nothing else.
    """
    index = torch.as_tensor(samples, dtype=torch.int64, device=device)
    place = torch.arange(len(index), device=device) if places is None else torch.as_tensor(places, device=device)
    count = count or len(index)
    base = key_of(seed, name)
    step = int(samples[0]) // count if len(samples) else 0
    return Keys(_mix(_mix(index * _signed(GAMMA)) ^ base), place, count, key_of("shared", seed, name, step))


def permutation(n: int, *words: int | str) -> Tensor:
    """A permutation of 0..n-1 `[n]` int64 that every rank computes alike."""
    order = Keys(torch.tensor([key_of("permutation", *words)]), torch.zeros(1, dtype=torch.int64), 1, 0).bits(n)[0]
    return torch.argsort(order, stable=True)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer; torch shifts int64 arithmetically, so the sign bits that come in are masked away."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
