"""Shapes that clips are cut to, and the order in which a run meets them.

A bucket is (frames, height, width): what does not fit one is cropped to it, never distorted, and what is too short or
too small for all of them is left out, never filled up. All samples of an optimizer step are of one bucket, so all ranks
compute the same shape.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from kinema import seeds
from kinema.data.decode import covering
from kinema.errors import UsageError

ASPECTS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)  # width over height


@dataclass(frozen=True, order=True)
class Bucket:
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def buckets(
    frames: Sequence[int],
    height: int,
    width: int,
    aspects: Sequence[float],
    unit: int,
    valid: Callable[[int, int, int], object],
) -> tuple[Bucket, ...]:
    """All lengths at `height` x `width` and, of about its area and not above it, at the other aspects.

    `valid(frames, height, width)` raises UsageError for what a model cannot take; sides are multiples of `unit`.
    """
    sizes = {(height, width)}
    for aspect in aspects:
        high = (height * width / aspect) ** 0.5
        fitting = [
            (h, w)
            for h in (int(high // unit) * unit, (int(high // unit) + 1) * unit)
            for w in (int(h * aspect / unit) * unit, (int(h * aspect / unit) + 1) * unit)
            if h and w and h * w <= height * width
        ]
        if not fitting:
            raise UsageError(f"no shape of aspect {aspect:.2f} fits {height}x{width}; leave it out of --aspects")
        sizes.add(min(fitting, key=lambda size, aspect=aspect: _cost(size, aspect, height * width)))
    made = sorted({Bucket(f, h, w) for f in frames for h, w in sizes})
    for bucket in made:
        valid(bucket.frames, bucket.height, bucket.width)
    return tuple(made)


def fitting(choice: Sequence[Bucket], height: int, width: int, upscale: float = 1.0) -> list[Bucket]:
    """The buckets of the shape that loses the least of a clip to cropping, longest first; [] if all are too large."""
    sizes = {}
    for bucket in choice:
        high, wide = covering(height, width, bucket.height, bucket.width)
        if high <= height * upscale + 0.5 and wide <= width * upscale + 0.5:
            lost = 1 - bucket.height * bucket.width / (high * wide)
            sizes[bucket.height, bucket.width] = (round(lost, 6), -bucket.height * bucket.width)
    if not sizes:
        return []
    best = min(sizes, key=lambda size: (sizes[size], size))
    return sorted((b for b in choice if (b.height, b.width) == best), reverse=True)


@dataclass(frozen=True)
class Order:
    """Which sample each number of a run is, as a function of the seed alone.

    counts  samples of each bucket
    group   how many consecutive numbers are of one bucket: the samples of an optimizer step, or a part of it

    A pass takes floor((p + 1)·c/g) - floor(p·c/g) groups of a bucket of c samples, in a new order on each pass, and a
    bucket's samples in a new order on each of its own passes. So every sample is seen once per pass of its bucket, and
    what does not fill a group begins the next pass.
    """

    seed: int
    counts: tuple[int, ...]
    group: int

    def __call__(self, number: int) -> tuple[int, int]:
        """(bucket, place in the bucket) of sample `number`."""
        group, place = divmod(number, self.group)
        at = self._pass_of(group)
        chosen, rank = self._turn(at, group - self._groups_before(at))
        position = (at * self.counts[chosen] // self.group + rank) * self.group + place
        epoch, item = divmod(position, self.counts[chosen])
        return chosen, int(_permuted(self.counts[chosen], self.seed, f"bucket {chosen}", epoch)[item])

    def _groups_before(self, at: int) -> int:
        return sum(at * count // self.group for count in self.counts)

    def _pass_of(self, group: int) -> int:
        least = group * self.group // sum(self.counts)  # passes never hold more groups than their samples fill
        choice = range(least, least + self.group * len(self.counts) + 2)
        return least + bisect.bisect_right(choice, group, key=self._groups_before) - 1

    def _turn(self, at: int, turn: int) -> tuple[int, int]:
        """The bucket of a pass's group, and how many groups of that bucket come before it."""
        wanted = [(at + 1) * count // self.group - at * count // self.group for count in self.counts]
        order = _turns(self.seed, at, tuple(wanted))
        return order[0][turn], order[1][turn]


@lru_cache(maxsize=64)
def _permuted(count: int, *words: int | str) -> Tensor:
    return seeds.permutation(count, *words)


@lru_cache(maxsize=4)
def _turns(seed: int, at: int, wanted: tuple[int, ...]) -> tuple[list[int], list[int]]:
    order = [bucket for bucket, times in enumerate(wanted) for _ in range(times)]
    chosen = [order[i] for i in seeds.permutation(len(order), seed, "groups", at).tolist()]
    seen, ranks = [0] * len(wanted), []
    for bucket in chosen:
        ranks.append(seen[bucket])
        seen[bucket] += 1
    return chosen, ranks


def _cost(size: tuple[int, int], aspect: float, area: int) -> float:
    """How far a size is from an aspect, and a little of how much of the area it does not use."""
    there = size[1] / size[0]
    return max(there / aspect, aspect / there) - 0.1 * size[0] * size[1] / area
