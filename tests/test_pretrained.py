"""The shipped generator: it loads by name, is what diffusers loads, and draws what it is asked for."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from world import game

from kinema import cli, pretrained, seeds
from kinema.data.scenes import Scene, Sprite
from kinema.data.sprites import render
from kinema.errors import UsageError, UserError
from kinema.evaluation.evaluate import HELD_OUT, evaluate, held_out, rendered, understood, videos_of
from kinema.evaluation.summary import from_folder
from kinema.models.wan.spec import Wan
from kinema.sampling import Studio
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")
CAPTIONS = ["a big red circle moves left on a black background", "a big blue square stays still on a grey background"]


@pytest.fixture(scope="module")
def model():
    return pretrained.load("sprites-wan", CPU)


def test_shipped_checkpoint_is_small_enough():
    folder = pretrained.find("sprites-wan")
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 10 * 2**20


def test_it_draws_what_it_is_asked_for(model):
    made = model.with_settings(steps=12)
    videos = made.studio.videos(made.spec, made.denoiser, CAPTIONS)
    scenes = understood(CAPTIONS)
    assert scenes[0] == Scene("black", (Sprite("circle", "red", "big", "left"),))
    from kinema.evaluation.scores import score

    scores = score(videos, scenes)
    assert videos.shape == (2, 33, 3, 64, 64)
    assert all(scores[name].value == 1 for name in ("shape", "colour", "motion", "size", "background"))


def test_diffusers_pipeline_makes_the_same_video(model):
    """Its grid ends at 1/1000 before the shift and its times are whole numbers, so the two agree to a few per mille."""
    from diffusers import WanPipeline

    theirs = WanPipeline.from_pretrained(pretrained.find("sprites-wan"))
    theirs.set_progress_bar_config(disable=True)
    made = model.with_settings(steps=30)
    latents = made.studio.latents(made.spec, made.denoiser, CAPTIONS[:1], [0])
    draw = seeds.keys(0, "sample", [0]).fold("noise")
    noise = model.denoiser.path.prior((1, *model.studio.codec.latent_shape(33, 64, 64)), draw)
    options = {"height": 64, "width": 64, "num_frames": 33, "num_inference_steps": 30, "output_type": "latent"}
    with torch.no_grad():
        other = theirs(
            prompt=CAPTIONS[:1], latents=noise.transpose(1, 2), guidance_scale=made.settings()["guidance"], **options
        ).frames
    assert (latents - other.transpose(1, 2)).abs().mean() < 0.02 * latents.std()


def test_steps_that_are_not_a_students_are_the_samplers():
    spec, pipeline = pretrained.describe("sprites-wan-causal")
    causal: Any = pretrained.Pretrained("causal", spec, None, None, Studio(pipeline, None, None))
    for steps, told in ((50, "UniPC"), (2, "UniPC"), (4, "few-step")):
        made = causal.with_settings(steps=steps)
        assert made.settings()["sampler"] == told and ("steps_at" in made.settings()) == (told == "few-step")
        assert made.spec == spec


def test_a_video_does_not_depend_on_its_batch(model):
    made = model.with_settings(steps=2)
    both = made.studio.latents(made.spec, made.denoiser, CAPTIONS, [4, 5])
    one = made.studio.latents(made.spec, made.denoiser, CAPTIONS[1:], [5])
    torch.testing.assert_close(both[1:], one, atol=2e-4, rtol=1e-4)


def test_written_model_loads_and_predicts_alike(model, tmp_path):
    text = replace(model.studio.pipeline.text, unconditional="grey")
    pipeline = replace(model.studio.pipeline, text=text)
    model = replace(model, studio=replace(model.studio, pipeline=pipeline, text=text.load(CPU)))
    pretrained.write(model, tmp_path / "copy")
    copy = pretrained.load(str(tmp_path / "copy"), CPU)
    assert copy.settings() == model.settings() and copy.spec.shift == model.spec.shift
    assert copy.studio.text.unconditional == model.studio.text.unconditional
    x, t, text = torch.ones(1, 9, 16, 8, 8), torch.full((1, 1), 0.5), model.studio.text(CAPTIONS[:1])
    assert torch.equal(model.denoiser(x, t, text), copy.denoiser(x, t, text))


def test_a_model_that_shares_parts_is_small_and_predicts_as_the_whole(model, tmp_path):
    folder = tmp_path / "student"
    pretrained.write(model, folder)
    pretrained.write(model, folder, parent="sprites-wan")  # in the place of the complete one
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"transformer", "scheduler"}
    child = pretrained.load(str(folder), CPU).with_settings(steps=2)
    whole = model.with_settings(steps=2)
    videos = [made.studio.videos(made.spec, made.denoiser, CAPTIONS[:1]) for made in (child, whole)]
    assert torch.equal(*videos) and child.settings() == whole.settings()
    pretrained.write(child, tmp_path / "again")  # complete: what another folder has for it is copied
    assert {"vae", "text_encoder", "tokenizer"} < {path.name for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("parent", ["theirs", "../theirs", "", 7])
def test_a_parent_that_is_missing_or_no_name_is_told(model, tmp_path, parent):
    (tmp_path / "student" / "transformer").mkdir(parents=True)
    (tmp_path / "student" / "kinema.json").write_text(json.dumps({"parent": parent}))
    with pytest.raises(UserError, match="copy theirs there" if parent == "theirs" else r"kinema\.json has parent"):
        model.studio.pipeline.codec.__class__(str(tmp_path / "student")).load(CPU)


def test_a_parent_with_other_parts_is_refused(model, tmp_path):
    pretrained.write(model, tmp_path / "theirs")
    file = tmp_path / "theirs" / "vae" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="vae of this model"):
        pretrained.write(model, tmp_path / "student", parent=tmp_path / "theirs")


def test_killed_evaluation_goes_on_and_scores_the_same(model, tmp_path):
    made = model.with_settings(steps=2)
    captions, scenes = held_out(4)
    whole = evaluate(made, captions, scenes, tmp_path / "whole", batch=2)
    with pytest.raises(KeyboardInterrupt):
        videos_of(made, captions, tmp_path / "killed", batch=2, each=lambda done: _stop())
    assert len(list((tmp_path / "killed").glob("latents-*"))) == 1
    assert evaluate(made, captions, scenes, tmp_path / "killed", batch=2) == whole
    written = json.loads((tmp_path / "killed" / "scores.json").read_text())["scores"]
    assert written["colour"]["n"] == written["Fréchet distance"]["n"] == 4
    with pytest.raises(UserError, match="holds the evaluation of another"):
        evaluate(made.with_settings(guidance=2.0), captions, scenes, tmp_path / "killed", batch=2)
    first = next(iter(made.module.parameters()))
    with torch.no_grad():
        first += 1
        try:  # the same model, trained further
            with pytest.raises(UserError, match="holds the evaluation of other weights"):
                evaluate(made, captions, scenes, tmp_path / "killed", batch=2)
        finally:
            first -= 1


def test_a_folder_is_of_the_plain_or_of_the_fast_model_and_of_as_many_bits(tmp_path, model):
    plain = pretrained.load("sprites-wan-4step", torch.device("cpu"))
    models = [plain, plain.quickened(), plain.quickened(True), plain.quickened(True, True)]
    for n, (before, after) in enumerate(zip(models, (*models[1:], plain), strict=True)):
        folder = tmp_path / str(n)
        videos_of(before, CAPTIONS[:1], folder)
        with pytest.raises(UserError, match=r"the same model with or without --(fast|fp8)"):
            videos_of(after, CAPTIONS[:1], folder)
    with pytest.raises(UserError, match="is not causal; the fast paths"):
        model.quickened()


def _stop():
    raise KeyboardInterrupt


def test_an_evaluation_in_which_nothing_was_seen_can_be_reported(model, tmp_path):
    captions, scenes = held_out(2)
    black = replace(model, studio=replace(model.studio, codec=Black(model.studio.codec))).with_settings(steps=1)
    scores = evaluate(black, captions, scenes, tmp_path)
    assert scores["misfit"].n == 0 and scores["all three"].value == 0
    assert "misfit" in from_folder(tmp_path).read_text()
    for damaged in ("settings.json", "latents-000000.safetensors"):
        file = tmp_path / damaged
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(UserError, match=damaged):
            evaluate(black, captions, scenes, tmp_path)
        file.unlink()
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(UserError, match=r"scores\.json"):
        from_folder(tmp_path)


class Black:
    """A codec that decodes everything to black."""

    def __init__(self, codec):
        self.device, self.latent_shape = codec.device, codec.latent_shape

    def decode(self, latents):
        return -torch.ones(len(latents), 33, 3, 64, 64)


def test_the_truth_of_held_out_scenes_is_their_world():
    assert torch.equal(rendered(held_out(3)[1], 33), render(HELD_OUT, range(3)))
    assert rendered(held_out(2)[1], 9).shape == (2, 9, 3, 64, 64)


def test_unknown_model_and_foreign_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="sprites-wan"):
        pretrained.load("sprites-wann", CPU)
    with pytest.raises(UserError, match=r"run\.yaml"):
        pretrained.load(str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("kinema.json", "{", "copy or download the model again"),
        ("kinema.json", "[]", "holds a list"),
        ("kinema.json", '{"frames": "many"}', r"kinema\.json: frames is 'many'"),
        ("kinema.json", '{"guidance": NaN}', "guidance is nan"),
        ("scheduler/scheduler_config.json", '{"flow_shift": "3"}', "flow_shift '3'"),
    ],
)
def test_damaged_settings_name_their_file(tmp_path, file, content, says):
    (tmp_path / "scheduler").mkdir()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=says):
        pretrained.describe(str(tmp_path))


def test_settings_out_of_range_are_refused(model):
    for wrong in ({"steps": 0}, {"frames": 1.5}, {"guidance": float("nan")}, {"guidance": float("inf")}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            model.with_settings(**wrong)


def test_caption_outside_the_grammar_is_an_error():
    with pytest.raises(UserError, match="caption 2"):
        understood([CAPTIONS[0], "a cat on a mat"])


def test_a_role_of_a_run_is_exported_in_every_layout(tmp_path, capsys):
    trainer = Trainer(game(steps=2), tmp_path / "run", torch.device("cpu"))
    trainer.train()
    for role, kind in (("student", "ema"), ("student", "model"), ("critic", "model")):
        for layout in ("kinema", "wan", "diffusers", "self_forcing"):
            out = tmp_path / f"{role}-{kind}-{layout}"
            words = ["export", str(tmp_path / "run"), "--out", str(out), "--role", role, "--layout", layout]
            assert cli.main([*words, *(["--no-ema"] if kind == "model" else [])]) == 0
            spec = Wan.from_pretrained(str(out))
            state = spec.load(spec.build(), "cpu").state_dict()
            kept = trainer._state()
            assert all(torch.equal(tensor, kept[f"{role}.{kind}.{name}"]) for name, tensor in state.items())
    capsys.readouterr()
    for wrong, says in (
        (["--role", "teacher"], "no role teacher learned"),
        (["--layout", "sat"], "its layouts are kinema, wan, diffusers, self_forcing"),
        (["--adapters"], "no adapters to export"),
    ):
        assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "no"), *wrong]) > 0
        assert says in capsys.readouterr().err and not (tmp_path / "no").exists()
