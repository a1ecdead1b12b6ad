"""The gated delta rule (arXiv 2412.06464): a matrix that forgets, and corrects what it says about each key.

S ← a_j S; S ← S + β_j k_jᵀ(v_j - k_j S); o_j = d^(-½) q_j S, from S = 0, in chunks of dense products.

Shapes: B batch, H heads, L tokens, c of a chunk, d head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kinema.models.layers import wide
from kinema.models.ttt.replay import State, replayed


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: State,
    chunk: int = 64,
    groups: Sequence[int] | None = None,
    snapshot_every: int = 16,
) -> tuple[Tensor, State]:
    """Outputs `[B, H, L, d]` in the dtype of q, and the state after the last token.

    `q`, `k`, `v` `[B, H, L, d]`; `beta` and `log_decay` = log a `[B, H, L]`, wide; both 0 is a token that is not there.
    `state` is (S `[B, H, d, d]`,), wide. With `groups`, which are consecutive and make up L, all tokens of a group are
    read with the state after it.
    """
    dtype, length = wide(q.dtype), q.shape[2]

    def run(piece: tuple[Tensor, ...], shared: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        (S,), outputs = state, []
        for part in zip(*(stream.split(chunk, dim=2) for stream in piece), strict=True):
            q_c, k_c, v_c, beta_c, decay_c = (x.to(dtype) for x in part)
            out, S = _chunk(q_c, k_c, v_c, beta_c, decay_c, S)
            outputs.append(out)
        if groups is None:
            return torch.cat(outputs, dim=2).to(q.dtype), (S,)
        return (piece[0].to(dtype) @ S * q.shape[-1] ** -0.5).to(q.dtype), (S,)

    span = chunk * snapshot_every
    cuts = groups or [min(span, length - start) for start in range(0, length, span)]
    return replayed(run, cuts, (q, k, v, beta.to(dtype), log_decay.to(dtype)), (), state)


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    g = log_decay.cumsum(-1)
    apart = g[..., :, None] - g[..., None, :]
    future = torch.ones_like(apart[0, 0], dtype=torch.bool).triu(1)
    decay = apart.masked_fill(future, -torch.inf).exp()
    system = beta[..., None] * (k @ k.mT) * decay
    right = beta[..., None] * (v - g.exp()[..., None] * (k @ S))
    # the diagonal of a unit triangular system is not looked at
    r = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    out = g.exp()[..., None] * (q @ S) + ((q @ k.mT) * decay) @ r
    left = (g[..., -1:] - g).exp()[..., None] * k
    return out * q.shape[-1] ** -0.5, g[..., -1].exp()[..., None, None] * S + left.mT @ r
