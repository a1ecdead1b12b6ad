"""Where CogVideoX's video tokens are: codes that are added, and angles that q and k are turned by.

One place for training and inference: each is a function of the grid of patches (frames, rows, columns), computed in
float64 at every call, so there are no tables that could differ or end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kinema.models.layers import rotary

Grid = tuple[int, int, int]


def sincos(grid: Grid, dim: int, spatial_scale: float = 1.875, device: torch.device | str = "cpu") -> Tensor:
    """`[L, dim]` float32: a quarter of the channels for the frame, then three eighths for column and for row each.

    Every part is [sin, cos] of coordinate · 10000^(-2i/width); rows and columns are divided by `spatial_scale`.
    """
    frames, rows, columns = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
    spatial = 3 * dim // 8
    parts = [
        _waves(frames, dim // 4)[:, None, None],
        _waves(columns / spatial_scale, spatial)[None, None],
        _waves(rows / spatial_scale, spatial)[None, :, None],
    ]
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2).float()


def rope(
    grid: Grid,
    head_dim: int,
    base: tuple[int, int] | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin `[L, head_dim / 2]`: a quarter of a head's channels for the frame, three eighths for row and column.

    Rows and columns are counted from 0, or, with `base`, fitted into that grid of (rows, columns) as `cropped` says.
    """
    places_of = places(grid, base, device)
    return rotary(places_of, (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8), dtype)


def places(grid: Grid, base: tuple[int, int] | None, device: torch.device | str = "cpu") -> list[Tensor]:
    """The positions of frames, rows and columns: counted from 0, or rows and columns fitted into `base`."""
    frames, *space = grid
    numbers = [torch.arange(n, device=device) for n in (frames, *space)]
    if base is None:
        return numbers
    top, left, bottom, right = cropped((space[0], space[1]), base)
    return [numbers[0], _steps(top, bottom, space[0], device), _steps(left, right, space[1], device)]


def cropped(size: tuple[int, int], base: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the largest part of the `base` grid with the aspect of `size`, centred."""
    (height, width), (rows, columns) = size, base
    if height / width > rows / columns:
        fitted = (rows, round(rows / height * width))
    else:
        fitted = (round(columns / width * height), columns)
    top, left = round((rows - fitted[0]) / 2), round((columns - fitted[1]) / 2)
    return top, left, top + fitted[0], left + fitted[1]


def _steps(start: int, end: int, count: int, device: torch.device | str) -> Tensor:
    """`count` coordinates from `start` to end·(count - 1) / count, evenly."""
    return torch.linspace(start, end * (count - 1) / count, count, dtype=torch.float64, device=device)


def _waves(coordinates: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=coordinates.device) / half)
    angles = coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
