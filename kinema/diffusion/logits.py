"""What a token denoiser estimates: logits over K codes that only ever exist a few rows at a time.

All rows of one video at once would be gigabytes (33,280 tokens x 64,000 codes). So an estimate is the hidden rows and
the head, and whatever reads logits is a loop over chunks of rows, run inside the head's own forward: what shards the
head gathers it once per loop. The graded loops know their gradients in closed form and keep no logits for them.

Shapes: n rows (the tokens of all videos), D hidden width, K codes. Logits are float32 (float64 for float64 heads)
whatever the operands of the head's product: those of size 20 would have a spacing of 0.125 in bfloat16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Loop = Callable[[Tensor, Tensor], R]  # (hidden [..., D], weight [K, D]) → result
Entered = tuple[tuple[Tensor, Tensor], ...]  # hidden rows and weight of each of several logits
# (rows, the student's logits [rows, K] on demand, the others' logits) → direction [rows, K] and named numbers [rows]
Direction = Callable[[slice, Callable[[], Tensor], tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]


class Head(Protocol):
    """The linear map from hidden rows to logits: calls `loop(hidden, its weight)` where its weight is whole."""

    def __call__(self, hidden: Tensor, loop: Loop[R]) -> R: ...


class Drawn(NamedTuple):
    """Tokens drawn from logits, the logarithm of their probability and the entropy they were drawn with, in nats."""

    tokens: Tensor  # [...] int64
    log_prob: Tensor  # [...]
    entropy: Tensor  # [...]


@dataclass(frozen=True, eq=False)
class Logits:
    """hidden @ head.T, not computed. Closed under what guidance does: sums and multiples of one head's logits.

    `dtype` is that of the product's operands; where combined rows are more precise than it, none of that is lost.
    """

    hidden: Tensor  # [..., D]
    head: Head
    dtype: torch.dtype
    rows: int = 1024

    @property
    def shape(self) -> torch.Size:
        """The shape of the tokens."""
        return self.hidden.shape[:-1]

    def __add__(self, other: "Logits") -> "Logits":
        assert self.head is other.head, "logits of two heads do not combine into logits of one"
        return replace(self, hidden=_wide(self.hidden) + _wide(other.hidden))

    def __sub__(self, other: "Logits") -> "Logits":
        return self + -1.0 * other

    def __mul__(self, w: float | Tensor) -> "Logits":
        return replace(self, hidden=_wide(self.hidden) * (w[..., None] if isinstance(w, Tensor) else w))

    __rmul__ = __mul__

    def chunk(self, parts: int) -> tuple["Logits", ...]:
        """Equal parts of the batch, as `Tensor.chunk`."""
        return tuple(replace(self, hidden=part) for part in self.hidden.chunk(parts))

    def detach(self) -> "Logits":
        return replace(self, hidden=self.hidden.detach())

    def whole(self) -> Tensor:
        """The logits `[..., K]` as one tensor, without gradient: for sizes at which one may look at them."""

        def loop(hidden: Tensor, weight: Tensor) -> Tensor:
            return torch.cat([z for _, z in _chunks(hidden, weight, self)])

        with torch.no_grad():
            return self.head(self.hidden, loop).unflatten(0, self.shape)


def draw(logits: Logits, u: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Drawn:
    """One token per row by inverse CDF in code order: the smallest k whose cumulative probability exceeds `u` `[...]`.

    So a token depends on its own row and number alone, not on chunks or other rows. `temperature` divides the logits;
    `top_p` < 1 draws from the fewest codes that hold this probability. No gradient.
    """

    def loop(hidden: Tensor, weight: Tensor) -> Drawn:
        flat, made = u.flatten(), []
        for rows, z in _chunks(hidden, weight, logits):
            z = _tempered(z, temperature, top_p)
            tokens = categorical(z, flat[rows])
            log_p = z.log_softmax(-1)
            p = log_p.exp()
            entropy = -torch.special.xlogy(p, p).sum(-1)
            made.append(Drawn(tokens, log_p.gather(-1, tokens[:, None])[:, 0], entropy))
        return Drawn(*(torch.cat(column).view(logits.shape) for column in zip(*made, strict=True)))

    with torch.no_grad():
        return logits.head(logits.hidden, loop)


def tokens(logits: Logits, u: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The tokens of `draw` alone, for a third of its passes over the logits."""

    def loop(hidden: Tensor, weight: Tensor) -> Tensor:
        flat = u.flatten()
        parts = _chunks(hidden, weight, logits)
        return torch.cat([categorical(_tempered(z, temperature, top_p), flat[rows]) for rows, z in parts])

    with torch.no_grad():
        return logits.head(logits.hidden, loop).view(logits.shape)


