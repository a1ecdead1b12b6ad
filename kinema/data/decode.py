"""Frames of real video files at the times one wants: any container, any frame rate, constant or not, turned or not.

What a header says is not believed: `scan` reads the packets, and every frame is placed by its own time. PyAV is
imported where it is used. Pixels are uint8 RGB; they are scaled from the file's own format in one step, which costs a
fraction of decoding, with the filter widened so that nothing aliases.

PyAV's logging stays as it is, off: with a level set, FFmpeg's threads wait for Python's lock to log while Python waits
for them to end.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.data.video import opened
from kinema.errors import UserError

SEEK = 2.0  # seconds of frames that are rather decoded than jumped over
READ = 1 << 22  # bytes hashed at once


@dataclass(frozen=True)
class Scanned:
    """What is in a video file. `height` and `width` are as shown: turned, and with square pixels.

    seconds  time of the last frame after the first
    rate     frames a second on average, over all frames
    digest   sha256 of the file's content
    """

    frames: int
    seconds: float
    rate: float
    height: int
    width: int
    digest: str

    def frames_at(self, fps: float, start: float = 0.0) -> int:
        """How many frames there are at `fps` from `start` on, each nearer to one of the file than to its end."""
        return max(0, int((self.seconds + 0.5 / self.rate - start) * fps + 1e-6) + 1)


def scan(path: Path) -> Scanned:
    """Reads a file's packets and its first frame. UserError if it is no video, empty or damaged."""
    with opened(path) as (container, stream):
        times = [p.pts for p in container.demux(stream) if p.pts is not None and p.size and not p.is_discard]
        if not times:
            raise UserError(f"{path} has no frames; encode it again")
        origin = min(times) if stream.start_time is None else stream.start_time
        seconds = float((max(times) - origin) * stream.time_base)
        rate = (len(times) - 1) / seconds if seconds > 0 else float(stream.average_rate or 0)
        if rate <= 0:
            raise UserError(f"{path} does not say its frame rate; encode it again")
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    with opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"{path} has no frame that can be decoded; encode it again")
        height, width = first.height, round(first.width * aspect)
        if first.rotation % 180:
            height, width = width, height
    return Scanned(len(times), seconds, rate, height, width, digest(path))


def digest(path: Path) -> str:
    """sha256 of a file's content."""
    made = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(READ):
            made.update(part)
    return made.hexdigest()


def covering(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The size that a frame is scaled to so that it covers another with its aspect kept."""
    scale = max(to_height / height, to_width / width)
    return max(to_height, round(height * scale)), max(to_width, round(width * scale))


def frames_at(
    path: Path,
    times: Sequence[float],
    size: tuple[int, int] | None = None,
    place: tuple[float, float] = (0.5, 0.5),
    threads: int = 0,
) -> Iterator[Tensor]:
    """One frame `[H, W, 3]` uint8 for each of the ascending `times`, in seconds: the nearest one in time.

    With a `size` (H, W) frames are scaled to cover it with their aspect kept, and cropped: `place` says where between
    the upper left (0, 0) and the lower right (1, 1). `threads` of the decoder, 0 for as many as there are cores.

    Raises UserError if the file ends before the last time by more than half a frame, or a frame is damaged.
    """
    with opened(path) as (container, stream):
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        if times and times[0] > SEEK:
            origin = stream.start_time or 0
            container.seek(origin + int((times[0] - 0.5) / stream.time_base), stream=stream)
        wanted, before, made = (
            iter(times),
            None,
            _Made(path, size, place, float(stream.sample_aspect_ratio or 1) or 1.0),
        )
        time = next(wanted, None)
        for shown in _shown(container, stream):
            while time is not None and shown[0] >= time:
                yield made(before if before is not None and time - before[0] <= shown[0] - time else shown)
                time = next(wanted, None)
            if time is None:
                return
            step = shown[0] - before[0] if before is not None else 0.0
            before = shown
        if before is None:
            raise UserError(f"{path} has no frame that can be decoded; encode it again")
        last = before[0] + 0.5 * (step or 1 / float(stream.average_rate or 1)) + 1e-6
        while time is not None and time <= last:
            yield made(before)
            time = next(wanted, None)
        if time is not None:
            raise UserError(f"{path} ends at {before[0]:.2f} s, before {time:.2f} s; it is cut off, or too short")


def clip_at(path: Path, times: Sequence[float], size: tuple[int, int] | None = None, **how: Any) -> Tensor:
    """`frames_at` as one tensor `[T, 3, H, W]` uint8."""
    return torch.stack([*frames_at(path, times, size, **how)]).permute(0, 3, 1, 2)


class _Made:
    """A decoded frame as pixels; the one made last is kept, as slow videos ask for it again."""

    def __init__(self, path: Path, size: tuple[int, int] | None, place: tuple[float, float], aspect: float):
        from av.video.reformatter import VideoReformatter

        self.path, self.size, self.place, self.aspect = path, size, place, aspect
        self.scale = VideoReformatter().reformat  # one for all frames, as its tables take time to make
        self.kept: tuple[float, Tensor] | None = None

    def __call__(self, shown: tuple[float, Any]) -> Tensor:
        if self.kept is None or self.kept[0] != shown[0]:
            self.kept = shown[0], self._pixels(shown[1])
        return self.kept[1]

    def _pixels(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise UserError(f"{self.path} has a damaged frame at {frame.time:.2f} s; encode it again")
        turned = frame.rotation % 180 != 0
        height, width = frame.height, round(frame.width * self.aspect)
        if self.size is not None:
            to = self.size[::-1] if turned else self.size
            height, width = covering(height, width, *to)
        # What does not name its colours is BT.601, as players have it.
        made = self.scale(frame, width, height, "rgb24", frame.colorspace, interpolation="BILINEAR", threads=1)
        pixels = torch.from_numpy(made.to_ndarray())
        if frame.rotation:
            pixels = torch.rot90(pixels, frame.rotation // 90)
        if self.size is not None:
            top, left = (
                round((there - wanted) * share)
                for there, wanted, share in zip(pixels.shape[:2], self.size, self.place, strict=True)
            )
            pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        return pixels.contiguous()


def _shown(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """(seconds after the first frame, frame) of a stream, in the order they are shown."""
    origin, rate = stream.start_time or 0, float(stream.average_rate or 0)
    for number, frame in enumerate(container.decode(stream)):
        if frame.pts is not None:
            yield float((frame.pts - origin) * stream.time_base), frame
        elif rate:
            yield number / rate, frame
        else:
            raise UserError("its frames have no times and it does not say its rate; encode it again")
