"""The scan of `ttt_mlp` as Triton kernels, for NVIDIA GPUs from Ampere on, checked against `scan.py`.

One program walks over the mini-batches of one head. The fast weights stay in the second-level cache and are worked on
in slices of the hidden width, so that no GPU's registers or shared memory are too small. Products take TF32 operands
and add in float32 where streams are bfloat16, and are plain float32 where these are. The backward pass makes the states
of some mini-batches again, from a snapshot, and goes back through them with the analytic gradient of a step.

Shapes: B batch, H heads, L tokens, b of a mini-batch, d head dim, f = 4d hidden width, w of a slice of it.
"""

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from kinema.models.ttt.replay import State
from kinema.models.ttt.scan import EPS

SNAPSHOT_EVERY = 16
WARPS = {"forward": 4, "backward": 8}
SLICE = 32  # of the hidden width; at 64 the backward pass needs more shared memory than GPUs with 99 KiB have


def fits(mini_batch: int, head_dim: int, hidden: int) -> bool:
    """Whether the tiles are what one program can hold, and what Triton takes: powers of 2 from 16 upwards."""
    powers = all(n >= 16 and n & (n - 1) == 0 for n in (mini_batch, head_dim, hidden))
    return powers and mini_batch <= 64 and head_dim <= 64


