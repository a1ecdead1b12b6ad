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
    replayed for itself in the backward pass. `fused` are functions like `learned` and `read` that take streams in their
    own dtype.
    """
    dtype = wide(q.dtype)
    learn, answer, inner = (learned, read, dtype) if fused is None else (*fused, q.dtype)

    def run(piece: tuple[Tensor, ...], shared: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        q, k, v, eta = piece
        state = learn(state, k.to(inner), v.to(inner), eta, shared)
        return answer(state, q.to(inner)).to(q.dtype), state

    return replayed(run, groups, (q, k, v, eta.to(dtype)), lengths, state)


def learned(state: State, k: Tensor, v: Tensor, eta: Tensor, lengths: tuple[Tensor, ...]) -> State:
    """The weights after one step on a group, all gradients at the old ones."""
    W0, W1, W2 = state
    a, e = k @ W0, k @ W2
    sigmoid = a.sigmoid()
    gate = a * sigmoid
    dn = v @ W1.mT
    da = dn * e * sigmoid * (1 + a * (1 - sigmoid))
    r0, r1, r2 = (rate[..., None] for rate in eta.unbind(-1))
    moved = (W0 + k.mT @ (r0 * da), W1 + (gate * e).mT @ (r1 * v), W2 + k.mT @ (r2 * dn * gate))
    return rescaled(moved, lengths)


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
