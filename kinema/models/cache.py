"""The keys and values of the frames a causal model has made: a ring of frames that is written in place and never moved.

Passes under no_grad write their own frames into the slots these have in the ring, and attend to the ring as it lies,
for attention knows no order. Passes with gradients only read: they attend to what is cached, as constants, and to their
own keys and values. So no gradient reaches earlier chunks, and a recomputation sees what the pass saw. All cursors are
integers on the host; nothing is read back from the device.
Shapes: B batch, N heads, L tokens of a pass, n tokens of a frame, D head dim. Stored are `[B, slots · n, N, D]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.models.attention import attend
from kinema.models.causality import Attend, Turn, Window, joined
from kinema.models.layers import rotate

Spans = tuple[tuple[int, int], ...]  # begin and end along the stored tokens


class Cache:
    """What one sequence of chunks keeps: the ring of every layer, and the keys and values of the text.

    `capacity` is how many frames the ring has: those a pass sees, and beyond them those that passes with gradients saw
    whose backward recomputes them. Memory appears with the first write, shaped as what is written: with the heads that
    are here under tensor parallelism, in the dtype the network computes in. A denoiser takes it as `cache=`.
    """

    def __init__(self, layers: int, capacity: int, window: Window):
        self.capacity, self.window = capacity, window
        self.stores = [Store() for _ in range(layers)]
        self.texts = [Text() for _ in range(layers)]
        self.text_bias: Tensor | None = None  # of attention to the text, whose rows may stand for several
        self.frames = 0  # how many are committed: where the next pass begins
        self._held: list[int | None] = [None] * capacity  # the frame in each slot
        self._anchored = 0  # how far the ring's sink keys are moved
        self._graded = False  # whether a backward may still read the stores
        self._shape: tuple[int, int] | None = None  # batch, tokens of a frame

    def reset(self) -> None:
        """Forgets everything, for another sequence; the memory stays."""
        self.rewind()
        self.forget_text()

    def rewind(self) -> None:
        """Forgets the frames. What passes with gradients have read is left to their backward; new memory follows."""
        if self._graded:
            self.stores = [Store() for _ in self.stores]
        self.frames, self._anchored, self._graded, self._shape = 0, 0, False, None
        self._held = [None] * self.capacity

    def forget_text(self) -> None:
        """Lets the next pass under no_grad compute the text's keys and values anew: after a change of the prompt."""
        self.texts = [Text() for _ in self.texts]
        self.text_bias = None

    @property
    def has_text(self) -> bool:
        return all(text.k is not None for text in self.texts)

    @property
    def nbytes(self) -> int:
        """The memory of everything kept."""
        kept = [tensor for part in (*self.stores, *self.texts) for tensor in vars(part).values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)

    def slot(self, frame: int) -> int:
        """Where a frame is kept: sinks first, then a ring."""
        sink = self.window.sink
        return frame if frame < sink else sink + (frame - sink) % (self.capacity - sink)

    def begin(
        self,
        frames: int,
        batch: int,
        tokens: int,
        graded: bool,
        anchor: Callable[[int], Turn],
        device: torch.device,
        at: int | None = None,
    ) -> "Pass":
        """The view that a pass over the next `frames` frames of `tokens` tokens has of the cache.

        `anchor` makes the rotation that moves keys by a number of frames. A pass that only reads may begin `at` an
        earlier frame than the next. Raises ValueError if the ring is too small, or holds another batch or size of
        frames.
        """
        begin = self.frames if at is None else at
        end = begin + frames
        if begin and self._shape != (batch, tokens):
            raise ValueError(f"the cache holds (videos, tokens of a frame) {self._shape}, not {(batch, tokens)}")
        sinks, rest = self.window.seen(end)
        if max(len(sinks) + len(rest), frames) > self.capacity:
            raise ValueError(
                f"frame {end - 1} sees {len(sinks) + len(rest)} frames but the cache has room for {self.capacity}; "
                "make it for more frames, or give the model a window"
            )
        self._shape = (batch, tokens)
        anchors, shift = self.window.anchors, self.window.shift(end)
        if graded:
            self._graded = True
            seen = [g for g in (*sinks, *rest) if anchors <= g < begin]
            moved = shift
        else:
            for g in range(begin, end):
                self._held[self.slot(g)] = g
            seen = [*sinks, *rest]
            moved, self._anchored = shift != self._anchored, shift
        seen_spans = _joined(sorted(self.slot(g) for g in seen), tokens)
        return Pass(
            graded=graded,
            begin=begin * tokens,
            own=_joined([self.slot(g) for g in range(begin, end)], tokens),
            seen=seen_spans,
            capacity=self.capacity * tokens,
            anchors=anchors * tokens,
            sunk=min(anchors, begin) * tokens,
            turn=anchor(shift) if moved else None,
            index=_index(seen_spans, device) if graded and seen else None,
            expected=tuple((self.slot(g), g) for g in seen),
            held=self._held,
            cache=self,
        )

    def commit(self, frames: int) -> None:
        """Counts the frames of the last pass as made: the next pass begins after them."""
        self.frames += frames

    def read(self, layer: int, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys, rotated to the frames' own positions, and values of cached frames, `[B, len(frames) · n, N, D]`."""
        store, missing = self.stores[layer], [g for g in frames if self._held[self.slot(g)] != g]
        if missing or store.k is None or store.v is None or self._shape is None:
            raise ValueError(f"frames {missing or list(frames)} are not in the cache")
        n = self._shape[1]
        spans = [
            (store.k if store.sinks is None or g >= self.window.sink else store.sinks, self.slot(g)) for g in frames
        ]
        keys = [source[:, slot * n : (slot + 1) * n] for source, slot in spans]
        values = [store.v[:, slot * n : (slot + 1) * n] for _, slot in spans]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass's view of a cache, in tokens; the same for all layers, and still valid when they are recomputed.

    graded            whether it only reads
    begin             where its own tokens begin in the sequence
    own               the spans its own tokens have in the ring
    seen              the spans it attends to: with its own where it writes, without where it only reads
    anchors, sunk     how many tokens sinks that move have, and how many of these were made before it
    turn              the rotation that moves sinks' original keys to where it sees them; None: the original ones will
                      do or, where it writes, the ring has them moved already
    index             where it only reads, the places of `seen`
    expected, held    slots and the frames it sees in them; what the slots hold now
    cache             whose view this is: what may still be read is not given to anyone else (`FastWanCausal.new_cache`)
    """

    graded: bool
    begin: int
    own: Spans
    seen: Spans
    capacity: int
    anchors: int
    sunk: int
    turn: Turn | None
    index: Tensor | None
    expected: tuple[tuple[int, int], ...]
    held: list[int | None]
    cache: Cache

    def check(self) -> None:
        """Raises RuntimeError if slots were written over since, as a recomputation finds them in too small a ring."""
        if any(self.held[slot] != frame for slot, frame in self.expected):
            raise RuntimeError(
                "the cache was written over before the backward of a pass that read it; make it with `graded` frames"
            )


class Store:
    """The ring of one layer. Where sinks move, `sinks` keeps their keys as they were first rotated."""

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.sinks: Tensor | None = None

    def write(self, view: Pass, k_BLND: Tensor, v_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a pass's keys and values into their slots, and sinks' keys where this pass is to see them."""
        self.make_room(view, k_BLND)
        assert self.k is not None and self.v is not None
        # Through `data`, which counts no versions: a backward may hold the ring, to recompute with, while later chunks
        # are written. That these take other slots than it read, `capacity` ensures and `check` checks.
        ring_k, ring_v, at = self.k.data, self.v.data, 0
        for begin, end in view.own:
            ring_k[:, begin:end] = k_BLND[:, at : at + end - begin]
            ring_v[:, begin:end] = v_BLND[:, at : at + end - begin]
            at += end - begin
        if self.sinks is not None and view.begin < view.anchors:
            self.sinks.data[:, view.begin : view.begin + at] = k_BLND[:, : view.anchors - view.begin]
        if self.sinks is not None and view.turn is not None:
            ring_k[:, : view.anchors] = rotate(self.sinks.transpose(1, 2), *view.turn).transpose(1, 2)
        return self.k, self.v

    def make_room(self, view: Pass, k_BLND: Tensor) -> None:
        """Makes the ring for keys like these, if it is not there. Raises ValueError for others than its sequence's."""
        batch, _, heads, dim = k_BLND.shape
        shape = (batch, view.capacity, heads, dim)
        if self.k is None or self.v is None or self.k.shape != shape or self.k.dtype != k_BLND.dtype:
            if view.begin:
                raise ValueError(f"the cache of this sequence is not {k_BLND.dtype} {list(shape)}, as this pass is")
            self.k, self.v = k_BLND.new_zeros(shape), k_BLND.new_zeros(shape)
            self.sinks = k_BLND.new_zeros(batch, view.anchors, heads, dim) if view.anchors else None


class Text:
    """One layer's keys and values `[B, N, S, D]` of the text, kept from the first pass under no_grad."""

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ApartAttention:
    """Attention of one layer in a pass over several chunks that do not see each other: each to what its own view of the
    cache shows and to itself. `lengths` are their tokens."""

    each: tuple["CachedAttention", ...]
    lengths: tuple[int, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part) for attention, part in zip(self.each, parts, strict=True)], dim=2)


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """Attention of one layer in one pass: to the cache and to the pass itself.

    `within` is how the pass attends where it has several chunks and is the first, so that nothing is cached before it.
    """

    store: Store
    view: Pass
    within: Attend | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.beside(q, k, v) if self.view.graded else self.in_place(q, k, v)

    def beside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends to what is cached and to its own, which are put side by side."""
        view, keys, values = self.view, [k], [v]
        if not torch.compiler.is_compiling():
            view.check()
        if view.index is not None:
            assert self.store.k is not None and self.store.v is not None
            keys.insert(0, self.store.k.index_select(1, view.index).transpose(1, 2))
            values.insert(0, self.store.v.index_select(1, view.index).transpose(1, 2))
        if view.sunk:
            assert self.store.sinks is not None and self.store.v is not None
            sinks = self.store.sinks[:, : view.sunk].transpose(1, 2)
            keys.insert(0, sinks if view.turn is None else rotate(sinks, *view.turn))
            values.insert(0, self.store.v[:, : view.sunk].transpose(1, 2))
        return self.within(q, k, v) if self.within is not None else attend(q, joined(keys), joined(values))

    @torch.compiler.disable()  # its spans differ from chunk to chunk: compiled, each would be a program of its own
    def in_place(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes its own into the ring and attends to that as it lies."""
        ring_k, ring_v = self.store.write(self.view, k.transpose(1, 2), v.transpose(1, 2))
        if self.within is not None:
            return self.within(q, k, v)
        spans = self.view.seen
        keys, values = ([ring[:, a:b].transpose(1, 2) for a, b in spans] for ring in (ring_k, ring_v))
        return attend(q, joined(keys), joined(values))


def _index(spans: Spans, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in spans])


def _joined(slots: Sequence[int], tokens: int) -> Spans:
    """The spans of slots in their order, neighbours as one."""
    spans: list[tuple[int, int]] = []
    for slot in slots:
        if spans and spans[-1][1] == slot * tokens:
            spans[-1] = (spans[-1][0], (slot + 1) * tokens)
        else:
            spans.append((slot * tokens, (slot + 1) * tokens))
    return tuple(spans)
