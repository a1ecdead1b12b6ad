"""Rows that are costly to make and cheap to keep: made once, in fixed blocks, when first asked for.

A block is always made as a whole, so a row's value does not depend on when or with which others it is asked for. That
keeps resumed runs bitwise equal to straight ones although networks round differently in batches of different sizes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kinema import seeds

Make = Callable[[range], dict[str, Tensor]]  # clip numbers → one tensor `[len, …]` per field


class Pool:
    """`clips` rows of named tensors, on the device they are made on."""

    def __init__(self, clips: int, block: int, make: Make):
        self.block = min(block, clips)
        self.clips = clips - clips % self.block
        self._make, self._rows = make, {}
        self._made = [False] * (self.clips // self.block)

    @classmethod
    def of(cls, rows: dict[str, Tensor], block: int) -> "Pool":
        """One whose rows are there already."""
        pool = cls(len(next(iter(rows.values()))), block, lambda numbers: rows)
        pool._rows, pool._made = rows, [True] * len(pool._made)
        return pool

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The rows of these clips, in this order."""
        for block in sorted({number // self.block for number in numbers}):
            if not self._made[block]:
                self._fill(block)
        index = torch.tensor(numbers)
        return {name: rows[index.to(rows.device)] for name, rows in self._rows.items()}

    def _fill(self, block: int) -> None:
        span = range(block * self.block, (block + 1) * self.block)
        for name, rows in self._make(span).items():
            if name not in self._rows:
                self._rows[name] = rows.new_empty((self.clips, *rows.shape[1:]))
            self._rows[name][span.start : span.stop] = rows
        self._made[block] = True


def clip_of(seed: int, sample: int, clips: int, block: int) -> int:
    """Which clip sample number `sample` of a run is: every clip once per pass, blocks in a new order on each pass."""
    epoch, position = divmod(sample, clips)
    return int(_order(seed, epoch, clips // block)[position // block]) * block + position % block


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, blocks: int) -> Tensor:
    return seeds.permutation(blocks, seed, "data", epoch)