def scan(
    q: Tensor, k: Tensor, target: Tensor, eta: Tensor, state: State, norm: tuple[Tensor, Tensor], mini_batch: int
) -> tuple[Tensor, State]:
    """`scan.scan` of four fast weights, which must fit; streams are float32 or bfloat16."""
    out, *last = _Scan.apply(mini_batch, q, k, target, eta, *norm, *state)  # type: ignore[misc]
    return out, tuple(last)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: int, q: Tensor, k: Tensor, target: Tensor, eta: Tensor, *others: Tensor):
        ctx.set_materialize_grads(False)
        streams = tuple(x.contiguous() for x in (q, k, target, eta))
        norm, state = tuple(x.float().contiguous() for x in others[:2]), tuple(x.float() for x in others[2:])
        count = q.shape[2] // b
        out, keep = torch.empty_like(streams[0]), any(ctx.needs_input_grad)
        snapshots = _room(state, -(-count // SNAPSHOT_EVERY)) if keep else ()
        slots = _room(state, 2)
        for slot, w in zip(slots, state, strict=True):
            slot[:, :, 0] = w
        _walk(b, streams, norm, slots, 0, count, out, snapshots)
        if keep:
            ctx.b = b
            ctx.save_for_backward(*streams, *norm, *snapshots)
        return out, *(slot[:, :, count % 2].clone() for slot in slots)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *grad_last: Tensor | None):  # type: ignore[override]
        saved = ctx.saved_tensors  # once: under checkpointing a second look is refused
        q, k, target, eta, *norm = saved[:6]
        snapshots, b, streams = saved[6:], ctx.b, (q, k, target, eta)
        count, heads = q.shape[2] // b, q.shape[:2]
        grad_out = torch.zeros_like(q) if grad_out is None else grad_out.contiguous()
        grads = tuple(torch.zeros_like(s[:, :, 0]) for s in snapshots)
        for grad, given in zip(grads, grad_last, strict=True):
            if given is not None:
                grad.copy_(given)
        between = tuple(torch.empty_like(g) for g in grads)
        made = tuple(torch.empty_like(x) for x in streams)
        grad_norm = torch.zeros(2, *heads, q.shape[3], device=q.device)
        slots = _room(grads, SNAPSHOT_EVERY + 1)
        for n in reversed(range(-(-count // SNAPSHOT_EVERY))):
            first = n * SNAPSHOT_EVERY
            steps = min(SNAPSHOT_EVERY, count - first)
            for slot, snapshot in zip(slots, snapshots, strict=True):
                slot[:, :, 0] = snapshot[:, :, n]
            _walk(b, streams, tuple(norm), slots, first, steps, None, ())
            _back(b, streams, tuple(norm), slots, first, steps, grad_out, made, grads, between, grad_norm)
        return None, *made, *grad_norm.sum(1), *grads


def _room(state: State, count: int) -> State:
    return tuple(torch.empty(*w.shape[:2], count, *w.shape[2:], device=w.device) for w in state)


def _launch(kernel: Any, programs: int) -> Any:
    return kernel[(programs,)]


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _walk(
    b: int,
    streams: tuple[Tensor, ...],
    norm: State,
    slots: State,
    first: int,
    steps: int,
    out: Tensor | None,
    snapshots: State,
) -> None:
    """Steps `first` … `first + steps`, from the state in slot 0; step n goes from slot n to slot n + 1, in a ring.

    With `out` tokens are read; `snapshots` get the state before every S-th step.
    """
    q = streams[0]
    batch, heads, length, d = q.shape
    f = slots[0].shape[4]
    _launch(_forward, batch * heads)(
        *streams,
        *norm,
        *slots,
        q if out is None else out,
        *(snapshots or slots),
        heads,
        length,
        first,
        steps,
        slots[0].shape[2],
        snapshots[0].shape[2] if snapshots else 1,
        SNAPSHOT_EVERY,
        b,
        d,
        f,
        min(f, SLICE),
        EPS,
        _precision(q),
        out is not None,
        bool(snapshots),
        num_warps=WARPS["forward"],
        num_stages=1,
    )


def _back(
    b: int,
    streams: tuple[Tensor, ...],
    norm: State,
    slots: State,
    first: int,
    steps: int,
    grad_out: Tensor,
    made: tuple[Tensor, ...],
    grads: State,
    between: State,
    grad_norm: Tensor,
) -> None:
    q = streams[0]
    batch, heads, length, d = q.shape
    f = slots[0].shape[4]
    _launch(_backward, batch * heads)(
        *streams,
        *norm,
        *slots,
        grad_out,
        *made,
        *grads,
        *between[:3],
        *grad_norm.unbind(0),
        heads,
        length,
        first,
        steps,
        slots[0].shape[2],
        b,
        d,
        f,
        min(f, SLICE),
        EPS,
        _precision(q),
        num_warps=WARPS["backward"],
        num_stages=1,
    )


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _gelu(x):
    """The tanh approximation of GELU, its first and its second derivative."""
    c = 0.7978845608028654
    t = _tanh(c * x * (1 + 0.044715 * x * x))
    s = 1 - t * t
    u1 = c * (1 + 0.134145 * x * x)
    u2 = 0.26829 * c * x
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * s * u1, s * u1 + 0.5 * x * s * (u2 - 2 * t * u1 * u1)


@triton.jit
def _normal(z, d: tl.constexpr, EPS: tl.constexpr):
    """z with mean 0 and deviation 1 along its rows, and the deviations."""
    centred = z - (tl.sum(z, 1) / d)[:, None]
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / d + EPS)[:, None]
    return centred / deviation, deviation


@triton.jit
def _projected(x, z_hat, d: tl.constexpr):
    """x without its mean and without its part along z_hat."""
    return x - (tl.sum(x, 1) / d)[:, None] - z_hat * (tl.sum(x * z_hat, 1) / d)[:, None]


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit(do_not_specialize=["length", "first", "steps", "room", "rooms"])
def _forward(
    q_ptr, k_ptr, t_ptr, eta_ptr, weight_ptr, bias_ptr,
    W1_ptr, b1_ptr, W2_ptr, b2_ptr,
    out_ptr, W1_kept, b1_kept, W2_kept, b2_kept,
    heads, length, first, steps, room, rooms, every,
    b: tl.constexpr, d: tl.constexpr, f: tl.constexpr, w: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    OUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, col, hid = tl.arange(0, b), tl.arange(0, d), tl.arange(0, w)
    tile = row[:, None] * d + col[None, :]
    up, down = col[:, None] * f + hid[None, :], hid[:, None] * d + col[None, :]
    weight = tl.load(weight_ptr + (head % heads) * d + col)[None, :]
    bias = tl.load(bias_ptr + (head % heads) * d + col)[None, :]
    for n in range(steps):
        at, here, there = head * length + (first + n) * b, head * room + n % room, head * room + (n + 1) % room
        k = tl.load(k_ptr + at * d + tile).to(tl.float32)
        target = tl.load(t_ptr + at * d + tile).to(tl.float32)
        eta = tl.load(eta_ptr + at + row).to(tl.float32)[:, None]
        b2 = tl.load(b2_ptr + here * d + col)
        z = tl.zeros((b, d), tl.float32) + b2[None, :]
        for j in range(0, f, w):
            W1, W2 = tl.load(W1_ptr + here * d * f + up + j), tl.load(W2_ptr + here * d * f + down + j * d)
            b1 = tl.load(b1_ptr + here * f + hid + j)
            x2, _, _ = _gelu(_dot(k, W1, PRECISION) + b1[None, :])
            z += _dot(x2, W2, PRECISION)
            if KEEP:  # noqa: SIM102 - known when it is compiled
                if n % every == 0:
                    place = head * rooms + n // every
                    tl.store(W1_kept + place * d * f + up + j, W1)
                    tl.store(W2_kept + place * d * f + down + j * d, W2)
                    tl.store(b1_kept + place * f + hid + j, b1)
        if KEEP:  # noqa: SIM102
            if n % every == 0:
                tl.store(b2_kept + (head * rooms + n // every) * d + col, b2)
        z_hat, deviation = _normal(z, d, EPS)
        g = _projected(weight * (weight * z_hat + bias - target), z_hat, d) / deviation
        e = eta * g
        b2 -= tl.sum(e, 0)
        tl.store(b2_ptr + there * d + col, b2)
        q = tl.load(q_ptr + at * d + tile).to(tl.float32)
        zq = tl.zeros((b, d), tl.float32) + b2[None, :]
        for j in range(0, f, w):
            W1, W2 = tl.load(W1_ptr + here * d * f + up + j), tl.load(W2_ptr + here * d * f + down + j * d)
            b1 = tl.load(b1_ptr + here * f + hid + j)
            x2, slope, _ = _gelu(_dot(k, W1, PRECISION) + b1[None, :])
            e1 = eta * slope * _dot(g, tl.trans(W2), PRECISION)
            W1 -= _dot(tl.trans(k), e1, PRECISION)
            W2 -= _dot(tl.trans(x2), e, PRECISION)
            b1 -= tl.sum(e1, 0)
            tl.store(W1_ptr + there * d * f + up + j, W1)
            tl.store(W2_ptr + there * d * f + down + j * d, W2)
            tl.store(b1_ptr + there * f + hid + j, b1)
            if OUT:
                xq, _, _ = _gelu(_dot(q, W1, PRECISION) + b1[None, :])
                zq += _dot(xq, W2, PRECISION)
        if OUT:
            zq_hat, _ = _normal(zq, d, EPS)
            o = q + weight * zq_hat + bias
            tl.store(out_ptr + at * d + tile, o.to(out_ptr.dtype.element_ty))
        tl.debug_barrier()  # the next step loads what this one stored


@triton.jit(do_not_specialize=["length", "first", "steps", "room"])
def _backward(
    q_ptr, k_ptr, t_ptr, eta_ptr, weight_ptr, bias_ptr,
    W1_ptr, b1_ptr, W2_ptr, b2_ptr,
    do_ptr, dq_ptr, dk_ptr, dt_ptr, deta_ptr,
    dW1_ptr, db1_ptr, dW2_ptr, db2_ptr, mW1_ptr, mb1_ptr, mW2_ptr, dweight_ptr, dbias_ptr,
    heads, length, first, steps, room,
    b: tl.constexpr, d: tl.constexpr, f: tl.constexpr, w: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the steps whose states are in the slots; gradients of the state come in and go out in dW1 … db2.

    What they are between the reading of a mini-batch and the step before it is in mW1 … mW2.
    """
    head = tl.program_id(0).to(tl.int64)
    row, col, hid = tl.arange(0, b), tl.arange(0, d), tl.arange(0, w)
    tile = row[:, None] * d + col[None, :]
    up, down = head * d * f + col[:, None] * f + hid[None, :], head * d * f + hid[:, None] * d + col[None, :]
    weight = tl.load(weight_ptr + (head % heads) * d + col)[None, :]
    bias = tl.load(bias_ptr + (head % heads) * d + col)[None, :]
    dweight, dbias = tl.load(dweight_ptr + head * d + col), tl.load(dbias_ptr + head * d + col)
    db2 = tl.load(db2_ptr + head * d + col)
    for i in range(steps):
        n = steps - 1 - i
        at, here = head * length + (first + n) * b, head * room + n
        # offsets of a slot's weights from the head's own place in a tensor without slots
        old, new = (here - head) * d * f, (here + 1 - head) * d * f
        q = tl.load(q_ptr + at * d + tile).to(tl.float32)
        k = tl.load(k_ptr + at * d + tile).to(tl.float32)
        zq = tl.zeros((b, d), tl.float32) + tl.load(b2_ptr + (here + 1) * d + col)[None, :]
        z = tl.zeros((b, d), tl.float32) + tl.load(b2_ptr + here * d + col)[None, :]
        for j in range(0, f, w):
            W1, W2 = tl.load(W1_ptr + new + up + j), tl.load(W2_ptr + new + down + j * d)
            xq, _, _ = _gelu(_dot(q, W1, PRECISION) + tl.load(b1_ptr + (here + 1) * f + hid + j)[None, :])
            zq += _dot(xq, W2, PRECISION)
            W1, W2 = tl.load(W1_ptr + old + up + j), tl.load(W2_ptr + old + down + j * d)
            x2, _, _ = _gelu(_dot(k, W1, PRECISION) + tl.load(b1_ptr + here * f + hid + j)[None, :])
            z += _dot(x2, W2, PRECISION)
        do = tl.load(do_ptr + at * d + tile).to(tl.float32)
        zq_hat, deviation = _normal(zq, d, EPS)
        dweight += tl.sum(do * zq_hat, 0)
        dbias += tl.sum(do, 0)
        dzq = _projected(do * weight, zq_hat, d) / deviation
        db2 += tl.sum(dzq, 0)
        dq = do
        target = tl.load(t_ptr + at * d + tile).to(tl.float32)
        eta = tl.load(eta_ptr + at + row).to(tl.float32)[:, None]
        z_hat, deviation = _normal(z, d, EPS)
        h = weight * (weight * z_hat + bias - target)
        g = _projected(h, z_hat, d) / deviation
        de = tl.zeros((b, d), tl.float32) - db2[None, :]
        dg = tl.zeros((b, d), tl.float32)
        dk = tl.zeros((b, d), tl.float32)
        deta = tl.zeros((b,), tl.float32)
        for j in range(0, f, w):
            # reading, with the weights after the step
            W1, W2 = tl.load(W1_ptr + new + up + j), tl.load(W2_ptr + new + down + j * d)
            xq, slope, _ = _gelu(_dot(q, W1, PRECISION) + tl.load(b1_ptr + (here + 1) * f + hid + j)[None, :])
            dzq1 = _dot(dzq, tl.trans(W2), PRECISION) * slope
            dq += _dot(dzq1, tl.trans(W1), PRECISION)
            dW1 = tl.load(dW1_ptr + up + j) + _dot(tl.trans(q), dzq1, PRECISION)
            dW2 = tl.load(dW2_ptr + down + j * d) + _dot(tl.trans(xq), dzq, PRECISION)
            db1 = tl.load(db1_ptr + head * f + hid + j) + tl.sum(dzq1, 0)
            tl.store(mW1_ptr + up + j, dW1)
            tl.store(mW2_ptr + down + j * d, dW2)
            tl.store(mb1_ptr + head * f + hid + j, db1)
            # the step, at the weights before it
            W1, W2 = tl.load(W1_ptr + old + up + j), tl.load(W2_ptr + old + down + j * d)
            x2, slope, _ = _gelu(_dot(k, W1, PRECISION) + tl.load(b1_ptr + here * f + hid + j)[None, :])
            g1 = slope * _dot(g, tl.trans(W2), PRECISION)
            de1 = -_dot(k, dW1, PRECISION) - db1[None, :]
            de -= _dot(x2, dW2, PRECISION)
            dk -= _dot(eta * g1, tl.trans(dW1), PRECISION)
            deta += tl.sum(de1 * g1, 1)
            dg += _dot(eta * de1 * slope, W2, PRECISION)
        tl.store(dq_ptr + at * d + tile, dq.to(dq_ptr.dtype.element_ty))
        deta += tl.sum(de * g, 1)
        tl.store(deta_ptr + at + row, deta.to(deta_ptr.dtype.element_ty))
        dg += eta * de
        # g is what is left of h without its mean and its part along z_hat, over the deviation
        u = dg / deviation
        dh = _projected(u, z_hat, d)
        along, part = tl.sum(u * z_hat, 1) / d, tl.sum(h * z_hat, 1) / d
        dz_hat = weight * weight * dh - u * part[:, None] - h * along[:, None]
        ddeviation = -tl.sum(dg * g, 1)[:, None] / deviation  # type: ignore[reportArgumentType]
        dweight += tl.sum(dh * (2 * weight * z_hat + bias - target), 0)
        dbias += tl.sum(dh * weight, 0)
        tl.store(dt_ptr + at * d + tile, (-dh * weight).to(dt_ptr.dtype.element_ty))
        dz = _projected(dz_hat, z_hat, d) / deviation + ddeviation * z_hat / d
        db2 += tl.sum(dz, 0)
        tl.debug_barrier()  # what was stored between is loaded again
        for j in range(0, f, w):
            W1, W2 = tl.load(W1_ptr + old + up + j), tl.load(W2_ptr + old + down + j * d)
            dW1, dW2 = tl.load(mW1_ptr + up + j), tl.load(mW2_ptr + down + j * d)
            db1 = tl.load(mb1_ptr + head * f + hid + j)
            x2, slope, curve = _gelu(_dot(k, W1, PRECISION) + tl.load(b1_ptr + here * f + hid + j)[None, :])
            p = _dot(g, tl.trans(W2), PRECISION)
            dg1 = eta * (-_dot(k, dW1, PRECISION) - db1[None, :])
            dx2 = _dot(dz, tl.trans(W2), PRECISION) - _dot(eta * g, tl.trans(dW2), PRECISION)
            dz1 = dx2 * slope + dg1 * p * curve
            dk += _dot(dz1, tl.trans(W1), PRECISION)
            dW1 += _dot(tl.trans(k), dz1, PRECISION)
            dW2 += _dot(tl.trans(x2), dz, PRECISION) + _dot(tl.trans(dg1 * slope), g, PRECISION)
            tl.store(dW1_ptr + up + j, dW1)
            tl.store(dW2_ptr + down + j * d, dW2)
            tl.store(db1_ptr + head * f + hid + j, db1 + tl.sum(dz1, 0))
        tl.store(dk_ptr + at * d + tile, dk.to(dk_ptr.dtype.element_ty))
        tl.debug_barrier()  # the step before loads what was stored
    tl.store(db2_ptr + head * d + col, db2)
    tl.store(dweight_ptr + head * d + col, dweight)
    tl.store(dbias_ptr + head * d + col, dbias)
