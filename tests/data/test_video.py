"""What is written can be read back, looks the same, and never lies about its size or rate."""

import builtins
import math

import pytest
import torch

from kinema.data.sprites import World, render
from kinema.data.video import mp4_bytes, png_bytes, probe, read_video, sheet, write_video
from kinema.errors import UserError


def sprite(frames: int = 12, height: int = 64, width: int = 64) -> torch.Tensor:
    """A red square that moves right over a gradient, `[T, 3, H, W]`."""
    video = torch.linspace(-1, 0.6, width).expand(frames, 3, height, width).clone()
    for i in range(frames):
        video[i, :, 20:36, 2 * i : 2 * i + 16] = torch.tensor([1.0, -0.8, -0.8])[:, None, None]
    return video


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / (a - b).square().mean().item())


def test_a_written_video_looks_the_same_when_read(tmp_path):
    video = sprite()
    write_video(tmp_path / "clip.mp4", video, fps=8, upscale=4)
    read = read_video(tmp_path / "clip.mp4")
    assert read.shape == (12, 3, 256, 256)
    assert psnr(read[..., 1::4, 1::4], video) > 38
    assert (read[..., 1::4, 1::4].mean((0, 2, 3)) - video.mean((0, 2, 3))).abs().max() < 0.01  # no tint
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("fps", [8, 7.5, 24000 / 1001])
def test_the_header_tells_length_and_rate(tmp_path, fps):
    write_video(tmp_path / "clip.mp4", sprite(), fps)
    assert probe(tmp_path / "clip.mp4") == (12, 64, 64, pytest.approx(fps, rel=1e-4))


def test_odd_sides_repeat_their_last_pixels(tmp_path):
    video = sprite(height=33, width=65)
    write_video(tmp_path / "clip.mp4", video, 8)
    read = read_video(tmp_path / "clip.mp4")
    assert read.shape[-2:] == (34, 66)
    assert psnr(read[..., :33, :65], video) > 28  # colours are halved along both sides at this size
    assert (read[..., -1, :] - read[..., -2, :]).abs().mean() < 0.05


def test_part_of_a_video_is_the_same_as_in_the_whole(tmp_path):
    write_video(tmp_path / "clip.mp4", sprite(), 8)
    assert read_video(tmp_path / "clip.mp4", 3, 4).equal(read_video(tmp_path / "clip.mp4")[3:7])


def test_bytes_are_the_file_and_start_with_the_index(tmp_path):
    write_video(tmp_path / "clip.mp4", sprite(), 8, upscale=2)
    data = mp4_bytes(sprite(), 8, upscale=2)
    assert data == (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert len(data) < 20_000


def test_a_collapsed_model_can_still_be_watched(tmp_path):
    write_video(tmp_path / "clip.mp4", torch.full((2, 3, 16, 16), math.nan), 8)
    assert read_video(tmp_path / "clip.mp4").abs().max() < 0.02


def test_the_same_frames_are_the_same_file():
    pixels = render(World(), [0])[0]
    noisy = pixels + 0.02 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert len({mp4_bytes(noisy, 8) for _ in range(6)}) == 1


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"\[T, 3, H, W\]"):
        write_video(tmp_path / "clip.mp4", torch.zeros(4, 1, 16, 16), 8)
    assert not list(tmp_path.iterdir())


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be read"):
        read_video(tmp_path / "clip.mp4")
    with pytest.raises(UserError, match=r"no video .*nowhere\.mp4"):
        probe(tmp_path / "nowhere.mp4")
    write_video(tmp_path / "short.mp4", sprite(3), 8)
    with pytest.raises(UserError, match="has 3 frames; asked for 2 from 2 on"):
        read_video(tmp_path / "short.mp4", 2, 2)


def test_missing_pyav_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_av(name, *rest, **named):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match="pip install av"):
        write_video(tmp_path / "clip.mp4", sprite(), 8)


def test_a_sheet_shows_first_and_last_frames(tmp_path):
    from PIL import Image

    videos = torch.stack([sprite(), sprite().flip(0), sprite()])
    captions = ["a red square moves right", "a long caption " * 30, "поворот"]
    sheet(videos, captions, tmp_path / "sheet.png", columns=2, frames=4)
    image = Image.open(tmp_path / "sheet.png")
    assert image.width > 2 * 4 * 112 and image.height > 2 * 112
    with pytest.raises(ValueError, match="2 captions for 3 videos"):
        sheet(videos, captions[:2], tmp_path / "sheet.png")


def test_a_png_is_lossless():
    import io

    import numpy
    from PIL import Image

    frame = sprite()[3]
    read = torch.from_numpy(numpy.array(Image.open(io.BytesIO(png_bytes(frame, upscale=3)))))
    assert (read[::3, ::3].permute(2, 0, 1) / 127.5 - 1 - frame).abs().max() <= 1 / 127.5
