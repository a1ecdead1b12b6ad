"""The gated delta rule (arXiv 2412.06464): a matrix that forgets, and corrects what it says about each key.

S ← a_j S; S ← S + β_j k_jᵀ(v_j - k_j S); o_j = d^(-½) q_j S, from S = 0, in chunks of dense products.

Shapes: B batch, H heads, L tokens, n chunks, c tokens of a chunk, d head dim.
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
        tokens = piece[0].shape[2]
        q_c, k_c, v_c, beta_c, decay_c = (_chunks(stream.to(dtype), chunk) for stream in piece)
        out, S = _run(q_c, k_c, v_c, beta_c, decay_c, state[0])
        if groups is None:
            return out.flatten(2, 3)[:, :, :tokens].to(q.dtype), (S,)
        return (piece[0].to(dtype) @ S * q.shape[-1] ** -0.5).to(q.dtype), (S,)

    span = chunk * snapshot_every
    cuts = groups or [min(span, length - start) for start in range(0, length, span)]
    return replayed(run, cuts, (q, k, v, beta.to(dtype), log_decay.to(dtype)), (), state)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, H, n, c, …]` of `[B, H, L, …]`, filled up by zeros, which are tokens that are not there."""
    more = x.new_zeros(*x.shape[:2], -x.shape[2] % chunk, *x.shape[3:])
    return torch.cat([x, more], dim=2).unflatten(2, (-1, chunk))


def _run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[B, H, n, c, d]` of n chunks, and the state after them.

    With the state S before a chunk, R = U - W S corrects it to e^{g_c} S + leftᵀ R, and U and W are of the chunk alone.
    So what must wait for the chunk before is one product with a d x d matrix.
    """
    g = log_decay.cumsum(-1)
    apart = g[..., :, None] - g[..., None, :]
    future = torch.ones_like(apart[0, 0, 0], dtype=torch.bool).triu(1)
    decay = apart.masked_fill(future, -torch.inf).exp()
    system = beta[..., None] * (k @ k.mT) * decay
    right = beta[..., None] * torch.cat([v, g.exp()[..., None] * k], dim=-1)
    # the diagonal of a unit triangular system is not looked at
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    U, W = solved.chunk(2, dim=-1)
    left = ((g[..., -1:] - g).exp()[..., None] * k).mT
    kept = torch.diag_embed(g[..., -1:].exp().expand(*g.shape[:-1], k.shape[-1])) - left @ W
    before = []
    for keep, add in zip(kept.unbind(2), (left @ U).unbind(2), strict=True):
        before.append(S)
        S = keep @ S + add
    states = torch.stack(before, dim=2)
    out = g.exp()[..., None] * (q @ states) + ((q @ k.mT) * decay) @ (U - W @ states)
    return out * q.shape[-1] ** -0.5, S
