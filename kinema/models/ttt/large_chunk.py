"""LaCT's inner loop (arXiv 2505.23884): SwiGLU fast weights that take one step per thousands of tokens.

Per head, f(x) = (silu(x W0) ⊙ (x W2)) W1. A group of tokens takes one step down -Σ eta_j f(k_j)·v_j from the weights
before it, with a rate of its own for each matrix; every fan-in vector is then scaled back to the length it had at
first; and all tokens of the group are read with the weights after it: o = f(q).

Shapes: B batch, H heads, L tokens, m head dim, h hidden width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.models.layers import wide
from kinema.models.ttt.replay import State, replayed

EPS = 1e-5  # of the lengths
PIECE = 1 << 15  # tokens whose hidden activations are held at once


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    state: State,
    lengths: tuple[Tensor, ...],
    groups: Sequence[int],
    fused: tuple[Callable[..., State], Callable[[State, Tensor], Tensor]] | None = None,
) -> tuple[Tensor, State]:
    """Outputs `[B, H, L, m]` of all tokens in the dtype of q, and the state after the last.

    `q`, `k`, `v` `[B, H, L, m]`; `eta` `[B, H, L, 3]`, wide, has the rates of W0, W1 and W2, 0 for tokens that do not
    count. `state` is (W0 `[B, H, m, h]`, W1 `[B, H, h, m]`, W2 `[B, H, m, h]`), wide, and `lengths` are those of the
    fan-in vectors of the first weights, as `lengths_of` gives them. `groups` are consecutive and make up L; each is
    replayed for itself in the backward pass, and one that is all of a long video piece by piece. `fused` are functions
    like `step` and `read` that take streams in their own dtype.
    """
    dtype = wide(q.dtype)
    stepped, answer, inner = (step, read, dtype) if fused is None else (*fused, q.dtype)
    eta = eta.to(dtype)

    def run(piece: tuple[Tensor, ...], shared: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        q, k, v, eta = piece
        state = moved(state, stepped(state, k.to(inner), v.to(inner), eta), shared)
        return answer(state, q.to(inner)).to(q.dtype), state

    def gather(piece: tuple[Tensor, ...], first: tuple[Tensor, ...], total: State) -> tuple[Tensor, State]:
        k, v, eta = piece
        own = stepped(first, k.to(inner), v.to(inner), eta)
        return k[..., :0], tuple(a + b for a, b in zip(total, own, strict=True))  # nothing can be read yet

    def look(piece: tuple[Tensor, ...], last: tuple[Tensor, ...], nothing: State) -> tuple[Tensor, State]:
        return answer(last, piece[0].to(inner)).to(q.dtype), nothing

    length = q.shape[2]
    if len(groups) > 1 or length <= PIECE:
        return replayed(run, groups, (q, k, v, eta), lengths, state)
    cuts = [min(PIECE, length - start) for start in range(0, length, PIECE)]
    total = replayed(gather, cuts, (k, v, eta), state, tuple(torch.zeros_like(w) for w in state))[1]
    state = moved(state, total, lengths)  # one step: the sum of the pieces' steps
    return replayed(look, cuts, (q,), state, ())[0], state


def step(state: State, k: Tensor, v: Tensor, eta: Tensor) -> State:
    """What a step adds to the weights before they are scaled back."""
    W0, W1, W2 = state
    a, e = k @ W0, k @ W2
    sigmoid = a.sigmoid()
    gate = a * sigmoid
    dn = v @ W1.mT
    da = dn * e * sigmoid * (1 + a * (1 - sigmoid))
    r0, r1, r2 = (rate[..., None] for rate in eta.unbind(-1))
    return k.mT @ (r0 * da), (gate * e).mT @ (r1 * v), k.mT @ (r2 * dn * gate)


def moved(state: State, change: State, lengths: tuple[Tensor, ...]) -> State:
    """The weights after a step, scaled back."""
    return rescaled(tuple(w + d for w, d in zip(state, change, strict=True)), lengths)


def rescaled(moved: State, lengths: tuple[Tensor, ...]) -> State:
    """Weights whose fan-in vectors have these lengths."""
    return tuple(w / (_length(w) + EPS) * length for w, length in zip(moved, lengths, strict=True))


def read(state: State, q: Tensor) -> Tensor:
    W0, W1, W2 = state
    return (F.silu(q @ W0) * (q @ W2)) @ W1


def lengths_of(state: State) -> tuple[Tensor, ...]:
    """Of every fan-in vector, which is a column."""
    return tuple(_length(w) for w in state)


def _length(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=-2, keepdim=True)
