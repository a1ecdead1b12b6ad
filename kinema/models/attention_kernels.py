"""`models.attention_eight` as Triton kernels, for NVIDIA GPUs from Ada on, whose tensor cores know 8-bit numbers.

A program has 128 queries of a head and reads all keys of its part, 128 at once (arXiv 2205.14135); so softmax's weights
are relative to the greatest score so far, and not to the greatest of all.
"""

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from kinema.models import attention_eight
from kinema.models.attention_eight import BLOCK, span_of
from kinema.models.fp8 import GREATEST
from kinema.models.triton_numbers import load

TILE = 128  # queries of a program
LOG2_E = 1.4426950408889634


def rounded(x: Tensor) -> Tensor:
    x = x.contiguous()
    made = torch.empty(x.shape, dtype=attention_eight.EIGHT, device=x.device)
    _launch(_rounded, (triton.cdiv(x.numel(), 8192),), x, made, x.numel(), GREATEST, 8192, num_warps=8)
    return made


def keep(k: Tensor, v: Tensor, k_to: Tensor, v_to: Tensor) -> None:
    batch, tokens, heads, head_dim = k.shape
    _launch(
        _keep,
        (triton.cdiv(tokens, 64), batch * heads),
        k,
        v,
        k_to,
        v_to,
        *k.stride()[:3],
        *v.stride()[:3],
        *k_to.stride()[:3],
        *v_to.stride()[:3],
        tokens,
        heads,
        GREATEST,
        head_dim,
        triton.next_power_of_2(head_dim),
        64,
        num_warps=4,
    )


def in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    kind = dtype if parts == 1 else torch.float32
    each = span_of(k.shape[1], parts)
    parts = triton.cdiv(k.shape[1], each)
    out = torch.empty(parts, batch, tokens, heads, head_dim, dtype=kind, device=q.device).transpose(2, 3)
    normaliser = torch.empty(parts, batch, heads, tokens, dtype=torch.float32, device=q.device)
    _launch(
        _attend,
        (triton.cdiv(tokens, TILE), batch * heads, parts),
        q,
        k,
        v,
        out,
        normaliser,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:4],
        heads,
        tokens,
        k.shape[1],
        each,
        head_dim**-0.5 * LOG2_E,
        head_dim,
        max(32, triton.next_power_of_2(head_dim)),
        TILE,
        BLOCK,
        num_warps=8,
        num_stages=_stages(q.device),
    )
    return out, normaliser


KERNELS: dict[Any, Any] = {
    attention_eight.rounded: rounded,
    attention_eight.keep: keep,
    attention_eight.in_parts: in_parts,
}


def _stages(device: torch.device) -> int:
    """How many blocks of keys and values are on their way: three, in 112 KiB, where a processor has that much."""
    if device.type != "cuda":
        return 3
    return 3 if torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 120 * 1024 else 2


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: int) -> None:
    with torch.cuda.device_of(first):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](first, *args, **options)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(x_ptr, made_ptr, numbers, limit, EACH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    x = load(x_ptr, at, at < numbers)
    x = tl.minimum(tl.maximum(x, -limit), limit)
    tl.store(made_ptr + at, x.to(made_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit
def _keep(
    k_ptr,
    v_ptr,
    k_to_ptr,
    v_to_ptr,
    k_video,
    k_token,
    k_head,
    v_video,
    v_token,
    v_head,
    k_to_video,
    k_to_token,
    k_to_head,
    v_to_video,
    v_to_head,
    v_to_channel,
    tokens,
    heads,
    limit,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    EACH: tl.constexpr,
):
    video, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    token = tl.program_id(0) * EACH + tl.arange(0, EACH)
    channel = tl.arange(0, WIDE)
    inside = (token[:, None] < tokens) & (channel[None, :] < D)
    k = load(k_ptr + video * k_video + head * k_head, token[:, None] * k_token + channel[None, :], inside)
    v = load(v_ptr + video * v_video + head * v_head, token[:, None] * v_token + channel[None, :], inside)
    k = tl.minimum(tl.maximum(k, -limit), limit).to(k_to_ptr.dtype.element_ty)
    v = tl.minimum(tl.maximum(v, -limit), limit).to(v_to_ptr.dtype.element_ty)
    k_to_ptr += video * k_to_video + head * k_to_head
    tl.store(k_to_ptr + token[:, None] * k_to_token + channel[None, :], k, mask=inside)
    v_to_ptr += video * v_to_video + head * v_to_head
    across = (token[None, :] < tokens) & (channel[:, None] < D)
    tl.store(v_to_ptr + channel[:, None] * v_to_channel + token[None, :], tl.trans(v), mask=across)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    log_ptr,
    q_video,
    q_token,
    q_head,
    k_video,
    k_token,
    k_head,
    v_video,
    v_head,
    v_channel,
    out_part,
    out_video,
    out_head,
    out_token,
    heads,
    queries,
    keys,
    keys_of_part,
    scale,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    video, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    part = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel, column = tl.arange(0, WIDE), tl.arange(0, BLOCK)
    q_ptr += video * q_video + head * q_head
    k_ptr += video * k_video + head * k_head
    v_ptr += video * v_video + head * v_head
    known = channel < D
    q = tl.load(
        q_ptr + row[:, None] * q_token + channel[None, :], mask=(row[:, None] < queries) & known[None, :], other=0.0
    )
    begin = part * keys_of_part
    end = tl.minimum(begin + keys_of_part, keys)
    whole = begin + (end - begin) // BLOCK * BLOCK
    greatest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    made = tl.zeros((TILE, WIDE), tl.float32)
    for start in range(begin, whole, BLOCK):
        key = start + column
        k_at, v_at = (
            k_ptr + key[None, :] * k_token + channel[:, None],
            v_ptr + channel[None, :] * v_channel + key[:, None],
        )
        if D == WIDE:
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            k, v = tl.load(k_at, mask=known[:, None], other=0.0), tl.load(v_at, mask=known[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        greatest, total, made = _read(scores, v, scale, greatest, total, made)
    if whole < end:
        key = whole + column
        k = tl.load(
            k_ptr + key[None, :] * k_token + channel[:, None], mask=known[:, None] & (key[None, :] < end), other=0.0
        )
        scores = tl.where(key[None, :] < end, tl.dot(q, k, input_precision="ieee"), float("-inf"))
        v = tl.load(
            v_ptr + channel[None, :] * v_channel + key[:, None], mask=known[None, :] & (key[:, None] < end), other=0.0
        )
        greatest, total, made = _read(scores, v, scale, greatest, total, made)
    out_ptr += part * out_part + video * out_video + head * out_head
    tl.store(
        out_ptr + row[:, None] * out_token + channel[None, :],
        (made / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=(row[:, None] < queries) & known[None, :],
    )
    log_ptr += (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * queries
    tl.store(log_ptr + row, (greatest * scale - 8.0 + tl.log2(total)) * 0.6931471805599453, mask=row < queries)


@triton.jit
def _read(scores, v, scale, greatest, total, made):
    """Scores, which `scale` makes logarithms to base 2, and the values of some more keys."""
    new = tl.maximum(greatest, tl.max(scores, 1))
    weights = tl.exp2(scores * scale - (new * scale - 8.0)[:, None])
    fade = tl.exp2((greatest - new) * scale)
    total = total * fade + tl.sum(weights, 1)
    made = tl.dot(weights.to(v.dtype), v, made * fade[:, None], input_precision="ieee")
    return new, total, made
