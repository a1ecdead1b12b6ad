"""`kinema stream` with a causal model: the shipped one, read as causal."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kinema import cli
from kinema.data.sprites import World, render
from kinema.data.video import probe, read_video, write_video
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.vae import VideoAutoencoder
from kinema.pretrained import describe, load, write

PROMPT = "a big red circle moves left on a black background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped weights as a causal model of three steps, in a pipeline's folder."""
    shipped = load("sprites-wan", torch.device("cpu"))
    spec = WanCausal(size=shipped.spec.dimensions, shift=3.0, window=6, sink=1, steps_at=(1.0, 0.8, 0.5))
    folder = tmp_path_factory.mktemp("model") / "causal"
    write(replace(shipped, spec=spec).with_settings(steps=3, guidance=1.0), folder)
    return folder


def stream(capsys, *words):
    code = cli.main(["stream", *map(str, words), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_model_knows_how_it_is_streamed(model):
    spec, pipeline = describe(str(model))
    assert isinstance(spec, WanCausal) and pipeline.steps == 3
    assert (spec.shift, spec.chunk, spec.window, spec.sink, spec.steps_at) == (3.0, 3, 6, 1, (1.0, 0.8, 0.5))


def test_a_stream_becomes_a_file_of_as_many_frames_as_asked_for(model, tmp_path, capsys):
    out = tmp_path / "new" / "video.mp4"
    code, said, _ = stream(capsys, model, "--prompt", PROMPT, "--frames", 30, "--out", out)
    measured = json.loads(said)
    assert code == 0 and (probe(out).frames, probe(out).height, probe(out).fps) == (30, 64, 8)
    assert measured["frames"] == 30 and measured["steps"] == 3 and measured["first_frames_seconds"] > 0
    assert (measured["sampler"], measured["steps_at"]) == ("few-step", [1.0, 0.8, 0.5])
    assert (measured["window"], measured["sink"], measured["compute"]) == (6, 1, "float32")


def test_a_fast_stream_is_the_same_video(model, tmp_path, capsys):
    videos = []
    for number, more in enumerate([(), ("--fast",), ("--fast", "--fp8", "--fp8-attention")]):
        out = tmp_path / f"{number}.mp4"
        code, said, _ = stream(capsys, model, "--prompt", PROMPT, "--frames", 21, "--out", out, *more)
        assert code == 0 and [json.loads(said)[name] for name in ("fast", "fp8")] == [number > 0, number > 1]
        videos.append(read_video(out))
    plain, fast, eight = videos
    assert (plain - fast).abs().mean() < 5e-3  # rounding, and what compression makes of it
    assert 1e-4 < (fast - eight).abs().mean() < 0.05


def test_a_prompt_that_comes_later_leaves_what_was_before(model, tmp_path, capsys):
    videos = []
    switch = ("--switch", "6:a big yellow square orbits on a white background")
    for number, more in enumerate([(), switch, (*switch, "--anew")]):
        out = tmp_path / f"{number}.mp4"
        code, said, _ = stream(capsys, model, "--prompt", PROMPT, "--seconds", 2.6, "--out", out, *more)
        assert code == 0 and [told["frame"] for told in json.loads(said)["prompts"]] == ([0, 9] if more else [0])
        videos.append(read_video(out))
    plain, kept, anew = videos
    assert len(plain) == 21
    for other in (kept, anew):  # frame 6 is of latent 2, in the first chunk; the second one, from frame 9 on, hears it
        assert (plain[:9] - other[:9]).abs().mean() < 0.02 < (plain[9:] - other[9:]).abs().mean()
    assert (kept[9:] - anew[9:]).abs().mean() > 0.02


def test_raw_frames_go_to_standard_output(model, tmp_path, capfdbinary):
    sys.stdout.flush()
    code = cli.main(["stream", str(model), "--prompt", "", "--frames", "5", "--out", "-", "--device", "cpu"])
    out, err = capfdbinary.readouterr()
    assert code == 0 and len(out) == 5 * 64 * 64 * 3 and json.loads(err)["frames"] == 5


def test_control_c_ends_an_endless_stream_with_a_whole_file(model, tmp_path, capsys, monkeypatch):
    decode, out = VideoAutoencoder.decode_next, tmp_path / "video.mp4"

    def interrupted(self, latents, state=None):
        if state is not None and state.latents == 3:
            signal.raise_signal(signal.SIGINT)
        return decode(self, latents, state)

    monkeypatch.setattr(VideoAutoencoder, "decode_next", interrupted)
    code, said, _ = stream(capsys, model, "--prompt", PROMPT, "--endless", "--out", out)
    assert code == 0 and probe(out).frames == json.loads(said)["frames"] >= 21


def test_raw_frames_end_when_nobody_reads_them():
    frames = "(torch.zeros(1, 3, 64, 64) for _ in itertools.count())"
    code = f"import itertools, torch; from kinema.broadcast import _write; _write({frames})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert len(process.stdout.read(64 * 64 * 3)) == 64 * 64 * 3
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_words_that_the_model_does_not_know_are_named_in_one_line(model, tmp_path, capsys):
    words = ("--switch", "0:a big yelow squares orbits.", "--frames", 9, "--out", tmp_path / "video.mp4")
    _, _, err = stream(capsys, model, "--prompt", "a Big crimsonish circle", *words)
    assert err == (
        "causal does not know 'crimsonish', 'yelow' (nearest: yellow), 'squares' (nearest: square), '.'; "
        "it reads an unknown word in the place of each\n"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--switch", "blue"), "must be FRAME:TEXT"),
        (
            ("--switch", "13:blue", "--frames", "21"),
            "the last chunk of these 21 frames begins at frame 9; switch there",
        ),
        (("--switch", "40:blue"), "the last chunk of these 33 frames begins at frame 21"),
        (("--prompt", "another"), "give those that follow it as --switch FRAME:TEXT"),
        (("--anew",), "give one with --switch, or leave --anew out"),
        (("--seconds", "-1"), "above 0"),
        (("--frames", "9", "--endless"), "not allowed with"),
        (("--out", "video.avi"), "neither an .mp4 file nor -"),
        (("--window", "3", "--sink", "1"), "use 4 or more"),
        (("--context", "4"), "no multiple of chunk 3"),
    ],
)
def test_what_cannot_be_streamed_is_said_in_one_line(model, capsys, words, says):
    code, _, err = stream(capsys, model, "--prompt", PROMPT, *words)
    assert code != 0 and says in err and err.count("\n") == 1


def test_a_model_that_makes_all_frames_at_once_is_refused(capsys):
    code, _, err = stream(capsys, "sprites-wan", "--prompt", PROMPT)
    assert code == 1 and "kinema sample" in err and err.count("\n") == 1


def test_sampling_a_causal_model_goes_chunk_by_chunk(model):
    loaded = load(str(model), torch.device("cpu"))
    calls = []
    loaded.module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    videos = loaded.studio.videos(loaded.spec, loaded.denoiser, [PROMPT, ""])
    assert videos.shape == (2, 33, 3, 64, 64) and calls == [3] * (3 * 3 + 2)


def test_sampling_says_in_pixel_frames_what_does_not_fill_chunks(model, capsys):
    for frames, fitting in ((29, "use 21 or 33"), (30, "use 21 or 33"), (34, "use 33 or 45"), (2, "use 9\n")):
        code = cli.main(["sample", str(model), "--prompt", "x", "--frames", str(frames), "--device", "cpu"])
        assert code == 2 and fitting in capsys.readouterr().err


def test_sampling_continues_an_image_and_says_what_cannot(model, tmp_path, capsys):
    first = render(World(), [3])[0, :1]
    write_video(tmp_path / "first.mp4", first, 8)
    words = ["--prompt", PROMPT, "--image", str(tmp_path / "first.mp4"), "--device", "cpu", "--steps", "2"]
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["sample", str(model), *words, *out, "--frames", "13"]) == 0
    frames = read_video(next((tmp_path / "out").glob("*.mp4")))
    assert len(frames) == 13 and (frames[0] - first[0]).abs().mean() < 0.06
    assert cli.main(["sample", str(model), *words, "--frames", "9"]) == 2
    assert "use 1 or 13" in capsys.readouterr().err
    assert cli.main(["sample", "sprites-wan", *words]) == 2
    assert "takes no image" in capsys.readouterr().err
