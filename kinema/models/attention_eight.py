"""Attention in 8-bit floating point (e4m3) for inference: queries, keys, values, and what softmax makes of them.

Queries and keys come from a norm and values from a product of normed tokens, so all are cast as they are: the rounding
of a floating-point number, up to 1/16 of it at random, does not depend on a scale. What is beyond 448 is cut off. The
weights of softmax are multiplied by 2⁸ before they are rounded, which would otherwise take all below a thousandth of
the greatest to 0. Sums are float32, and that of the weights is of unrounded ones.
Shapes: B batch, N heads, L queries, S keys, D head dim; keys lie in `[B, S, N, D]`, values across, in `[B, N, D, S]`,
as the tensor cores of Hopper read 8-bit numbers only along what is summed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kinema.models.attention import put_together, rounds
from kinema.models.cache import Spans
from kinema.models.causality import joined
from kinema.models.fp8 import GREATEST

EIGHT = torch.float8_e4m3fn
BLOCK = 128  # keys that the kernel reads at once; rows of values begin at multiples of it
DEPTH = 256.0  # by which weights of softmax, at most 1, are multiplied


def room(ring: Tensor) -> tuple[Tensor, Tensor]:
    """For the keys and values of a ring `[B, S, N, D]`."""
    batch, slots, heads, head_dim = ring.shape
    keys = torch.empty(ring.shape, dtype=EIGHT, device=ring.device)
    return keys, keys.new_empty(batch, heads, head_dim, slots + -slots % BLOCK)[..., :slots]


def rounded(x: Tensor) -> Tensor:
    """In 8 bits."""
    return x.clamp(-GREATEST, GREATEST).to(EIGHT)


def keep(k: Tensor, v: Tensor, k_to: Tensor, v_to: Tensor) -> None:
    """Writes keys and values `[B, S, N, D]` to their places in 8 bits, `[B, S, N, D]` and `[B, N, D, S]`."""
    k_to.copy_(rounded(k))
    v_to.copy_(rounded(v).permute(0, 2, 3, 1))


def in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention of `[B, L, N, D]` to `parts` parts of the keys: results `[parts, B, N, L, D]`, of `dtype` if there is
    one part and else float32, and the logarithms of their normalisers `[parts, B, N, L]`."""
    scores = torch.einsum("blnd,bsnd->bnls", q.float(), k.float()) * q.shape[-1] ** -0.5
    each, made, normaliser = span_of(k.shape[1], parts), [], []
    for part, values in zip(scores.split(each, dim=-1), v.split(each, dim=-1), strict=True):
        weights = DEPTH * (part - part.amax(-1, keepdim=True)).exp()
        made.append(weights.to(EIGHT).float() @ values.float().mT / weights.sum(-1, keepdim=True))
        normaliser.append(part.logsumexp(-1))
    return torch.stack(made).to(dtype if parts == 1 else torch.float32), torch.stack(normaliser)


def span_of(keys: int, parts: int) -> int:
    """How many keys a part has, in whole blocks; the last has what is left."""
    return -(-keys // (parts * BLOCK)) * BLOCK


def attend_eight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Spans,
    run: Callable[..., Any] = lambda function, *args: function(*args),
    processors: int | None = None,
) -> Tensor:
    """softmax(q kᵀ/√D) v `[B, N, L, D]` of queries `[B, L, N, D]` to what is `seen` of 8-bit keys and values, in the
    dtype of the queries, without gradients. The last queries are computed apart as by `attention.attend_balanced`."""
    if len(seen) == 1 and seen[0][0] == 0:
        keys = seen[0][1]
        k, v = k[:, :keys], v[..., :keys]
    else:
        k, v = joined([k[:, a:b].transpose(1, 2) for a, b in seen]).transpose(1, 2), _beside(v, seen)
    if processors is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 0
    eight, parts, tail = run(rounded, q), 1, 0
    if processors:
        tail, parts = rounds(len(q) * q.shape[2], q.shape[1], k.shape[1], processors)
    if parts == 1:
        return run(in_parts, eight, k, v, 1, q.dtype)[0][0]
    first = run(in_parts, eight[:, :-tail], k, v, 1, q.dtype)[0][0]
    return run(put_together, *run(in_parts, eight[:, -tail:], k, v, parts, q.dtype), first)


def _beside(v: Tensor, seen: Spans) -> Tensor:
    """Values of several spans, one after the other."""
    total = sum(b - a for a, b in seen)
    made = v.new_empty(*v.shape[:3], total + -total % BLOCK)
    begin = 0
    for a, b in seen:
        made[..., begin : begin + b - a] = v[..., a:b]
        begin += b - a
    return made[..., :total]
