"""Clips of files: which are found, what is said of wrong lists, which frames are read and what becomes of them."""

import json

import pytest
import torch
from cogvideox_world import CPU, write_clips, write_codec, write_encoder

from kinema import seeds
from kinema.data.clips import Clip, VideoFiles, clip_frames, fitted, listed
from kinema.data.first_frame import FirstFrame
from kinema.data.video import write_video
from kinema.errors import UserError
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import T5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_codec(folder)
    write_encoder(folder)
    write_clips(folder / "clips", count=3)
    return folder


def data(world, **changes):
    codec, text = CogVideoXVAE(str(world), multiple=2), T5(str(world), tokens=6)
    fields = {"path": str(world / "clips"), "frames": 9, "height": 32, "width": 48}
    return VideoFiles(codec=codec, text=text, **{**fields, **changes})


def read(source, samples, seed=0):
    return source(samples, seeds.keys(seed, "train", samples))


def test_three_ways_of_listing_give_the_same_clips(tmp_path):
    folder = write_clips(tmp_path / "clips", count=3)
    clips = listed(folder)
    assert [(clip.video.name, clip.caption) for clip in clips] == [
        ("0.mp4", "a red circle"),
        ("1.mp4", "a blue circle"),
        ("2.mp4", "a red circle"),
    ]
    rows = [{"video": f"videos/{n}.mp4", "caption": clip.caption} for n, clip in enumerate(clips)]
    (folder / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert listed(folder / "clips.jsonl") == clips
    (folder / "labels").mkdir()
    for n, clip in enumerate(clips):
        (folder / "labels" / f"{n}.txt").write_text(clip.caption.replace(" circle", "\ncircle\n"))
    (folder / "prompts.txt").unlink()
    assert listed(folder) == clips


def test_what_is_wrong_with_a_list_is_said_together(tmp_path):
    folder = write_clips(tmp_path / "clips", count=3)
    (folder / "prompts.txt").write_text("a\n\nb\n")
    (folder / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\nvideos/7.mp4\n")
    with pytest.raises(UserError, match=r"7\.mp4 does not exist; .*1\.mp4 has no caption"):
        listed(folder)
    (folder / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="3 videos but 2 prompts"):
        listed(folder)
    (folder / "clips.jsonl").write_text('{"video": "videos/0.mp4"}\n')
    with pytest.raises(UserError, match=r"line 1: .*caption"):
        listed(folder / "clips.jsonl")
    row = json.dumps({"video": "videos/0.mp4", "caption": "a"})
    (folder / "clips.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(UserError, match="listed twice"):
        listed(folder / "clips.jsonl")
    with pytest.raises(UserError, match="neither a JSONL file nor"):
        listed(tmp_path)
    (folder / "clips.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        listed(folder / "clips.jsonl")


def test_frames_are_the_nearest_in_time_whatever_the_clips_rate(tmp_path):
    ramp = torch.linspace(-1, 1, 48)[:, None, None, None].expand(-1, 3, 32, 32)
    for fps in (16, 24):
        write_video(tmp_path / f"{fps}.mp4", ramp, fps)
        clip = Clip(tmp_path / f"{fps}.mp4", "", start=0.25)
        levels = clip_frames(clip, 5, 8.0).mean((1, 2, 3))
        expected = ramp[[round((0.25 + i / 8) * fps) for i in range(5)], 0, 0, 0]
        torch.testing.assert_close(levels, expected, atol=0.03, rtol=0)


def test_aspect_is_kept():
    video = torch.zeros(1, 3, 40, 80)
    video[..., 10:30, 30:50] = 1  # a square in the middle
    for height, width in ((20, 20), (32, 48), (80, 160)):
        made = fitted(video, height, width)
        assert made.shape == (1, 3, height, width)
        rows, columns = (int((made[0, 0].amax(d) > 0.5).sum()) for d in (1, 0))
        assert abs(rows - columns) <= 1 and abs(rows - 20 * max(height / 40, width / 80)) <= 1


def test_short_clip_is_dropped_and_counted(world, tmp_path, caplog):
    folder = write_clips(tmp_path / "clips", count=2)
    write_video(folder / "videos" / "0.mp4", torch.zeros(5, 3, 48, 64), 8.0)
    source = data(world, path=str(folder)).open(0, CPU)
    assert "1 of 2 clips are shorter than 9 frames" in caplog.text
    assert read(source, [0, 1]).video.shape == (2, 4, 16, 4, 6)
    with pytest.raises(UserError, match="none of the 2 clips"):
        data(world, path=str(folder), frames=17).open(0, CPU)


def test_clips_of_mixed_rates_are_taken_at_one_and_slower_ones_are_refused(world, tmp_path):
    folder = write_clips(tmp_path / "clips", count=3)
    write_video(folder / "videos" / "1.mp4", torch.zeros(18, 3, 48, 64), 16.0)
    assert read(data(world, path=str(folder)).open(0, CPU), [0, 1, 2]).video.shape[0] == 3
    write_video(folder / "videos" / "2.mp4", torch.zeros(9, 3, 48, 64), 6.0)
    with pytest.raises(
        UserError, match=r"1 of 3 clips have fewer than 8 frames a second, .*2\.mp4 with 6: .* lower fps"
    ):
        data(world, path=str(folder)).open(0, CPU)


def test_every_clip_seen_once_per_pass_and_drawn_by_its_number(world):
    source = data(world, dropout=0.0).open(3, CPU)
    passes = [read(source, list(range(start, start + 3))) for start in (0, 3)]
    assert [len({float(x) for x in batch.video.mean((1, 2, 3, 4)).mul(1e3).round()}) for batch in passes] == [3, 3]
    again = read(data(world, dropout=0.0).open(3, CPU), [4])
    assert torch.equal(again.video[0], passes[1].video[1])


def test_text_is_dropped_at_its_rate_to_what_guidance_uses(world):
    source = data(world, dropout=0.3).open(0, CPU)
    batch = read(source, list(range(300)))
    dropped = (batch.cond["text"] == batch.uncond["text"]).flatten(1).all(1)
    assert not batch.uncond["text"].any() and 60 < int(dropped.sum()) < 120


def test_image_noise_and_drops_differ_within_a_batch(world):
    source = data(world, image=FirstFrame(noise=(-1.0, 0.5), drop=0.25)).open(0, CPU)
    batch = read(source, list(range(48)))
    image = batch.cond["image"]
    assert image.shape == batch.video.shape and not image[:, 1:].any() and image is batch.uncond["image"]
    gone = ~image.flatten(1).any(1)
    assert 4 <= int(gone.sum()) <= 22
    spread = image[~gone][:, 0].flatten(1).std(1)
    assert len(spread.unique()) == len(spread)


def test_image_latent_same_in_training_and_sampling(world):
    """Without noise and drops the training condition is what `Studio` gives the network."""
    source = data(world, image=FirstFrame(noise=(-40.0, 0.0), drop=0.0)).open(0, CPU)
    batch = read(source, [0, 1, 2])
    codec = CogVideoXVAE(str(world), multiple=2).load(CPU)
    frames = torch.stack([fitted(clip_frames(clip, 9, 8.0), 32, 48)[0] for clip in listed(world / "clips")])
    with torch.no_grad():
        shown = codec.image_latents(((frames + 1) * 127.5).round() / 127.5 - 1, 4)
    for row in batch.cond["image"]:
        assert min(float((row - other).abs().max()) for other in shown) < 1e-4