def categorical(z: Tensor, u: Tensor) -> Tensor:
    """The smallest k with cdf_k > u·cdf_last, for unnormalised log-probabilities `[..., K]` and u in [0, 1) `[...]`.

    A code of probability 0 is never drawn, also where u·cdf_last rounds up; a row of nothing but -inf gives some code.
    """
    finite = z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    return first_above((z - finite).exp_().cumsum(-1), u)


def first_above(cdf: Tensor, u: Tensor) -> Tensor:
    """The smallest k with cdf_k > u·cdf_last, for sums of weights `[..., K]`, as `categorical`."""
    last = cdf[..., -1:]
    below = torch.minimum(u[..., None].to(cdf.dtype) * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cdf, below, right=True)[..., 0].clamp(max=cdf.shape[-1] - 1)


def cross_entropy(logits: Logits, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-Σ_k q_k log p_k of every token, shaped like `targets` `[...]`; q is `targets`, mixed with `smoothing` uniform.

    The gradient is formed chunk by chunk in the backward pass, for any weighting of the result.
    """

    def loop(hidden: Tensor, weight: Tensor) -> Tensor:
        return _CrossEntropy.apply(hidden, weight, targets, smoothing, logits)  # type: ignore[return-value]

    return logits.head(logits.hidden, loop)


def steer(
    student: Logits, others: Sequence[Logits], direction: Direction, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss whose gradient at the student's logits is `scale`·g, g the rows of `direction`; and its reports `[n]`.

    The gradients that reach hidden rows and head, g W and gᵀ h, are formed here, where all heads are at hand; the
    backward pass only scales them. The loss's value is scale/2·‖g‖². Rows of g that are not finite count as zero, and
    "nonfinite" reports them.
    """

    all_ = (student, *others)
    with torch.no_grad():
        parts, value, reports = _within(all_, lambda entered: _form(entered, all_, direction, scale))
    return student.head(student.hidden, lambda h, w: _Steered.apply(h, w, *parts, value)), reports  # type: ignore[return-value]


def compare(
    logits: Sequence[Logits], judge: Callable[[slice, tuple[Tensor, ...]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Named numbers `[n]` that `judge` makes of (rows, the logits `[rows, K]` of each), without gradient."""

    def loop(entered: Entered) -> dict[str, Tensor]:
        weights = [weight.to(one.dtype) for (_, weight), one in zip(entered, logits, strict=True)]
        hiddens = [hidden.flatten(0, -2) for hidden, _ in entered]
        parts = []
        for rows in _slices(len(hiddens[0]), logits[0].rows):
            zs = tuple(product(h[rows], w) for h, w in zip(hiddens, weights, strict=True))
            parts.append(judge(rows, zs))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    with torch.no_grad():
        return _within(logits, loop)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden `[n, D]` @ weight `[K, D]`.T with wide accumulation and result; `weight` is in the operands' dtype.

    Rows more precise than a bfloat16 weight go through it in two parts, high and low.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return hidden.to(weight.dtype) @ weight.T
        high = hidden.to(weight.dtype)
        if high.dtype == hidden.dtype:
            return _narrow_product(high, weight.T)
        return _narrow_product(high, weight.T) + _narrow_product((hidden - high).to(weight.dtype), weight.T)


def _within(logits: Sequence[Logits], loop: Callable[[Entered], R], entered: Entered = ()) -> R:
    """`loop` of all these logits' hidden rows and weights, run inside the forwards of all their heads.

    No closure that calls itself: it would refer to itself, and so keep alive until garbage is collected what it refers
    to, the student's autograd graph.
    """
    if not logits:
        return loop(entered)
    return logits[0].head(logits[0].hidden, lambda h, w: _within(logits[1:], loop, (*entered, (h, w))))


def _form(
    entered: Entered, logits: tuple[Logits, ...], direction: Direction, scale: float
) -> tuple[tuple[Tensor, Tensor | None], Tensor, dict[str, Tensor]]:
    """scale·(g W, gᵀ h), scale/2·‖g‖² and the reports."""
    hiddens = [hidden.flatten(0, -2) for hidden, _ in entered]
    weights = [weight.detach().to(one.dtype) for (_, weight), one in zip(entered, logits, strict=True)]
    hidden, weight, master = hiddens[0], weights[0], entered[0][1]
    to_hidden = torch.empty_like(hidden)
    to_weight = torch.zeros_like(master, dtype=_wide_dtype(master.dtype)) if master.requires_grad else None
    value = torch.zeros((), device=hidden.device, dtype=_wide_dtype(weight.dtype))
    reports: dict[str, list[Tensor]] = {}
    for rows in _slices(len(hidden), logits[0].rows):
        zs = tuple(product(h[rows], w) for h, w in zip(hiddens[1:], weights[1:], strict=True))
        g, report = direction(rows, lambda rows=rows: product(hidden[rows], weight), zs)
        finite = g.isfinite().all(-1)
        g = torch.where(finite[:, None], g, 0)
        for name, numbers in {**report, "nonfinite": (~finite).to(g.dtype)}.items():
            reports.setdefault(name, []).append(numbers)
        value += 0.5 * scale * g.square().sum()
        narrow = (scale * g).to(weight.dtype)
        to_hidden[rows] = product(narrow, weight.T)
        if to_weight is not None:
            to_weight += product(narrow.T, hidden[rows].to(weight.dtype).T)
    shaped = to_hidden.view(entered[0][0].shape)
    return (shaped, to_weight), value, {name: torch.cat(parts) for name, parts in reports.items()}


class _Steered(torch.autograd.Function):
    """A given value whose gradients at hidden rows and weight are given too."""

    @staticmethod
    def forward(ctx, hidden, weight, to_hidden, to_weight, value):
        ctx.save_for_backward(to_hidden, to_weight)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return grad.to(to_hidden.dtype) * to_hidden, None if to_weight is None else grad * to_weight, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, smoothing, logits):
        flat, losses, lses = targets.flatten(), [], []
        for rows, z in _chunks(hidden, weight, logits):
            lse = z.logsumexp(-1)
            right = z.gather(-1, flat[rows, None])[:, 0]
            losses.append(lse - (1 - smoothing) * right - (smoothing * z.mean(-1) if smoothing else 0))
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, flat, torch.cat(lses))
        ctx.smoothing, ctx.logits = smoothing, logits.detach()
        return torch.cat(losses).view(targets.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight, flat, lse = ctx.saved_tensors
        smoothing, grad = ctx.smoothing, grad.flatten()
        narrow = weight.to(ctx.logits.dtype)
        rows_of = hidden.flatten(0, -2)
        to_hidden = torch.empty_like(rows_of)
        to_weight = torch.zeros_like(weight, dtype=_wide_dtype(weight.dtype)) if ctx.needs_input_grad[1] else None
        for rows, z in _chunks(hidden, weight, ctx.logits):
            g = (z - lse[rows, None]).exp() - smoothing / z.shape[-1]
            g.scatter_add_(-1, flat[rows, None], g.new_full((1, 1), smoothing - 1).expand(len(g), 1))
            g = (g * grad[rows, None]).to(narrow.dtype)
            to_hidden[rows] = product(g, narrow.T)
            if to_weight is not None:
                to_weight += product(g.T, rows_of[rows].to(narrow.dtype).T)
        return to_hidden.view(hidden.shape), to_weight, None, None, None


def _chunks(hidden: Tensor, weight: Tensor, logits: Logits) -> Iterator[tuple[slice, Tensor]]:
    """The logits of consecutive slices of rows."""
    flat, weight = hidden.flatten(0, -2), weight.detach().to(logits.dtype)
    for rows in _slices(len(flat), logits.rows):
        yield rows, product(flat[rows], weight)


def _slices(n: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _tempered(z: Tensor, temperature: float, top_p: float) -> Tensor:
    z = z if temperature == 1 else z / temperature
    if top_p >= 1:
        return z
    p, order = z.softmax(-1).sort(-1, descending=True)
    outside = (p.cumsum(-1) - p >= top_p).scatter(-1, order, p.cumsum(-1) - p >= top_p)
    return z.masked_fill(outside, -torch.inf)


def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half-width matrices, accumulated and kept in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x.dtype))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
