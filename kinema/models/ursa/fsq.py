"""Finite scalar quantisation (arXiv 2309.15505): d bounded numbers, rounded to few levels each, are one code.

Code k has the digits k // (l_0·…·l_{j-1}) mod l_j. Quantising what `dequantise` gives is *not* the identity: the bound
is a tanh of what the encoder says, the digits are not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kinema.constants import constant


def quantise(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes `[...]` of an encoder's numbers `[..., d]`."""
    digits = bound(z, levels).round().long() + _row([level // 2 for level in levels], z.device)
    return (digits * _basis(levels, z.device)).sum(-1)


def dequantise(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """The numbers `[..., d]` a decoder reads, float32: digit / (l // 2) - 1, so even levels end before 1."""
    half = _row([level // 2 for level in levels], codes.device)
    return code_digits(codes, levels) / half - 1


def straight_through(z: Tensor, levels: Sequence[int]) -> Tensor:
    """`dequantise(quantise(z))` `[..., d]` whose gradient is that of the bound, as if nothing had been rounded."""
    bounded = bound(z, levels)
    half = _row([level // 2 for level in levels], z.device)
    return (bounded + (bounded.round() - bounded).detach()) / half


def bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """tanh(z + shift)·half - offset in float32 or wider: rounds to one of exactly l values for each of `[..., d]`."""
    halves = [(level - 1) * (1 + 1e-3) / 2 for level in levels]
    offsets = [0.5 if level % 2 == 0 else 0.0 for level in levels]
    shifts = [math.atanh(offset / half) for offset, half in zip(offsets, halves, strict=True)]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    half, offset, shift = (_row(row, z.device, z.dtype) for row in (halves, offsets, shifts))
    return torch.tanh(z + shift) * half - offset


def code_digits(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """`[..., d]` int64, digit j in 0 … l_j - 1."""
    return codes[..., None] // _basis(levels, codes.device) % _row(levels, codes.device)


def codebook(levels: Sequence[int]) -> Tensor:
    """The numbers of all codes, `[K, d]`. Many share a direction, which is all that a metric path looks at."""
    return dequantise(torch.arange(math.prod(levels)), levels)


def lifted(book: Tensor) -> Tensor:
    """`[K, d + 1]`: vectors on a sphere, by one more number, so that a metric path tells all codes apart.

    The distance of two of them is that of the originals plus what their norms differ in.
    """
    square = book.square().sum(-1, keepdim=True)
    return torch.cat([book, (square.max() - square).sqrt()], dim=-1)


def _basis(levels: Sequence[int], device: torch.device) -> Tensor:
    return _row([math.prod(levels[:j]) for j in range(len(levels))], device)


def _row(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`[d]`."""
    return _moved(tuple(numbers), device, dtype)


@constant
def _moved(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(numbers, device=device, dtype=dtype)
