"""Rotary positions of a grid of tokens, axis by axis: small tables for any length, spread out once for all blocks.

Shapes: B batch, N heads, T H W frames, rows and columns, D head dim; the last axes of a table are its rotated pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kinema.models.layers import rotate


@dataclass(frozen=True, eq=False)
class Turn:
    """cos and sin `[T, D/8]`, `[H, 3D/16]`, `[W, 3D/16]` of the angles of each axis, wide."""

    cos: tuple[Tensor, Tensor, Tensor]
    sin: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def at(cls, positions: Sequence[Tensor], head_dim: int, dtype: torch.dtype = torch.float32) -> "Turn":
        """Of tokens at these positions `[T]`, `[H]`, `[W]`: a quarter of the channels turns with the frame, three
        eighths with row and column each; pair i of w channels by position · 10000^(-2i/w) (arXiv 2104.09864)."""
        cos, sin = [], []
        for position, width in zip(positions, (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8), strict=True):
            frequencies = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width)
            angle = position.double()[:, None] * frequencies
            cos.append(angle.cos().to(dtype))
            sin.append(angle.sin().to(dtype))
        return cls((cos[0], cos[1], cos[2]), (sin[0], sin[1], sin[2]))

    @property
    def device(self) -> torch.device:
        return self.cos[0].device

    @property
    def grid(self) -> tuple[int, int, int]:
        frames, rows, columns = (len(table) for table in self.cos)
        return frames, rows, columns

    def frames(self, start: int, end: int) -> "Turn":
        """Of these frames alone."""
        cos, sin = ((table[0][start:end], table[1], table[2]) for table in (self.cos, self.sin))
        return replace(self, cos=cos, sin=sin)

    def flipped(self) -> "Turn":
        """Of the tokens in the opposite order."""
        cos, sin = (tuple(part.flip(0) for part in table) for table in (self.cos, self.sin))
        return replace(self, cos=cos, sin=sin)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin `[T · H · W, D/2]` of all axes side by side: made when first asked for, shared by all blocks."""
        grid = self.grid
        cos, sin = (
            torch.cat([_along(part, axis).expand(*grid, -1) for axis, part in enumerate(parts)], dim=-1).flatten(0, 2)
            for parts in (self.cos, self.sin)
        )
        return cos, sin

    def rotate(self, x: Tensor) -> Tensor:
        """Turns the channel pairs (2i, 2i+1) of `[…, T · H · W, D]`, the dtype kept."""
        return rotate(x, *self.tables)


def _along(table: Tensor, axis: int) -> Tensor:
    """`[n, P]` as `[1, …, n, …, 1, P]`, n being on this axis of three."""
    return table.view(*(len(table) if n == axis else 1 for n in range(3)), -1)
