"""A long recurrence whose backward pass replays it piece by piece from stored states: the only memory it takes is the
states at the cuts, whatever it computes in between."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
# (a piece of each stream, the shared tensors, the state) → (a piece of the output, the next state)
SHORT = 1 << 24  # numbers of a stream; of shorter ones, at small sizes, everything is kept and nothing runs twice
Run = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], State], tuple[Tensor, State]]


def replayed(
    run: Run, cuts: Sequence[int], streams: tuple[Tensor, ...], shared: tuple[Tensor, ...], state: State
) -> tuple[Tensor, State]:
    """`run` over consecutive pieces of the streams, cut along dim 2 into the lengths `cuts`.

    Returns the outputs joined along dim 2 and the last state, with gradients for streams, shared tensors and state. In
    the backward pass each piece runs once more, from the state it began with, unless the streams are short.
    """
    if streams[0].numel() < SHORT:
        outputs = []
        for piece in zip(*(stream.split(tuple(cuts), dim=2) for stream in streams), strict=True):
            out, state = run(piece, shared, state)
            outputs.append(out)
        return torch.cat(outputs, dim=2), state
    out, *last = _Replayed.apply(run, tuple(cuts), len(streams), len(shared), *streams, *shared, *state)  # type: ignore
    return out, tuple(last)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, cuts: tuple[int, ...], streams: int, shared: int, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        ctx.run, ctx.cuts, ctx.counts = run, cuts, (streams, shared)
        parts = [tensor.split(cuts, dim=2) for tensor in tensors[:streams]]
        given, state = tensors[streams : streams + shared], tensors[streams + shared :]
        keep, began, outputs = any(ctx.needs_input_grad), [], []
        for piece in zip(*parts, strict=True):
            began += state if keep else ()
            out, state = run(piece, given, state)
            outputs.append(out)
        if keep:
            ctx.save_for_backward(*tensors[: streams + shared], *began)
        # what is returned must not be what was given
        state = tuple(s.clone() if any(s is t for t in tensors) else s for s in state)
        return torch.cat(outputs, dim=2), *state

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None):  # type: ignore[override]
        streams, shared = ctx.counts
        saved = ctx.saved_tensors
        parts = [tensor.split(ctx.cuts, dim=2) for tensor in saved[:streams]]
        given, began = saved[streams : streams + shared], saved[streams + shared :]
        size = len(began) // len(ctx.cuts)
        grads: list[list[Tensor | None]] = [[None] * len(ctx.cuts) for _ in range(streams)]
        total: list[Tensor | None] = [None] * shared
        out_parts = [None] * len(ctx.cuts) if grad_out is None else grad_out.split(ctx.cuts, dim=2)
        after = list(grad_state)
        for n in reversed(range(len(ctx.cuts))):
            leaves = [part[n].detach().requires_grad_() for part in parts]
            common = [tensor.detach().requires_grad_() for tensor in given]
            state = [tensor.detach().requires_grad_() for tensor in began[n * size : (n + 1) * size]]
            with torch.enable_grad():
                out, next_state = ctx.run(tuple(leaves), tuple(common), tuple(state))
            ends = [(o, g) for o, g in zip((out, *next_state), (out_parts[n], *after), strict=True) if g is not None]
            ends = [(o, g) for o, g in ends if o.requires_grad]
            inputs = [*leaves, *common, *state]
            if not ends:
                continue
            found = torch.autograd.grad([o for o, _ in ends], inputs, [g for _, g in ends], allow_unused=True)
            for i in range(streams):
                grads[i][n] = found[i]
            for i in range(shared):
                total[i] = _sum(total[i], found[streams + i])
            after = list(found[streams + shared :])
        joined = [
            None
            if all(g is None for g in pieces)
            else torch.cat([torch.zeros_like(p) if g is None else g for g, p in zip(pieces, part, strict=True)], dim=2)
            for pieces, part in zip(grads, parts, strict=True)
        ]
        return None, None, None, None, *joined, *total, *after


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
