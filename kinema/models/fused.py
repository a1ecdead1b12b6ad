"""The elementwise work of a Wan block in as few passes over memory as there can be: each function below is one kernel,
or two, where it is compiled, and reads and writes every number once. Numbers are wide inside and rounded at the end.

They are plain functions. On CUDA those of `models.fused_kernels` take their places, or they are compiled by
`layers.compiled`: matrix products and attention stay the libraries' own, which nothing that is generated comes near to.
With `eight` they also quantise what the next product reads (`models.fp8`).
Shapes: B batch, L tokens, K times, D model dim, N heads, P rotated pairs; vectors of modulation are `[B, K, 1, D]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.models.fp8 import Rows, quantised
from kinema.models.layers import wide

Vector = Tensor  # [B, K, 1, D], wide
Operand = Tensor | Rows  # what a matrix product reads
GELU_DEPTH = 0.17005  # no more than this is GELU by tanh below 0


def modulated(x: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False) -> Operand:
    """LN(x)(1 + scale) + shift of `[B, L, D]`."""
    return _operand(_modulated(x.to(wide(x.dtype)), scale, shift, eps), x.dtype, eight)


def gated_affine(
    x: Tensor, gate: Vector, y: Tensor, weight: Tensor, bias: Tensor, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    """x + gate · y, and its affine layer norm."""
    x = _gated(x, gate, y)
    dtype = wide(x.dtype)
    norm = F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return x, _operand(norm, x.dtype, eight)


def added_modulated(
    x: Tensor, y: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    """x + y, and its modulated norm."""
    x = x + y
    return x, _operand(_modulated(x.to(wide(x.dtype)), scale, shift, eps), x.dtype, eight)


def gated_modulated(
    x: Tensor, gate: Vector, y: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    """x + gate · y, and its modulated norm: the end of one block and the beginning of the next."""
    x = _gated(x, gate, y)
    return x, _operand(_modulated(x.to(wide(x.dtype)), scale, shift, eps), x.dtype, eight)


def turned(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, k_to: Tensor, v_to: Tensor
) -> Tensor:
    """Queries `[B, L, N, D/N]` of `[B, L, 3D]`: normed over all heads together and rotated, cos and sin being `[L, P]`.

    Keys, done likewise, and values are written to `k_to` and `v_to` `[B, L, N, D/N]`, places in a cache.
    """
    q, k, v = (part.unflatten(-1, k_to.shape[2:]) for part in qkv.chunk(3, dim=-1))
    k_to.copy_(_turned(k, weight_k, cos, sin, eps))
    v_to.copy_(v)
    return _turned(q, weight_q, cos, sin, eps)


def activated(x: Tensor, eight: bool = False) -> Operand:
    """GELU by tanh.

    GELU rises wherever it is above its depth of 0.1701, so a row's greatest number is GELU of the row's greatest, or
    less than that depth: to find the scale of eight bits no GELU has to be computed, and all are computed once.
    """
    wide_x = x.to(wide(x.dtype))
    if eight:
        return quantised(_gelu(wide_x), _gelu(wide_x.amax(-1, keepdim=True)).clamp(min=GELU_DEPTH))
    return _gelu(wide_x).to(x.dtype)


def as_operand(x: Tensor, eight: bool = False) -> Operand:
    """What a matrix product reads of a tensor that needs nothing else done to it."""
    return _operand(x, x.dtype, eight)


def _gelu(x: Tensor) -> Tensor:
    """½ (1 + tanh u) is 1 / (1 + exp(-2u)), which costs a GPU one exponential instead of tanh's several branches."""
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def _turned(x_BLND: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    dtype = cos.dtype
    x = x_BLND.to(dtype)
    x = x * (x.square().mean((-1, -2), keepdim=True) + eps).rsqrt() * weight.to(dtype).view(x.shape[-2:])
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BLND.dtype)


def _modulated(x: Tensor, scale: Vector, shift: Vector, eps: float) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))
    return (x * (1 + scale) + shift).flatten(1, 2)


def _gated(x: Tensor, gate: Vector, y: Tensor) -> Tensor:
    dtype, times = wide(x.dtype), gate.shape[1]
    x, y, kind = x.unflatten(1, (times, -1)), y.unflatten(1, (times, -1)), x.dtype
    return torch.addcmul(x.to(dtype), gate, y.to(dtype)).to(kind).flatten(1, 2)


def _operand(x: Tensor, dtype: torch.dtype, eight: bool) -> Operand:
    return quantised(x) if eight else x.to(dtype)
