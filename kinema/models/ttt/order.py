"""In which order a global mixer walks over a long video: index maps, made once per batch and shared by all blocks.

Natural order is that of the network: the text of all segments, then the video, frame by frame. A scan takes a segment's
text and then its frames, segment after segment; segment 0 owns the first frame, which others share with a neighbour.

Shapes: B batch, L tokens, C segments, S text tokens of a segment, P tokens of a frame, T frames.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.models.ttt.turn import Turn

Kind = Literal["reference", "segments"]


@dataclass(frozen=True)
class Segments:
    """A video of `count` segments of `stride` + 1 frames, each of which shares its first with the one before."""

    count: int
    stride: int
    rows: int
    columns: int
    text: int

    @classmethod
    def of(cls, grid: tuple[int, int, int], count: int, stride: int, text: int) -> "Segments":
        """Raises UserError if a video of this grid of patches (frames, rows, columns) is not `count` segments."""
        frames, rows, columns = grid
        if frames != count * stride + 1:
            fits = (frames - 1) // stride
            whole = (frames - 1) % stride == 0 and fits > 0
            right = f"{fits} prompts" if whole else f"{max(1, fits)} prompts and {max(1, fits) * stride + 1} frames"
            raise UserError(
                f"{frames} latent frames are not {count} segments of {stride} + 1, which need "
                f"{count * stride + 1}; give {right}"
            )
        return cls(count, stride, rows, columns, text)

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.rows * self.columns

    @property
    def frames(self) -> int:
        return self.count * self.stride + 1

    @property
    def length(self) -> int:
        return self.count * self.text + self.frames * self.tokens

    def frames_of(self, share: range) -> range:
        """The frames that belong to consecutive segments."""
        return range(self.own(share.start).start, self.own(share.stop - 1).stop)

    def own(self, segment: int) -> range:
        """The frames that a scan visits with a segment."""
        return range(segment * self.stride + (segment > 0), (segment + 1) * self.stride + 1)


@dataclass(frozen=True, eq=False)
class Shared:
    """How natural tokens lie over ranks: rank r has its segments' texts and then its frames, filled up to `longest`.

    index  natural position of each place, ranks one after the other; -1 where a rank has nothing
    """

    index: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class ScanOrder:
    """One walk over the tokens of a batch.

    index       `[1 or B, n]` scan position → token; n is a multiple of what was asked for
    inverse     `[1 or B, L]` token → scan position
    valid       `[1 or B, n]` False: filled up by the last token, which then must not count
    known       `[1 or B, L]` False: padding, which no scan visits
    groups      lengths of groups of consecutive tokens: segments, or parts of them
    turn        the rotation of a token's q and k on this walk, for video tokens in natural order
    everything  whether no token is padding, as far as is known without looking
    longest     the tokens of a rank, filled up, where ranks share them
    """

    index: Tensor
    inverse: Tensor
    valid: Tensor
    known: Tensor
    groups: tuple[int, ...]
    turn: Turn
    everything: bool
    longest: int = 0

    def gather(self, x: Tensor) -> Tensor:
        """`[B, H, L]` or `[B, H, L, d]` from natural into scan order."""
        return _take(x, self.index)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse; zero at padding."""
        natural = _take(x, self.inverse)
        known = self.known[:, None] if x.ndim == 3 else self.known[:, None, :, None]
        return natural.masked_fill(~known, 0)


