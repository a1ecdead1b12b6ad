"""Matrix products in 8-bit floating point (e4m3) for inference: each row of both operands has its own scale.

Rows of weights are quantised once; rows of activations where they are made, in the kernel that makes them. Their
rounding error is up to 1/16 of a number, at random, so a product is off by some 3 to 4 % of its own standard deviation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GREATEST = 448.0  # of e4m3


class Rows(NamedTuple):
    """A matrix `[..., D]` whose row r is `scale[r] · numbers[r]`; `scale` is `[..., 1]` float32."""

    numbers: Tensor
    scale: Tensor


def quantised(x: Tensor, greatest: Tensor | None = None) -> Rows:
    """Each row divided so that its greatest number is the greatest there is.

    `greatest` `[..., 1]` is the row's greatest number, or one that is not less, where it is known without looking.
    """
    x = x.float()
    greatest = x.abs().amax(-1, keepdim=True) if greatest is None else greatest.float()
    scale = greatest.clamp(min=1e-12) / GREATEST
    return Rows((x / scale).clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn), scale)


def linear(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """`F.linear` of quantised rows and a quantised weight `[out, D]`, in the bias's dtype.

    On CUDA it is one kernel, which needs bfloat16 and rows and columns in multiples of 16; elsewhere the same numbers
    are multiplied in float32.
    """
    if not x.numbers.is_cuda:
        wide = F.linear(x.numbers.float(), weight.numbers.float()) * x.scale * weight.scale.T
        return (wide + bias.float()).to(bias.dtype)
    flat = x.numbers.flatten(0, -2)
    scales = x.scale.flatten(0, -2), weight.scale.T
    made = torch.ops.aten._scaled_mm(flat, weight.numbers.T, *scales, bias, None, bias.dtype, True)  # fast accumulation
    return made.unflatten(0, x.numbers.shape[:-1])
