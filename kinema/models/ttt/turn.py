"""Rotary positions of a grid of tokens, axis by axis: three small tables serve all blocks, at any length of video.

Shapes: B batch, N heads, T H W frames, rows and columns, D head dim; the last axes of a table are its rotated pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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

    def rotate(self, x: Tensor) -> Tensor:
        """Turns the channel pairs (2i, 2i+1) of `[…, T · H · W, D]`, the dtype kept."""
        dtype, grid = self.cos[0].dtype, self.grid
        widths = [2 * table.shape[-1] for table in self.cos]
        parts = x.unflatten(-2, grid).split(widths, dim=-1)
        turned = []
        for axis, part in enumerate(parts):
            shape = [1, 1, 1, -1]
            shape[axis] = grid[axis]
            cos, sin = self.cos[axis].view(shape), self.sin[axis].view(shape)
            a, b = part.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
            turned.append(torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype))
        return torch.cat(turned, dim=-1).flatten(-4, -2)
