"""`models.fused` and `attention.put_together` as Triton kernels, for NVIDIA GPUs: one program holds one row.

What is generated for these functions reads rows twice or takes several kernels; here every number is read and written
once. Results are rounded where those of the plain functions are. Numbers are float32 inside: tensors are of at most
that width, and neither their gradients nor other devices are provided for.
Shapes: as in `fused.py`; R rows are all tokens of all videos.
"""

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from kinema.models import attention, fused
from kinema.models.fp8 import GREATEST, Rows
from kinema.models.fused import Operand, Vector
from kinema.models.triton_numbers import load, store

EIGHT = torch.float8_e4m3fn


def modulated(x: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False) -> Operand:
    return _norm(x, None, None, scale, shift, eps, eight)[1]


def gated_affine(
    x: Tensor, gate: Vector, y: Tensor, weight: Tensor, bias: Tensor, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    return _norm(x, y, gate, weight, bias, eps, eight)


def added_modulated(
    x: Tensor, y: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    return _norm(x, y, None, scale, shift, eps, eight)


def gated_modulated(
    x: Tensor, gate: Vector, y: Tensor, scale: Vector, shift: Vector, eps: float, eight: bool = False
) -> tuple[Tensor, Operand]:
    return _norm(x, y, gate, scale, shift, eps, eight)


def turned(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, k_to: Tensor, v_to: Tensor
) -> Tensor:
    batch, tokens, width = *qkv.shape[:2], qkv.shape[2] // 3
    rows, wide = _rows(qkv), triton.next_power_of_2(width)
    q = qkv.new_empty(k_to.shape)
    k, v = (place.view(batch, tokens, width) for place in (k_to, v_to))  # views, or an error
    _launch(_turned, batch * tokens, wide)(
        rows,
        weight_q.contiguous(),
        weight_k.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        q,
        k,
        v,
        rows.stride(0),
        *k.stride()[:2],
        *v.stride()[:2],
        tokens,
        eps,
        width,
        cos.shape[1],
        wide,
    )
    return q


def activated(x: Tensor, eight: bool = False) -> Operand:
    rows, width = _rows(x), x.shape[-1]
    head = triton.next_power_of_2(width) // 2
    made, scale = _room(x, eight)
    _launch(_activated, len(rows), head, 32)(
        rows, made, scale, rows.stride(0), fused.GELU_DEPTH, GREATEST, width, head, _tail(width, head), eight
    )
    return _operand(made, scale, eight)


def as_operand(x: Tensor, eight: bool = False) -> Operand:
    if not eight:
        return x
    rows, width = _rows(x), x.shape[-1]
    wide = triton.next_power_of_2(width)
    made, scale = _room(x, True)
    _launch(_quantised, len(rows), wide)(rows, made, scale, rows.stride(0), GREATEST, width, wide)
    return Rows(made, scale)


def put_together(out: Tensor, normaliser: Tensor, first: Tensor) -> Tensor:
    parts, batch, heads, apart, head_dim = out.shape
    tokens, width = first.shape[2] + apart, heads * head_dim
    wide = triton.next_power_of_2(width)
    made = first.new_empty(batch, tokens, heads, head_dim)
    out, first = (x if x.stride(-1) == 1 else x.contiguous() for x in (out, first))
    _launch(_put_together, batch * tokens, wide, 8)(
        out,
        normaliser,
        first,
        made,
        *out.stride()[:4],
        *normaliser.stride(),
        *first.stride()[:3],
        tokens,
        first.shape[2],
        parts,
        width,
        head_dim,
        wide,
    )
    return made.transpose(1, 2)


KERNELS: dict[Any, Any] = {
    fused.modulated: modulated,
    fused.gated_affine: gated_affine,
    fused.added_modulated: added_modulated,
    fused.gated_modulated: gated_modulated,
    fused.turned: turned,
    fused.activated: activated,
    fused.as_operand: as_operand,
    attention.put_together: put_together,
}


def _norm(
    x: Tensor, y: Tensor | None, gate: Vector | None, scale: Tensor, shift: Tensor, eps: float, eight: bool
) -> tuple[Tensor, Operand]:
    """x, with gate · y or y added to it, and its norm, modulated or, by vectors `[D]`, affine."""
    batch, tokens, width = x.shape
    wide = triton.next_power_of_2(width)
    affine, vectors = scale.ndim == 1, [v for v in (gate, scale, shift) if v is not None and v.ndim > 1]
    times = max((v.shape[1] for v in vectors), default=1)
    rows = _rows(x)
    added = rows if y is None else _rows(y)
    total = x if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    made, row_scale = _room(x, eight)
    given = [_vectors(v, batch, times, width) for v in (scale if gate is None else gate, scale, shift)]
    _launch(_normed, batch * tokens, wide)(
        rows,
        added,
        *given,
        total,
        made,
        row_scale,
        rows.stride(0),
        added.stride(0),
        *(stride for v in given for stride in v.stride()[:2]),
        tokens,
        tokens // times,
        eps,
        GREATEST,
        width,
        wide,
        y is not None,
        gate is not None,
        affine,
        eight,
    )
    return total, _operand(made, row_scale, eight)


def _vectors(v: Tensor, batch: int, times: int, width: int) -> Tensor:
    """`[B, K, D]` of vectors `[B, K, 1, D]` or `[D]`, without a copy if their numbers lie side by side."""
    v = v if v.ndim == 1 else v.squeeze(2)
    return (v if v.stride(-1) == 1 else v.contiguous()).expand(batch, times, width)


def _rows(x: Tensor) -> Tensor:
    """`[R, D]`, a copy only where no number of steps leads from each row to the next."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _room(x: Tensor, eight: bool) -> tuple[Tensor, Tensor]:
    """For a tensor like x and its rows' scales, or for no scales."""
    made = torch.empty(x.shape, dtype=EIGHT if eight else x.dtype, device=x.device)
    return made, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if eight else made


def _operand(made: Tensor, scale: Tensor, eight: bool) -> Operand:
    return Rows(made, scale) if eight else made


def _tail(width: int, head: int) -> int:
    """The power of 2 that holds what of a row is behind its first `head` numbers."""
    return triton.next_power_of_2(width - head)


def _launch(kernel: Any, programs: int, wide: int, each: int = 16) -> Any:
    """`kernel` on the device of its first tensor, `each` numbers of a row in a thread."""
    warps = min(16, max(1, wide // each // 32))

    def launch(*args: Any) -> None:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device, wherever the tensors are
            kernel[(programs,)](*args, num_warps=warps)

    return launch


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(greatest, limit):
    """A row's scale and what its numbers are multiplied with, rounded as divisions are."""
    scale = tl.div_rn(tl.maximum(greatest, 1e-12), limit)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _normed(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    total_ptr,
    made_ptr,
    row_scale_ptr,
    x_row,
    y_row,
    gate_video,
    gate_time,
    scale_video,
    scale_time,
    shift_video,
    shift_time,
    tokens,
    tokens_of_time,
    eps,
    limit,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    AFFINE: tl.constexpr,
    EIGHT: tl.constexpr,
):
    program, col = tl.program_id(0), tl.arange(0, WIDE)
    row, inside = program.to(tl.int64), col < D
    video, time = program // tokens, program % tokens // tokens_of_time
    x = load(x_ptr + row * x_row, col, inside)
    if ADDED:
        y = load(y_ptr + row * y_row, col, inside)
        if GATED:
            y = y * load(gate_ptr + video * gate_video + time * gate_time, col, inside)
        rounded = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + col, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = load(scale_ptr + video * scale_video + time * scale_time, col, inside)
    shift = load(shift_ptr + video * shift_video + time * shift_time, col, inside)
    x = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if not AFFINE:
        scale += 1.0
    x = x * scale + shift
    if EIGHT:
        row_scale, factor = _scale(tl.max(tl.abs(x), 0), limit)
        tl.store(row_scale_ptr + row, row_scale)
        x = tl.minimum(tl.maximum(x * factor, -limit), limit)
    store(made_ptr + row * D, col, inside, x)


@triton.jit
def _turned(
    qkv_ptr,
    weight_q_ptr,
    weight_k_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_row,
    k_video,
    k_token,
    v_video,
    v_token,
    tokens,
    eps,
    D: tl.constexpr,
    P: tl.constexpr,
    WIDE: tl.constexpr,
):
    program, col, pair = tl.program_id(0), tl.arange(0, WIDE), tl.arange(0, WIDE // 2)
    row, inside = program.to(tl.int64), col < D
    video, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    qkv_ptr += row * qkv_row
    q, k = load(qkv_ptr, col, inside), load(qkv_ptr + D, col, inside)
    v = tl.load(qkv_ptr + 2 * D + col, mask=inside, other=0.0)
    tl.store(v_ptr + video * v_video + token * v_token + col, v.to(v_ptr.dtype.element_ty), mask=inside)
    cos = tl.load(cos_ptr + token * P + pair % P)
    sin = tl.load(sin_ptr + token * P + pair % P)
    store(q_ptr + row * D, col, inside, _rotated(q, weight_q_ptr, cos, sin, eps, col, inside, D, WIDE))
    k = _rotated(k, weight_k_ptr, cos, sin, eps, col, inside, D, WIDE)
    store(k_ptr + video * k_video + token * k_token, col, inside, k)


@triton.jit
def _rotated(x, weight_ptr, cos, sin, eps, col, inside, D: tl.constexpr, WIDE: tl.constexpr):
    """A row, normed, whose pairs of neighbours are turned."""
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * load(weight_ptr, col, inside)
    a, b = tl.split(tl.reshape(x, (WIDE // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (WIDE,))


@triton.jit
def _gelu(x):
    """As `fused._gelu`: 1.5957… is 2 √(2/π)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _activated(
    x_ptr,
    made_ptr,
    row_scale_ptr,
    x_row,
    depth,
    limit,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    EIGHT: tl.constexpr,
):
    """A row in two blocks, for few widths are near to a power of 2 and many to the sum of two.

    All is read before anything is computed. No number is above the row's limit but by its own rounding.
    """
    row, head, tail = tl.program_id(0).to(tl.int64), tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    x_ptr += row * x_row
    a = tl.load(x_ptr + head).to(tl.float32)
    b = tl.load(x_ptr + tail, mask=tail < D, other=float("-inf")).to(tl.float32)
    factor = 1.0
    if EIGHT:
        greatest = tl.maximum(_gelu(tl.maximum(tl.max(a, 0), tl.max(b, 0))), depth)
        row_scale, factor = _scale(greatest, limit)
        tl.store(row_scale_ptr + row, row_scale)
    made_ptr += row * D
    tl.store(made_ptr + head, (_gelu(a) * factor).to(made_ptr.dtype.element_ty))
    store(made_ptr, tail, tail < D, _gelu(b) * factor)


@triton.jit
def _quantised(x_ptr, made_ptr, row_scale_ptr, x_row, limit, D: tl.constexpr, WIDE: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    x = load(x_ptr + row * x_row, col, col < D)
    row_scale, factor = _scale(tl.max(tl.abs(x), 0), limit)
    tl.store(row_scale_ptr + row, row_scale)
    store(made_ptr + row * D, col, col < D, tl.minimum(tl.maximum(x * factor, -limit), limit))


@triton.jit
def _put_together(
    out_ptr,
    normaliser_ptr,
    first_ptr,
    made_ptr,
    out_part,
    out_video,
    out_head,
    out_token,
    normaliser_part,
    normaliser_video,
    normaliser_head,
    normaliser_token,
    first_video,
    first_head,
    first_token,
    tokens,
    whole,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    program, col = tl.program_id(0), tl.arange(0, WIDE)
    row, inside = program.to(tl.int64), col < D
    video, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    head, channel = col // HEAD_DIM, col % HEAD_DIM
    if token < whole:
        x = tl.load(
            first_ptr + video * first_video + token * first_token + head * first_head + channel, mask=inside, other=0.0
        )
        tl.store(made_ptr + row * D + col, x, mask=inside)
    else:
        parts_ptr = out_ptr + video * out_video + (token - whole) * out_token
        logs_ptr = normaliser_ptr + video * normaliser_video + (token - whole) * normaliser_token
        greatest = load(logs_ptr, head * normaliser_head, inside)
        for part in tl.static_range(1, PARTS):  # type: ignore[reportGeneralTypeIssues]
            greatest = tl.maximum(greatest, load(logs_ptr, part * normaliser_part + head * normaliser_head, inside))
        total, share = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
        for part in tl.static_range(PARTS):  # type: ignore[reportGeneralTypeIssues]
            weight = tl.exp(load(logs_ptr, part * normaliser_part + head * normaliser_head, inside) - greatest)
            share += weight
            total += weight * load(parts_ptr, part * out_part + head * out_head + channel, inside)
        store(made_ptr + row * D, col, inside, total / share)
