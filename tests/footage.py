"""Short clips like those of cameras, encoded here: what each frame shows says when it is."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

DARK, LIGHT = 32, 220  # levels of the first moment and of SPAN seconds later
SPAN = 2.0
IPHONE = (0, 1, 0, -1, 0, 0, 0, 0, 1 << 14)  # an upright phone's display matrix: turn a quarter clockwise


def level(time: float) -> float:
    return min(255.0, DARK + (LIGHT - DARK) * time / SPAN)


def time_of(frame) -> float:
    """When a frame was, by the brightness of its left half."""
    half = np.asarray(frame)[:, : frame.shape[1] // 2].astype(float)
    return (half.mean() - DARK) / (LIGHT - DARK) * SPAN


def write(
    path: Path,
    fps: Fraction | int = 30,
    seconds: float = 2.0,
    size: tuple[int, int] = (96, 128),
    codec: str = "libx264",
    times: Sequence[float] = (),
    audio: bool = False,
    aspect: Fraction | None = None,
    gop: int = 12,
) -> Path:
    """The left half brightens with time and the right is black with a white square; `times` make the rate vary."""
    height, width = size
    moments = list(times) or [i / fps for i in range(round(seconds * fps))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = (
            width,
            height,
            "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p",
        )
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = base = Fraction(1, 90000) if times else 1 / Fraction(fps)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        fast = {"libx264": {"preset": "ultrafast", "crf": "12"}, "libvpx-vp9": {"cpu-used": "8", "crf": "12", "b": "0"}}
        stream.options = fast.get(codec, {"qmin": "1", "qmax": "2"})
        stream.codec_context.bit_rate = 8_000_000 if codec == "mpeg4" else 0
        sound = container.add_stream("aac", rate=48000) if audio else None
        for number, time in enumerate(moments):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[:, : width // 2] = round(level(float(time)))
            pixels[: height // 4, -(width // 4) :] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(time * 90000) if times else number
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for block in range(int(seconds * 48000 / 1024) + 20):  # it goes on after the pictures
                tone = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                tone.sample_rate, tone.pts = 48000, block * 1024
                container.mux(sound.encode(tone))
            container.mux(sound.encode())
    return path


def turned(path: Path, to: Path) -> Path:
    """An mp4 whose header says that a phone was held upright: its track's matrix is replaced, its frames are not."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes after the name
    for place, number in enumerate(IPHONE):
        value = number << 16 if place % 3 != 2 or place != 8 else 1 << 30
        data[at + 4 * place : at + 4 * place + 4] = int(value & 0xFFFFFFFF).to_bytes(4, "big")
    to.write_bytes(data)
    return to


def cut_off(path: Path, to: Path, share: float) -> Path:
    data = path.read_bytes()
    to.write_bytes(data[: int(len(data) * share)])
    return to