def scan_order(
    segments: Segments,
    turn: Turn,
    valid: Tensor | None = None,
    backward: bool = False,
    kind: Kind = "segments",
    multiple: int = 1,
    compact: bool = True,
    group: int = 0,
    even: bool = False,
    shared: Shared | None = None,
) -> ScanOrder:
    """The walk of one direction. `turn` is what it turns q and k of natural video tokens by.

    valid     `[B, C, S]` which text tokens are words; None: all. Others are left out, or, without `compact`, stay where
              they are and are marked: then groups are alike in the whole batch
    kind      "reference" goes back through the video alone, token by token, while the texts only change places; so a
              segment's text is followed by other frames, and `turn` is to be flipped. "segments" goes back
              through segments with their own text, at true positions
    multiple  the number of scan positions is a multiple of this
    group     frames of a group, 0: a segment
    even      groups are filled up to the longest one, so that walks there and back are cut alike
    shared    where the tokens are if ranks share them
    """
    device = turn.device
    path, groups = _walk(segments, backward, kind, group, device)
    real = torch.ones_like(path, dtype=torch.bool)
    if even:
        path, real, groups = _evened(path, real, groups)
    known = torch.ones(1, segments.length, dtype=torch.bool, device=device)
    if valid is not None:
        words = valid.to(device).flatten(1)
        known = torch.cat([words, known[:, words.shape[1] :].expand(len(words), -1)], dim=1)
    if shared is not None:
        index = shared.index.to(device)
        places = torch.empty(segments.length + 1, dtype=torch.long, device=device)  # the last for what fills up
        places[index.where(index >= 0, segments.length)] = torch.arange(len(index), device=device)
        path, known = places[path], known[:, index.clamp(min=0)] & (index >= 0)
    visited = known[:, path] & real
    index = path.expand(len(known), -1)
    if compact and valid is not None:
        first_words = (~visited).to(torch.uint8).argsort(dim=1, stable=True)
        index, visited = index.gather(1, first_words), visited.gather(1, first_words)
    elif not compact:
        multiple = 1
    index, visited = _filled(index, visited, multiple, compact)
    everything = valid is None and shared is None
    longest = 0 if shared is None else shared.longest
    inverse = _inverse(index, visited, known.shape[1])
    return ScanOrder(index, inverse, visited, known, groups, turn, everything, longest)


def _walk(
    segments: Segments, backward: bool, kind: Kind, group: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """Natural positions in scan order, all text included, and the lengths of groups."""
    tokens, count = segments.tokens, segments.count
    video = torch.arange(count * segments.text, segments.length, device=device)
    parts, groups = [], []
    if kind == "reference":
        video = video.flip(0) if backward else video
        texts, spans = [count - 1 - i if backward else i for i in range(count)], range(count)
    else:
        spans = [count - 1 - i if backward else i for i in range(count)]
        texts = spans
    for text, span in zip(texts, spans, strict=True):
        parts.append(torch.arange(text * segments.text, (text + 1) * segments.text, device=device))
        own = segments.own(span)
        frames = video[own.start * tokens : own.stop * tokens]
        parts.append(frames.flip(0) if backward and kind == "segments" else frames)
        size = group or len(own)
        lengths = [tokens * min(size, len(own) - start) for start in range(0, len(own), size)]
        groups += [segments.text + lengths[0], *lengths[1:]]
    return torch.cat(parts), tuple(groups)


def _evened(path: Tensor, real: Tensor, groups: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    longest, places, marks = max(groups), [], []
    for part, mark in zip(path.split(groups), real.split(groups), strict=True):
        more = longest - len(part)
        places += [part, part[-1:].expand(more)]
        marks += [mark, torch.zeros_like(mark[:1]).expand(more)]
    return torch.cat(places), torch.cat(marks), (longest,) * len(groups)


def _filled(index: Tensor, visited: Tensor, multiple: int, compact: bool) -> tuple[Tensor, Tensor]:
    """A length that is a multiple; what is no word is the last token again, whose statistics are not degenerate."""
    more = -index.shape[1] % multiple
    if more:
        index = torch.cat([index, index[:, -1:].expand(-1, more)], dim=1)
        visited = torch.cat([visited, torch.zeros_like(visited[:, :1]).expand(-1, more)], dim=1)
    if compact:
        last = index.gather(1, visited.sum(1, keepdim=True) - 1)
        index = torch.where(visited, index, last)
    return index, visited


def _inverse(index: Tensor, visited: Tensor, length: int) -> Tensor:
    inverse = index.new_zeros(len(index), length + 1)
    places = torch.arange(index.shape[1], device=index.device).expand(len(index), -1)
    inverse.scatter_(1, torch.where(visited, index, length), places)
    return inverse[:, :length]


def _take(x: Tensor, index: Tensor) -> Tensor:
    if len(index) == 1:
        return x.index_select(2, index[0])
    index = index[:, None] if x.ndim == 3 else index[:, None, :, None]
    shape = list(x.shape)
    shape[2] = index.shape[2]
    return x.gather(2, index.expand(shape))
