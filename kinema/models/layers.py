"""Layers that several backbones share. They compute in at least float32 and round once, to the dtype they were given.

"Wide" is that dtype: float32 for bfloat16 and float32 inputs, float64 for float64 ones, so that twins can be exact.
Shapes: B batch, L tokens, N heads, D head dim, P = D/2 rotated pairs.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of matrix products with `weight`: autocast's where it is on (float64 it leaves alone), or its own."""
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


_fusing = False


def fuse(yes: bool) -> None:
    """Whether, in this process and on CUDA, each elementwise function of this file runs as a kernel generated for it,
    forwards and backwards: fewer passes over memory, and little to compile. Off at first."""
    global _fusing
    _fusing = yes


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as generated kernels: one program for all layers of one shape."""
    import torch._dynamo

    # A shape is a program until several have been seen: more of them than 8 come before that where frames, windows,
    # batches and passes with gradients are many.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels written by hand run there: on NVIDIA GPUs from Ampere on, of at most float32's width."""
    if device.type != "cuda" or torch.version.hip or wide(dtype) != torch.float32 or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def fusible(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs `function`, whose first argument is a tensor, as `fuse` says; within compiled code it becomes part of it."""

    @wraps(function)
    def run(x: Tensor, *args: Any) -> Tensor:
        if _fusing and x.is_cuda and not torch.compiler.is_compiling():
            return compiled(function)(x, *map(_vector, args))
        return function(x, *args)

    return run


def _vector(value: Any) -> Any:
    """`[1, .., 1, D]` as the `[D]` it broadcasts like.

    Where a generated backward sums a gradient over rows in the kernel that sums over columns (a norm's, from 4096 rows
    on), torch 2.11 returns it as `[D]` whatever its shape was, which autograd refuses. The view is made outside of what
    is compiled, so that `[D]` is right.
    """
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:-1].numel() == 1:
        return value.view(value.shape[-1:])
    return value


@fusible
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dim."""
    dtype = wide(x.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


@fusible
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The affine layer norm over the last dim."""
    dtype = wide(x.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last dim."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """The affine layer norm over the last dim."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class WideLinear(nn.Linear):
    """A linear layer computed wide whatever autocast or the weights say, for times, which bfloat16 blurs."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@fusible
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LN(x)(1 + scale) + shift, the norm without weights; scale and shift are wide."""
    dtype = wide(x.dtype)
    return (F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def modulated_affine_norm(x: Tensor, norm: LayerNorm, scale: Tensor, shift: Tensor) -> Tensor:
    """`norm`(x)(1 + scale) + shift, rounded once; scale and shift are wide."""
    dtype = wide(x.dtype)
    y = F.layer_norm(x.to(dtype), norm.weight.shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    return (y * (1 + scale) + shift).to(x.dtype)


@fusible
def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate · y, rounded once to the dtype of the residual stream x; gate is wide."""
    dtype = wide(x.dtype)
    return torch.addcmul(x.to(dtype), gate, y.to(dtype)).to(x.dtype)


def sinusoid(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embedding `[..., width]` of times `[...]`, layout [cos | sin], frequency i = 10000^(-2i/width).

    The angles, up to thousands of radians, are computed in float64; `dtype` only stores the result.
    """
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotary_widths(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are split over (time, row, column); 128 gives 44, 42, 42."""
    part = 2 * (head_dim // 6)
    return head_dim - 2 * part, part, part


def rotary(
    positions: Sequence[Tensor], widths: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin `[L, P]` of the rotary angles (arXiv 2104.09864) of a grid of tokens, the last axis running fastest.

    `positions[a]` `[n_a]` are the positions along axis a, any numbers; pair i of its `widths[a]` channels turns by
    position · 10000^(-2i/width). Angles are computed in float64 at each call: no table, so none that ends.
    """
    angles = []
    for axis, (position, width) in enumerate(zip(positions, widths, strict=True)):
        frequencies = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width)
        shape = [1] * len(positions) + [width // 2]
        shape[axis] = len(position)
        grid = [len(p) for p in positions] + [width // 2]
        angles.append((position.double()[:, None] * frequencies).view(shape).expand(grid))
    angle_LP = torch.cat(angles, dim=-1).flatten(0, -2)
    return angle_LP.cos().to(dtype), angle_LP.sin().to(dtype)


@fusible
def rotate(x_BNLD: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
    """Turns the channel pairs (2i, 2i+1) of `[B, N, L, D]` by the angles whose wide cos and sin are given."""
    a, b = x_BNLD.to(cos_LP.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos_LP - b * sin_LP, a * sin_LP + b * cos_LP], dim=-1).flatten(-2).to(x_BNLD.dtype)
