"""LaCT's update with what lies between its matrix products fused by Triton, forward and backward, for NVIDIA GPUs.

The products are cuBLAS's, of bfloat16 operands; the state stays float32. `large_chunk.py` is what this is checked
against.

Shapes: R rows (all heads' tokens), h hidden width.
"""

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from kinema.models.triton_numbers import load, store
from kinema.models.ttt.replay import State


def step(state: State, k: Tensor, v: Tensor, eta: Tensor) -> State:
    """`large_chunk.step`; k and v are in the dtype of the products."""
    W0, W1, W2 = (w.to(k.dtype) for w in state)
    n, d0, d2 = _Between.apply(k @ W0, k @ W2, v @ W1.mT, eta)  # type: ignore[misc]
    return k.mT @ d0, n.mT @ v, k.mT @ d2


def read(state: State, q: Tensor) -> Tensor:
    """`large_chunk.read`."""
    W0, W1, W2 = (w.to(q.dtype) for w in state)
    return _Gated.apply(q @ W0, q @ W2) @ W1  # type: ignore[operator]


class _Between(torch.autograd.Function):
    """From a = K W0, e = K W2, dn = V W1ᵀ and the rates `[…, 3]`: silu(a) e, and the gradients of a and of e, each
    times its rate."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, e: Tensor, dn: Tensor, eta: Tensor):
        a, e, dn, eta = (x.contiguous() for x in (a, e, dn, eta))
        ctx.save_for_backward(a, e, dn, eta)
        made = tuple(torch.empty_like(a) for _ in range(3))
        width = a.shape[-1]
        _launch(_between, a.numel() // width)(a, e, dn, eta, *made, width, triton.next_power_of_2(width))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        a, e, dn, eta = ctx.saved_tensors
        width = a.shape[-1]
        made = tuple(torch.empty_like(x) for x in (a, e, dn, eta))
        given = (g.contiguous() for g in grads)
        _launch(_between_back, a.numel() // width)(a, e, dn, eta, *given, *made, width, triton.next_power_of_2(width))
        return made


class _Gated(torch.autograd.Function):
    """silu(a) e."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, e: Tensor):
        a, e = a.contiguous(), e.contiguous()
        ctx.save_for_backward(a, e)
        out = torch.empty_like(a)
        _launch(_gated, triton.cdiv(a.numel(), 1024))(a, e, out, a.numel(), 1024)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        a, e = ctx.saved_tensors
        made = torch.empty_like(a), torch.empty_like(e)
        _launch(_gated_back, triton.cdiv(a.numel(), 1024))(a, e, grad.contiguous(), *made, a.numel(), 1024)
        return made


def _launch(kernel: Any, programs: int) -> Any:
    return kernel[(programs,)]


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _silu(x):
    """silu, its first and its second derivative."""
    s = 1 / (1 + tl.exp(-x))
    return x * s, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


@triton.jit
def _rates(ptr):
    return tl.load(ptr).to(tl.float32), tl.load(ptr + 1).to(tl.float32), tl.load(ptr + 2).to(tl.float32)


@triton.jit
def _between(a_ptr, e_ptr, dn_ptr, eta_ptr, n_ptr, d0_ptr, d2_ptr, width, WIDE: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    at, inside = row * width + col, col < width
    a, e, dn = load(a_ptr, at, inside), load(e_ptr, at, inside), load(dn_ptr, at, inside)
    r0, r1, r2 = _rates(eta_ptr + row * 3)
    gate, slope, _ = _silu(a)
    store(n_ptr, at, inside, r1 * gate * e)
    store(d0_ptr, at, inside, r0 * dn * e * slope)
    store(d2_ptr, at, inside, r2 * dn * gate)


@triton.jit
def _between_back(
    a_ptr, e_ptr, dn_ptr, eta_ptr, gn_ptr, g0_ptr, g2_ptr, da_ptr, de_ptr, ddn_ptr, deta_ptr, width, WIDE: tl.constexpr
):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    at, inside = row * width + col, col < width
    a, e, dn = load(a_ptr, at, inside), load(e_ptr, at, inside), load(dn_ptr, at, inside)
    gn, g0, g2 = load(gn_ptr, at, inside), load(g0_ptr, at, inside), load(g2_ptr, at, inside)
    r0, r1, r2 = _rates(eta_ptr + row * 3)
    gate, slope, curve = _silu(a)
    store(da_ptr, at, inside, r1 * gn * e * slope + r0 * g0 * dn * e * curve + r2 * g2 * dn * slope)
    store(de_ptr, at, inside, r1 * gn * gate + r0 * g0 * dn * slope)
    store(ddn_ptr, at, inside, r0 * g0 * e * slope + r2 * g2 * gate)
    tl.store(deta_ptr + row * 3, tl.sum(g0 * dn * e * slope, 0).to(deta_ptr.dtype.element_ty))
    tl.store(deta_ptr + row * 3 + 1, tl.sum(gn * gate * e, 0).to(deta_ptr.dtype.element_ty))
    tl.store(deta_ptr + row * 3 + 2, tl.sum(g2 * dn * gate, 0).to(deta_ptr.dtype.element_ty))


@triton.jit
def _gated(a_ptr, e_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate, _, _ = _silu(load(a_ptr, at, inside))
    store(out_ptr, at, inside, gate * load(e_ptr, at, inside))


@triton.jit
def _gated_back(a_ptr, e_ptr, g_ptr, da_ptr, de_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate, slope, _ = _silu(load(a_ptr, at, inside))
    g = load(g_ptr, at, inside)
    store(da_ptr, at, inside, g * load(e_ptr, at, inside) * slope)
    store(de_ptr, at, inside, g * gate)
