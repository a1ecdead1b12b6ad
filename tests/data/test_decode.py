"""Frames of real files: every one the nearest in time, upright and with square pixels, whatever the file is."""

from fractions import Fraction

import footage
import numpy as np
import pytest
import torch
from footage import time_of

from kinema.data.decode import clip_at, frames_at, scan
from kinema.errors import UserError

FILES = {
    "film.mp4": {"fps": Fraction(24000, 1001)},
    "ntsc.avi": {"fps": Fraction(30000, 1001), "codec": "mpeg4"},
    "fast.mp4": {"fps": 60, "audio": True},
    "web.webm": {"fps": 25, "codec": "libvpx-vp9"},
    "odd.mkv": {"fps": 30, "size": (97, 131)},
    "vary.mp4": {"times": [0, 0.04, 0.08, 0.3, 0.34, 0.9, 0.95, 1.0, 1.6, 1.65, 1.7, 1.75, 1.8, 1.9]},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {name: footage.write(folder / name, **how) for name, how in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_each_frame_is_the_nearest_in_time(clips, name):
    how, path = FILES[name], clips[name]
    there = np.array(how.get("times") or [i / float(how["fps"]) for i in range(round(2 * how["fps"]))])
    wanted = [0.13 + i / 8 for i in range(14)]
    nearest = [there[np.abs(there - time).argmin()] for time in wanted]
    shown = [time_of(frame.numpy()) for frame in frames_at(path, wanted)]
    ties = [sorted(np.abs(there - time))[1] - sorted(np.abs(there - time))[0] for time in wanted]
    for time, expected, tie in zip(shown, nearest, ties, strict=True):
        assert tie < 1e-3 or abs(time - expected) < 0.025, (name, time, expected)


@pytest.mark.parametrize("name", FILES)
def test_a_scan_knows_what_is_there(clips, name):
    how, scanned = FILES[name], scan(clips[name])
    there = how.get("times") or [i / float(how["fps"]) for i in range(round(2 * how["fps"]))]
    assert scanned.frames == len(there) and scanned.seconds == pytest.approx(there[-1], abs=2e-3)
    assert (scanned.height, scanned.width) == how.get("size", (96, 128))
    count = scanned.frames_at(8)
    last = [*frames_at(clips[name], [i / 8 for i in range(count)])]
    assert len(last) == count, "what a scan promises can be read"
    with pytest.raises(UserError, match="is cut off, or too short"):
        [*frames_at(clips[name], [i / 8 for i in range(count + 1)])]


def test_reading_from_the_middle_is_reading_from_the_start(clips, tmp_path):
    path = footage.write(tmp_path / "long.mp4", 24, seconds=4, gop=40)
    times = [i / 12 for i in range(46)]
    whole = [*frames_at(path, times)]
    later = [*frames_at(path, times[30:])]  # jumps to a key frame
    assert all(torch.equal(a, b) for a, b in zip(whole[30:], later, strict=True))


def test_slow_clips_give_a_frame_several_times(tmp_path):
    path = footage.write(tmp_path / "slow.mp4", 5)
    assert [round(time_of(f.numpy()) * 5) for f in frames_at(path, [0, 0.05, 0.15, 0.2, 0.25])] == [0, 0, 1, 1, 1]


def test_a_turned_clip_is_upright(clips, tmp_path):
    lying = footage.write(tmp_path / "lying.mp4")
    path = footage.turned(lying, tmp_path / "turned.mp4")
    assert (scan(path).height, scan(path).width) == (128, 96)
    (flat,), (upright,) = frames_at(lying, [0.5]), frames_at(path, [0.5])
    assert torch.equal(upright, torch.rot90(flat, -1)), "a quarter clockwise"
    scaled = clip_at(path, [0.5], (64, 48))
    assert scaled.shape == (1, 3, 64, 48)
    assert (scaled[0, :, 50:62, 38:46] > 200).all(), "the square at the upper right is at the lower right"


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = footage.write(tmp_path / "wide.mp4", aspect=Fraction(4, 3), size=(96, 120))
    assert (scan(path).height, scan(path).width) == (96, 160)
    assert clip_at(path, [0.0]).shape == (1, 3, 96, 160)


def test_frames_cover_what_is_asked_for_and_the_rest_is_cut(clips):
    path = clips["fast.mp4"]
    left, right = (clip_at(path, [1.0], (48, 32), place=(0.5, x)) for x in (0.0, 1.0))
    assert left.shape == right.shape == (1, 3, 48, 32)
    assert left.float().mean() > 60 and (right[0, :, 20:, 4:] < 40).all()
    shown = clip_at(path, [1.0], (48, 64))[0].float()
    assert abs(shown[:, 2:10, 36:44].mean() - 0) < 20 and shown[:, 2:10, 52:62].mean() > 230


def test_what_is_no_video_is_said(clips, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    footage.cut_off(clips["film.mp4"], tmp_path / "headless.mp4", 0.6)
    for name in ("empty.mp4", "text.mp4", "headless.mp4"):
        with pytest.raises(UserError, match="cannot be read as a video"):
            scan(tmp_path / name)
    with pytest.raises(UserError, match="There is no video"):
        scan(tmp_path / "none.mp4")
    path = footage.cut_off(clips["odd.mkv"], tmp_path / "short.mkv", 0.6)
    assert 10 < scan(path).frames < 60
    with pytest.raises(UserError, match=r"short\.mkv"):
        [*frames_at(path, [0.0, 1.9])]


def test_a_damaged_frame_is_not_taken_for_a_good_one(tmp_path):
    path = footage.write(tmp_path / "good.mkv", 30, gop=60)
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    data[at : at + 400] = bytes(255 - b for b in data[at : at + 400])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|cannot be read|cut off"):
        [*frames_at(path, [i / 30 for i in range(59)])]
