"""Video files, still images and contact sheets: the only place where pixels leave or enter as something to look at.

T frames, H height, W width. Pixels are float in [-1, 1], RGB. PyAV and Pillow are imported where they are used, so that
training needs neither. Colours are converted and tagged as BT.709: untagged files look different in every player.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.files import whole

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

BT709 = 1  # ITU-T H.273: this number names the primaries, the transfer and the matrix
GAP, FONT_SIZE, TILE = 6, 14, 112  # pixels of a sheet: between frames, of its text, and about the width of a frame


class VideoFile(NamedTuple):
    """What a file's header says, without decoding it. `frames` is 0 where the header does not tell."""

    frames: int
    height: int
    width: int
    fps: float


def write_video(path: str | Path, pixels: Tensor, fps: float, upscale: int = 1) -> None:
    """Writes an mp4 (H.264, 4:2:0) that every browser plays and that starts before it is loaded.

    The loss is invisible (crf 14). `upscale` repeats every pixel so many times along both sides. 4:2:0 needs even
    sides: an odd one gets its last row or column twice. The file appears whole or not at all.

    Args:
        pixels: `[T, 3, H, W]` float in [-1, 1]; what lies outside is clamped, NaN is grey.
        fps: frames per second.

    Raises:
        ValueError: for another shape, no frames, or a rate that is not positive.
        UserError: if PyAV is missing.
    """
    with whole(Path(path)) as draft:
        _encode(draft, [pixels], fps, upscale)


def write_stream(path: str | Path, chunks: Iterable[Tensor], fps: float, upscale: int = 1) -> None:
    """Writes a video that comes in pieces `[T, 3, H, W]`, each as it comes; otherwise as `write_video`."""
    with whole(Path(path)) as draft:
        _encode(draft, chunks, fps, upscale)


def rgb_bytes(pixels: Tensor) -> bytes:
    """Frames `[T, 3, H, W]` in [-1, 1] as raw rgb24: T · H · W · 3 bytes."""
    height, width = pixels.shape[-2:]
    return b"".join(_bytes(frame, height, width, 1).numpy().tobytes() for frame in pixels)


def mp4_bytes(pixels: Tensor, fps: float, upscale: int = 1) -> bytes:
    """The content of the file that `write_video` would write, for embedding in a page."""
    with tempfile.TemporaryDirectory() as folder:  # to start at once, an mp4 is rewritten in place: that takes a file
        path = Path(folder) / "clip"
        _encode(path, [pixels], fps, upscale)
        return path.read_bytes()


def read_video(path: str | Path, start: int = 0, frames: int | None = None) -> Tensor:
    """Frames `start` to `start + frames` (by default to the end) as `[T, 3, H, W]` float32 in [-1, 1].

    Raises:
        UserError: if the file is missing, is not a video or is shorter than asked for, or if PyAV is missing.
    """
    stop = None if frames is None else start + frames
    read, seen = [], 0
    with opened(path) as (container, stream):
        for frame in container.decode(stream):
            if seen == stop:
                break
            seen += 1
            if seen > start:
                # What does not name its colours is BT.601, as players have it.
                read.append(torch.from_numpy(frame.to_ndarray(format="rgb24", src_colorspace=frame.colorspace)))
    if not read or (frames is not None and len(read) < frames):
        raise UserError(f"{path} has {seen} frames; asked for {frames or 'all'} from {start} on.")
    return torch.stack(read).permute(0, 3, 1, 2).float() / 127.5 - 1


def probe(path: str | Path) -> VideoFile:
    """Size, length and rate of a video file, from its header.

    Raises:
        UserError: if the file is missing or is not a video, or if PyAV is missing.
    """
    with opened(path) as (_, stream):
        return VideoFile(stream.frames, stream.height, stream.width, float(stream.average_rate or 0))


