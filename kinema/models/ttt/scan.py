"""The inner loop of TTT layers (arXiv 2407.04620, 2504.05298): fast weights that learn, mini-batch by mini-batch.

Per head, f(x) = x W1 + b1 ("linear") or gelu(x W1 + b1) W2 + b2 ("mlp"), told apart by the size of the state. A
mini-batch takes one step down Σ eta_j ½|LN(f(k_j)) - target_j|² from the weights before it, and all of its tokens are
read with the weights after it: o = q + LN(f(q)). All of it is computed wide, whatever the dtype of q, k and target.

Shapes: B batch, H heads, L tokens, b of a mini-batch, d head dim, f hidden width (4d).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.models.layers import wide
from kinema.models.ttt.replay import State, replayed

EPS = 1e-8  # of LN; every path uses this one
_ROOT = 0.79788456  # √(2/π), to as many digits as the reference has


def scan(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    eta: Tensor,
    state: State,
    norm: tuple[Tensor, Tensor],
    mini_batch: int,
    snapshot_every: int = 16,
) -> tuple[Tensor, State]:
    """Outputs `[B, H, L, d]` of all tokens in the dtype of q, and the state after the last.

    `q`, `k`, `target` `[B, H, L, d]`; `eta` `[B, H, L]`, wide, is each token's own step, 0 for tokens that only fill up
    a mini-batch. `state` is (W1, b1) or (W1, b1, W2, b2), each `[B, H, …]` and wide: the state of one call goes on in
    the next. `norm` is weight and bias of LN, `[H, d]`. The backward pass replays `snapshot_every` mini-batches at a
    time. Raises ValueError if L is not a multiple of `mini_batch`.
    """
    if q.shape[2] % mini_batch:
        raise ValueError(
            f"{q.shape[2]} tokens are not mini-batches of {mini_batch}; fill up with {-q.shape[2] % mini_batch} more"
        )

    def run(piece: tuple[Tensor, ...], shared: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        q, *others = piece
        states = []
        for k, target, eta in zip(*(stream.split(mini_batch, dim=2) for stream in others), strict=True):
            state = learned(state, k.to(dtype), target.to(dtype), eta, (shared[0], shared[1]))
            states.append(state)
        each = tuple(torch.stack(weights, dim=2) for weights in zip(*states, strict=True))  # reading waits for nothing
        norm = shared[0][:, None], shared[1][:, None]
        return read(each, q.to(dtype).unflatten(2, (-1, mini_batch)), norm).flatten(2, 3).to(q.dtype), state

    dtype = wide(q.dtype)
    span, length = mini_batch * snapshot_every, q.shape[2]
    cuts = [min(span, length - start) for start in range(0, length, span)]
    return replayed(run, cuts, (q, k, target, eta.to(dtype)), norm, state)


def learned(state: State, k: Tensor, target: Tensor, eta: Tensor, norm: tuple[Tensor, Tensor]) -> State:
    """The weights after one step on a mini-batch, all gradients at the old ones."""
    hidden, g_hidden, g = _gradients(state, k, target, norm)
    step = eta[..., None]
    if len(state) == 2:
        W1, b1 = state
        return W1 - k.mT @ (step * g), b1 - (step * g).sum(2, keepdim=True)
    W1, b1, W2, b2 = state
    one, two = step * g_hidden, step * g
    return (
        W1 - k.mT @ one,
        b1 - one.sum(2, keepdim=True),
        W2 - hidden.mT @ two,
        b2 - two.sum(2, keepdim=True),
    )


def read(state: State, q: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """q + LN(f(q)); of several states at once if q, state and norm have a further dim for them, after H."""
    z = q @ state[0] + state[1]
    if len(state) == 4:
        z = F.gelu(z, approximate="tanh") @ state[2] + state[3]
    return q + layer_norm(z, norm)


def layer_norm(z: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """LN over d with weight and bias of each head."""
    weight, bias = norm
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * weight[:, None] + bias[:, None]


def dual(state: State, q: Tensor, k: Tensor, target: Tensor, eta: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """What `read` gives after `learned`, by products of q and k instead of new weights.

    `eta` `[B, H, b]`, or `[B, H, b, b]` where entry (i, j) is the step of token j as token i sees it: nobody's idea of
    a method, but what the public reference computes.
    """
    hidden, g_hidden, g = _gradients(state, k, target, norm)
    step = eta[:, :, None] if eta.ndim == 3 else eta
    if len(state) == 2:
        z = q @ state[0] + state[1] - (step * (q @ k.mT)) @ g - step @ g
    else:
        z1 = q @ state[0] + state[1] - (step * (q @ k.mT)) @ g_hidden - step @ g_hidden
        x2 = F.gelu(z1, approximate="tanh")
        z = x2 @ state[2] + state[3] - (step * (x2 @ hidden.mT)) @ g - step @ g
    return q + layer_norm(z, norm)


def _gradients(state: State, k: Tensor, target: Tensor, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden activations, and the gradients of the loss with respect to what comes out of the first and of the last
    layer; all three of "linear" are about its only one."""
    z1 = k @ state[0] + state[1]
    if len(state) == 2:
        g = _norm_gradient(z1, target, norm)
        return k, g, g
    hidden = F.gelu(z1, approximate="tanh")
    g = _norm_gradient(hidden @ state[2] + state[3], target, norm)
    return hidden, (g @ state[2].mT) * gelu_slope(z1), g


def _norm_gradient(z: Tensor, target: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """Of ½|LN(z) - target|² with respect to z."""
    weight, bias = (part[:, None] for part in norm)
    z_hat = F.layer_norm(z, z.shape[-1:], eps=EPS)
    deviation = (z.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    h = weight * (weight * z_hat + bias - target)
    return (h - h.mean(-1, keepdim=True) - z_hat * (h * z_hat).mean(-1, keepdim=True)) / deviation


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of the tanh approximation of GELU."""
    th = torch.tanh(_ROOT * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - th * th) * (_ROOT + 0.1070322243 * x * x) + 0.5 * (1 + th)
