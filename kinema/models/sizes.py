"""Sizes that autoencoders take videos in; for others, a UsageError names the nearest."""

from kinema.errors import UsageError


def check_frames(frames: int, unit: int) -> None:
    """1 + a multiple of `unit`: the first frame is by itself."""
    if frames < 1 or (frames - 1) % unit:
        below = max(0, frames - 1) // unit * unit + 1
        raise UsageError(f"{frames} frames cannot be encoded; use {below} or {below + unit}, 1 + a multiple of {unit}")


def check_sides(height: int, width: int, unit: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side < unit or side % unit:
            below = side // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            raise UsageError(f"{name} {side} is not a multiple of {unit}; use {nearest}")