def sheet(
    videos: Tensor,
    captions: Sequence[str],
    path: str | Path,
    columns: int = 1,
    frames: int = 8,
    upscale: int | None = None,
) -> None:
    """Writes a PNG contact sheet: per video its caption and up to `frames` frames in a row, the first to the last.

    Args:
        videos: `[B, T, 3, H, W]` float in [-1, 1].
        captions: one text per video.
        columns: videos side by side.
        upscale: repeats every pixel so many times; by default until a frame is about a thumb wide.

    Raises:
        ValueError: if there is not one caption per video.
        UserError: if Pillow is missing.
    """
    if videos.ndim != 5 or videos.shape[2] != 3 or not videos.shape[0] * videos.shape[1]:
        raise ValueError(f"a sheet is of videos [B, T, 3, H, W] with B and T at least 1, not {list(videos.shape)}")
    if len(captions) != len(videos):
        raise ValueError(f"{len(captions)} captions for {len(videos)} videos; give one each")
    _pillow()
    from PIL import Image, ImageDraw, ImageFont

    shown = videos[:, torch.linspace(0, videos.shape[1] - 1, min(frames, videos.shape[1])).round().long()]
    scale = upscale or max(1, round(TILE / videos.shape[-1]))
    high, wide = videos.shape[-2] * scale, videos.shape[-1] * scale
    width = shown.shape[1] * (wide + GAP) - GAP
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(caption, font, width) for caption in captions]
    text_height = (FONT_SIZE + 4) * max(map(len, texts))
    cell_width, cell_height = width + 4 * GAP, high + text_height + 4 * GAP
    columns = min(columns, len(videos))
    image = Image.new("RGB", (columns * cell_width, -(-len(videos) // columns) * cell_height), "white")
    draw = ImageDraw.Draw(image)
    for n, (video, lines) in enumerate(zip(shown, texts, strict=True)):
        left, top = n % columns * cell_width + 2 * GAP, n // columns * cell_height + 2 * GAP
        for i, line in enumerate(lines):
            draw.text(
                (left, top + (i - len(lines)) * (FONT_SIZE + 4) + text_height), line, fill=(40, 40, 46), font=font
            )
        for i, frame in enumerate(video):
            picture = Image.fromarray(_bytes(frame, high, wide, scale).numpy())
            image.paste(picture, (left + i * (wide + GAP), top + text_height + GAP // 2))
    with whole(Path(path)) as draft:
        image.save(draft, "PNG", optimize=True)


def png_bytes(frame: Tensor, upscale: int = 1) -> bytes:
    """One frame `[3, H, W]` in [-1, 1] as a PNG. Raises UserError if Pillow is missing."""
    _pillow()
    from PIL import Image

    high, wide = frame.shape[-2] * upscale, frame.shape[-1] * upscale
    file = io.BytesIO()
    Image.fromarray(_bytes(frame, high, wide, upscale).numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def _encode(path: Path, chunks: Iterable[Tensor], fps: float, upscale: int) -> None:
    if fps <= 0:
        raise ValueError(f"a video needs a positive number of frames per second, not {fps}")
    av, stream, high, wide = _av(), None, 0, 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        for pixels in chunks:
            if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
                raise ValueError(f"a video is [T, 3, H, W] with T at least 1, not {list(pixels.shape)}")
            if stream is None:
                high, wide = (side * upscale + side * upscale % 2 for side in pixels.shape[-2:])
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
                # without x264's macroblock tree, by which the same frames gave another file each time
                stream.options = {"crf": "14", "preset": "medium", "x264-params": "mbtree=0"}
                context = stream.codec_context
                context.color_primaries = context.color_trc = context.colorspace = BT709
            for frame in pixels:
                picture = av.VideoFrame.from_ndarray(_bytes(frame, high, wide, upscale).numpy(), format="rgb24")
                container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        if stream is None:
            raise ValueError("a video is [T, 3, H, W] with T at least 1, and nothing came")
        container.mux(stream.encode())


def _bytes(frame: Tensor, high: int, wide: int, upscale: int) -> Tensor:
    """`[3, H, W]` in [-1, 1] → `[high, wide, 3]` uint8, every pixel repeated `upscale` times, the last to the rim."""
    height, width = frame.shape[-2:]
    rows = (torch.arange(high) // upscale).clamp(max=height - 1)
    columns = (torch.arange(wide) // upscale).clamp(max=width - 1)
    levels = (frame.detach().cpu().float().nan_to_num().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().permute(1, 2, 0)[rows[:, None], columns].contiguous()


def _wrapped(text: str, font: "FreeTypeFont | ImageFont", width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """An opened container and its first video stream."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it.")
            yield container, container.streams.video[0]
    except FileNotFoundError:
        raise UserError(f"There is no video {path}.") from None
    except av.error.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a video: {error.strerror}.") from error


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("Reading and writing videos needs PyAV: pip install av") from None
    return av


def _pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError("Writing images needs Pillow: pip install pillow") from None
