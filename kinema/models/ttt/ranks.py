"""What a network for long videos asks of the others where ranks share the segments of a video; alone, nothing."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kinema.models.ttt.order import Segments, Shared


class Ranks(Protocol):
    """The ranks that share a video, each of which has consecutive segments of it.

    All functions pass gradients on. `rank` counts from the beginning of the video.
    """

    rank: int
    size: int

    def heads(self, x: Tensor, longest: int) -> Tensor:
        """All tokens `[B, H / size, size · longest, …]` of a part of the heads, from this rank's `[B, H, l, …]` of all.

        Every rank's tokens are filled up to `longest`.
        """
        ...

    def tokens(self, x: Tensor, own: int) -> Tensor:
        """The inverse of `heads`, of this rank's `own` tokens."""
        ...

    def from_left(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """x, to be used in its place, and the last `count` rows of dim 1 of the rank before; of the first rank,
        zeros."""
        ...

    def from_right(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, to be used in its place, and the first row of dim 1 of the rank after; of the last rank, zeros."""
        ...

    def whole(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """All ranks' rows of dim 1, `lengths` of them, one rank after the other."""
        ...


class Alone:
    """One process with all segments."""

    rank, size = 0, 1

    def heads(self, x: Tensor, longest: int) -> Tensor:
        return x

    def tokens(self, x: Tensor, own: int) -> Tensor:
        return x

    def from_left(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody is to the left")

    def from_right(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody is to the right")

    def whole(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        return x


def share_of(count: int, rank: int, size: int) -> range:
    """The segments of a rank: as even as whole segments allow, the first ranks having one more."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def shared(segments: Segments, size: int) -> Shared:
    """How the tokens of a video lie over `size` ranks."""
    import torch

    parts = []
    for rank in range(size):
        share = share_of(segments.count, rank, size)
        texts = torch.arange(share.start * segments.text, share.stop * segments.text)
        video = segments.count * segments.text
        frames = segments.frames_of(share)
        own = torch.arange(video + frames.start * segments.tokens, video + frames.stop * segments.tokens)
        parts.append(torch.cat([texts, own]))
    longest = max(len(part) for part in parts)
    index = torch.full((size, longest), -1)
    for row, part in zip(index, parts, strict=True):
        row[: len(part)] = part
    return Shared(index.flatten(), longest)
