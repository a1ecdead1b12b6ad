"""Which frames a frame sees in a causal model: as a rule on frames, as a mask over tokens, and as attention.

Frames are seen chunk by chunk. The attention of a whole sequence has two ways that give the same numbers: one masked
kernel (FlexAttention, on CUDA), or one dense attention for each chunk over exactly the keys it sees.
Shapes: B batch, N heads, L tokens, D head dim, F frames of the sequence (twice the video's with a clean half).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kinema.models.attention import attend
from kinema.models.layers import rotary, rotary_widths, rotate

Turn = tuple[Tensor, Tensor]  # cos and sin of a rotation
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # rotated q and k, and v, each [B, N, L, D] → [B, N, L, D]


@dataclass(frozen=True)
class Window:
    """What a chunk that ends before frame e sees: frames g < e with g < sink or g >= e - (frames - sink).

    frames    the most it sees, sink and the chunk itself included; None: everything before its end
    sink      the first frames of the video, which never leave the window: they take the places of its oldest frames
    reanchor  once the window has moved, sinks are seen right before it, at their position + e - frames, so that their
              distance does not grow with the video; off for parity with networks trained without
    """

    frames: int | None = None
    sink: int = 0
    reanchor: bool = True

    def __post_init__(self):
        if self.sink and (self.frames is None or self.frames <= self.sink):
            raise ValueError(f"{self.sink} sink frames need a window of more frames, not {self.frames}")

    @property
    def anchors(self) -> int:
        """How many sinks are moved along."""
        return self.sink if self.reanchor else 0

    def seen(self, end: int) -> tuple[range, range]:
        """The sink frames seen from a chunk that ends before frame `end`, and the frames up to there."""
        first = 0 if self.frames is None else max(0, end - (self.frames - self.sink))
        return range(min(self.sink, first)), range(first, end)

    def shift(self, end: int) -> int:
        """How far sinks are moved towards a chunk that ends before frame `end`."""
        return max(0, end - self.frames) if self.frames is not None and self.anchors else 0


@dataclass(frozen=True)
class Sight:
    """Who sees whom in one sequence. With `clean` it is [clean | noisy], the same video twice: noisy chunks see
    themselves and earlier clean chunks (teacher forcing, arXiv 2412.07772)."""

    lengths: tuple[int, ...]
    window: Window
    clean: bool = False

    def __post_init__(self):
        if self.window.frames is not None and max(self.lengths) + self.window.sink > self.window.frames:
            raise ValueError(
                f"a window of {self.window.frames} frames does not hold {self.window.sink} sink frames and a chunk of "
                f"{max(self.lengths)}; use {max(self.lengths) + self.window.sink} or more"
            )

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def slides(self) -> bool:
        """Whether sinks are seen at different places from different chunks, which no mask can express."""
        return self.window.shift(self.frames) > 0

    def chunks(self) -> list[tuple[range, list[range], int]]:
        """For each chunk: its frames, the frames it sees, the sinks first, and how far these are moved."""
        frames, found = self.frames, []
        for half in range(1 + self.clean):
            for begin, end in zip((0, *accumulate(self.lengths)), accumulate(self.lengths), strict=False):
                own = range(half * frames + begin, half * frames + end)
                sinks, rest = self.window.seen(end)
                seen = [sinks, range(rest.start, max(rest.start, begin)), own] if half else [sinks, rest]
                found.append((own, [part for part in seen if part], self.window.shift(end)))
        return found

    def predicate(self, tokens: int, device: torch.device) -> Callable[..., Tensor]:
        """(sample, head, query, key) → whether that query token sees that key token, `tokens` of them in a frame."""
        spans = [own for own, _, _ in self.chunks()]
        ends = list(accumulate(self.lengths)) * (1 + self.clean)
        begin, end, chunk = (
            torch.tensor([value for span, value in zip(spans, values, strict=True) for _ in span], device=device)
            for values in ([e - len(s) for e, s in zip(ends, spans, strict=True)], ends, range(len(spans)))
        )
        sink, kept = self.window.sink, None if self.window.frames is None else self.window.frames - self.window.sink

        def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            f, g = query // tokens, key // tokens
            earlier = g < begin[f]
            if kept is not None:
                earlier = earlier & ((g < sink) | (g >= end[f] - kept))
            return earlier | (chunk[f] == chunk[g])

        return sees

    def mask(self, tokens: int, device: torch.device) -> Tensor:
        """The mask over tokens `[L, L]`, True where the row's token sees the column's."""
        index = torch.arange(self.frames * (1 + self.clean) * tokens, device=device)
        return self.predicate(tokens, device)(index, index, index[:, None], index[None, :])


def causal_attention(sight: Sight, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Attend:
    """How a whole sequence attends to itself: masked on CUDA, chunk by chunk elsewhere and where no mask can say it."""
    if device.type == "cuda" and dtype != torch.float64 and not sight.slides:
        return MaskedAttention(block_mask(sight, tokens, device))
    return ChunkedAttention(sight, tokens, head_dim, device, dtype)


class ChunkedAttention:
    """One dense attention for each chunk, over the keys it sees."""

    def __init__(self, sight: Sight, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.sight, self.tokens = sight, tokens
        shifts = {shift for _, _, shift in sight.chunks()} - {0}
        self.turns = {shift: anchoring(shift, head_dim, device, dtype) for shift in shifts}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = []
        for own, seen, shift in self.sight.chunks():
            keys = [self._frames(k, part) for part in seen]
            if shift:
                keys[0] = rotate(keys[0], *self.turns[shift])
            values = [self._frames(v, part) for part in seen]
            made.append(attend(self._frames(q, own), joined(keys), joined(values)))
        return torch.cat(made, dim=2)

    def _frames(self, x: Tensor, frames: range) -> Tensor:
        return x[:, :, frames.start * self.tokens : frames.stop * self.tokens]


class MaskedAttention:
    """One FlexAttention kernel for the whole sequence."""

    def __init__(self, mask: Any):
        self.mask = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex()(q, k, v, block_mask=self.mask)


@lru_cache(maxsize=16)
def block_mask(sight: Sight, tokens: int, device: torch.device) -> Any:
    """FlexAttention's mask of a sequence, built once for each sequence, size of frame and device."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = sight.frames * (1 + sight.clean) * tokens
    # Compiled, the builder never holds the dense mask, which at 480x832 and 42 frames has 4 billion entries.
    compiled = device.type == "cuda"
    predicate = sight.predicate(tokens, device)
    return create_block_mask(predicate, None, None, length, length, device=device, _compile=compiled)


@lru_cache(maxsize=1)
def flex() -> Callable[..., Any]:
    """The compiled kernel; where it is called from compiled code, it becomes part of that."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def anchoring(shift: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Turn:
    """The rotation `[1, D/2]` that moves rotated keys by `shift` frames."""
    positions = [torch.full((1,), n, device=device) for n in (shift, 0, 0)]
    return rotary(positions, rotary_widths(head_dim), dtype)


def joined(parts: list[Tensor]) -> Tensor:
    """Parts along the tokens as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
