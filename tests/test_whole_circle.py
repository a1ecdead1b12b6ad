"""From video files to the public pipeline and back: prepare, train, export, load; and all of it under `kill -9`."""

import json
import time

import footage
import pytest
import torch
from cogvideox_world import write_model
from killing import killed_until_done, values

from kinema import cli
from kinema.data import store
from kinema.pretrained import describe
from kinema.training import checkpoint

KILLS = {"few": 2, "many": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, how in (
        ("a.mp4", {"fps": 30, "audio": True}),
        ("b.webm", {"fps": 25, "codec": "libvpx-vp9"}),
        ("c.avi", {"fps": 24, "codec": "mpeg4", "size": (130, 98)}),
        ("d.mkv", {"fps": 60, "size": (97, 131)}),
    ):
        footage.write(folder / name, seconds=1.3, **how)
    (folder / "broken.mp4").write_text("not a video")
    rows = [{"video": path.name, "caption": "a red circle moves left"} for path in sorted(folder.iterdir())]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def prepare_words(videos, out, family="wan", model="sprites-wan", frames="5,9"):
    words = ["prepare", str(videos), "--captions", str(videos / "captions.jsonl"), "--for", family, "-o", str(out)]
    return [*words, "--model", str(model), "--frames", frames, "--size", "32x48", "--device", "cpu"]


def train_words(data, out, steps, recipe="wan:sft", model="sprites-wan"):
    words = ["train", recipe, "--model", str(model), "--data", str(data), "--steps", str(steps), "--out", str(out)]
    return [
        *words,
        "--run.batch_size",
        "2",
        "--run.plan.compute",
        "float32",
        "--run.save_every",
        "1",
        "--device",
        "cpu",
    ]


def run(words):
    assert cli.main(words) == 0


def test_wan_goes_from_videos_to_diffusers(videos, tmp_path, capsys):
    from diffusers import WanPipeline

    run(prepare_words(videos, tmp_path / "data"))
    run(train_words(tmp_path / "data", tmp_path / "run", 2))
    run(["export", str(tmp_path / "run"), "--ema", "--out", str(tmp_path / "out")])
    assert describe(str(tmp_path / "out"))[1].frames == 33  # what was trained can be sampled, if no layout is named
    theirs = WanPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1}
    video = theirs(prompt="a red circle", generator=torch.Generator().manual_seed(0), **size, output_type="pt").frames
    assert video.shape == (1, 5, 3, 32, 48) and torch.isfinite(video).all()
    newest, trained = checkpoint.latest(tmp_path / "run" / "checkpoints"), {}
    for name in ("proj_out.bias", "blocks.3.attn1.to_q.weight"):
        trained[name] = theirs.transformer.state_dict()[name]
    ours = {"proj_out.bias": "head.head.bias", "blocks.3.attn1.to_q.weight": "blocks.3.self_attn.q.weight"}
    kept = {f"student.ema.{ours[name]}": torch.empty_like(tensor) for name, tensor in trained.items()}
    checkpoint.load(newest, kept)
    assert all(torch.equal(kept[f"student.ema.{ours[name]}"], tensor) for name, tensor in trained.items())
    card = (tmp_path / "out" / "README.md").read_text()
    digest = store.read_manifest(tmp_path / "data")["digest"]
    assert digest in card and "`student` began from `sprites-wan`" in card and "loss/student" in card
    capsys.readouterr()
    run(["inspect", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("every tensor is there") == 3


def test_cogvideox_goes_from_videos_to_diffusers(videos, tmp_path):
    from diffusers import CogVideoXPipeline

    model = write_model(tmp_path / "model", "2B")
    run(prepare_words(videos, tmp_path / "data", "cogvideox", model, "9"))
    run([*train_words(tmp_path / "data", tmp_path / "run", 1, "cogvideox:sft", model), "--run.micro_batch", "2"])
    run(["export", str(tmp_path / "run"), "--layout", "diffusers", "--out", str(tmp_path / "out")])
    theirs = CogVideoXPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 1, "max_sequence_length": 8}
    with torch.no_grad():
        video = theirs(prompt="a red circle", **size, output_type="pt").frames
    assert video.shape == (1, 9, 3, 32, 48) and torch.isfinite(video).all()


@pytest.mark.parametrize("kills", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_what_is_killed_ends_with_the_same_data_and_weights(videos, tmp_path, kills):
    count = KILLS[kills]
    began = time.monotonic()
    run(prepare_words(videos, tmp_path / "straight"))
    took = time.monotonic() - began  # kills come within a part of it, or most would find the work done
    words = prepare_words(videos, tmp_path / "killed")
    assert killed_until_done(lambda: run(words), count, longest=took / 4) >= count // 2
    assert values(tmp_path / "killed") == values(tmp_path / "straight")
    assert store.read_manifest(tmp_path / "killed") == store.read_manifest(tmp_path / "straight")

    steps = 2 if kills == "few" else 24
    began = time.monotonic()
    run(train_words(tmp_path / "straight", tmp_path / "whole", steps))
    took = time.monotonic() - began
    words = train_words(tmp_path / "killed", tmp_path / "hit", steps)
    assert killed_until_done(lambda: run(words), count, longest=took / 4, seed=1) >= count // 2
    whole, hit = (state_of(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("whole", "hit"))
    assert whole.keys() == hit.keys() and len(whole) > 300
    assert all(torch.equal(tensor, hit[name]) for name, tensor in whole.items())


def state_of(path):
    from safetensors.torch import load_file

    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found
