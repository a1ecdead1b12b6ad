"""The CogVideoX recipes train every variant from a folder of clips, and what they make can be sampled and exported."""

from dataclasses import replace

import pytest
import torch
from cogvideox_world import CPU, write_clips, write_model
from safetensors.torch import load_file, save_file

from kinema import cli, config, pretrained
from kinema.diffusion.times import Stratified
from kinema.diffusion.weighting import Even
from kinema.errors import UsageError, UserError
from kinema.models import lora
from kinema.models.cogvideox import layouts
from kinema.models.cogvideox.transformer import SIZES
from kinema.optim import Ema
from kinema.recipes import cogvideox
from kinema.run import Preview
from kinema.training.trainer import Trainer

OPTIONS = ["--run.batch_size", "2", "--run.plan.compute", "float32"]


@pytest.mark.parametrize("variant", SIZES)
def test_every_variant_trains_one_step(tmp_path, variant):
    model, clips = str(write_model(tmp_path / "model", variant)), str(write_clips(tmp_path / "clips"))
    run = config.parse(cogvideox.sft(model, clips, steps=1), OPTIONS)
    trainer = Trainer(run, tmp_path / "run", CPU)
    before = {name: p.detach().clone() for name, p in trainer.actors["student"].module.named_parameters()}
    trainer.train()
    assert config.load(tmp_path / "run" / "run.yaml") == run
    after = dict(trainer.actors["student"].module.named_parameters())
    assert all(not torch.equal(before[name], p) and p.isfinite().all() for name, p in after.items())
    made = pretrained.load(str(tmp_path / "run"), CPU)
    images = torch.zeros(1, 3, 32, 48) if "I2V" in variant else None
    videos = made.studio.videos(made.spec, made.denoiser, ["a red circle"], images=images)
    assert videos.shape == (1, 9, 3, 32, 48) and videos.isfinite().all()
    if images is not None:
        with pytest.raises(UserError, match="continues an image"):
            made.studio.videos(made.spec, made.denoiser, ["a red circle"])


@pytest.mark.parametrize("variant", ["2B", "1.5-5B-I2V"])
def test_lora_learns_its_own_weights_resumes_and_becomes_a_file(tmp_path, variant):
    model, clips = str(write_model(tmp_path / "model", variant)), str(write_clips(tmp_path / "clips"))

    def trained(folder, *steps):
        for count in steps:
            options = [*OPTIONS, "--run.save_every", "1", "--run.objective.student.spec.edits.0.base", "null"]
            run = config.parse(cogvideox.lora(model, clips, steps=count, rank=4), options)
            trainer = Trainer(run, folder, CPU)
            trainer.train()
        return trainer

    trainer = trained(tmp_path / "straight", 3)
    module = trainer.actors["student"].module
    assert trainer.actors["student"].learning.keys() == {
        f"{name}.lora_{m}" for name, _ in lora.adapted(module) for m in "AB"
    }
    assert all(layer.lora_B.any() for _, layer in lora.adapted(module))
    kept = {name for name in trainer._state() if name.startswith("student.model.")}
    assert kept == {f"student.model.{name}" for name in trainer.actors["student"].learning}
    again = trained(tmp_path / "stopped", 2, 3)._state()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trainer._state().items())
    folder = lora.export(module, tmp_path / "lora", layouts.diffusers_name)
    edit = lora.LoRA.of_file(str(folder))
    assert (edit.rank, edit.alpha) == (4, 2.0)
    made = pretrained.load(str(tmp_path / "straight"), CPU)
    pretrained.write(made, tmp_path / "out", torch.float32)
    merged = pretrained.load(str(tmp_path / "out"), CPU)
    assert not merged.spec.edits and not lora.adapted(merged.module)
    folded = lora.folded(module)
    for name, tensor in merged.module.state_dict().items():
        torch.testing.assert_close(tensor, folded[name], atol=1e-6, rtol=1e-6)


def test_adapters_are_refused_by_another_base_and_another_rank(tmp_path):
    model, clips = str(write_model(tmp_path / "model", "5B")), str(write_clips(tmp_path / "clips"))

    def run(rank=4, **changes):
        return replace(config.parse(cogvideox.lora(model, clips, steps=1, rank=rank), OPTIONS), **changes)

    Trainer(run(), tmp_path / "run", CPU).train()
    again = {"steps": 2, "init_from": str(tmp_path / "run")}
    assert Trainer(run(**again), tmp_path / "again", CPU).step == 0
    with pytest.raises(UserError, match="rank"):
        Trainer(run(rank=2), tmp_path / "run", CPU)
    with pytest.raises(UserError, match=r"of size \[4, 32\], not \[2, 32\]; .* same rank"):
        Trainer(run(rank=2, **again), tmp_path / "other", CPU)
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor if "to_q" in name else tensor for name, tensor in load_file(path).items()}, path)
    for make in (
        lambda: Trainer(run(), tmp_path / "run", CPU),
        lambda: Trainer(run(**again), tmp_path / "third", CPU),
        lambda: pretrained.load(str(tmp_path / "run"), CPU),
    ):
        with pytest.raises(UserError, match="trained on other weights than these; give the model that they belong to"):
            make()


@pytest.mark.parametrize(
    ("variant", "options", "says"),
    [
        ("2B", ["--run.data.height", "40"], "height 40 is not a multiple of 16; use 32 or 48"),
        ("2B", ["--run.data.frames", "4"], "4 frames cannot be encoded; use 1 or 9, 1 + a multiple of 8"),
        ("2B", ["--run.data.fps", "12"], "4 of 4 clips have fewer than 12 frames a second"),
        ("2B", ["--rank", "-1"], "rank -1 is not a rank; use 1 or more"),
        ("5B-I2V", ["--run.data.width", "64"], "learned positions of this CogVideoX are for (3, 2, 3) patches"),
        ("5B-I2V", ["--run.data.image", "null"], "this CogVideoX continues an image; give it one"),
        ("2B", ["--data", "gone"], "neither a JSONL file nor a folder"),
        ("2B", ["--data", "uncaptioned"], "1.mp4 has no caption"),
    ],
)
def test_bad_input_is_one_sentence_with_the_fix(tmp_path, monkeypatch, capsys, variant, options, says):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", variant)
    write_clips(tmp_path / "clips")
    write_clips(tmp_path / "uncaptioned")
    (tmp_path / "uncaptioned" / "prompts.txt").write_text("a red circle\n \na blue circle\na circle\n")
    words = ["train", "cogvideox:lora", "--model", "model", "--data", "clips", "--steps", "1", "--device", "cpu"]
    capsys.readouterr()
    assert cli.main([*words, *OPTIONS, *options]) in (1, 2)
    said = capsys.readouterr().err
    assert says in said and said.startswith("kinema: ") and said.count("\n") == 1


def test_previews_of_image_to_video_continue_images(tmp_path):
    model, clips = str(write_model(tmp_path / "model", "5B-I2V")), str(write_clips(tmp_path / "clips"))
    preview = Preview(("a red circle",), every=1)
    run = replace(config.parse(cogvideox.sft(model, clips, steps=1), OPTIONS), preview=preview)
    with pytest.raises(UsageError, match=r"set run\.preview\.images"):
        Trainer(run, tmp_path / "run", CPU)
    shown = replace(run, preview=replace(preview, images=(f"{clips}/videos/0.mp4",)))
    Trainer(shown, tmp_path / "run", CPU).train()
    assert config.load(tmp_path / "run" / "run.yaml") == shown
    assert len(list((tmp_path / "run" / "previews").glob("*.mp4"))) == 1
    with pytest.raises(UserError, match=r"none\.png"):
        Trainer(replace(run, preview=replace(preview, images=("none.png",))), tmp_path / "other", CPU)
    with pytest.raises(UsageError, match="1 prompts but 2 images"):
        replace(preview, images=("a.png", "b.png"))


def test_recipes_have_the_published_hyper_parameters(tmp_path):
    model, clips = str(write_model(tmp_path / "model", "5B-I2V")), str(tmp_path)
    sft, adapters = cogvideox.sft(model, clips), cogvideox.lora(model, clips)
    optims = [run.objective.student.optim for run in (sft, adapters)]
    assert [(o.lr, o.clip, o.warmup, o.betas, o.weight_decay) for o in optims] == [
        (1e-5, 0.1, 100, (0.9, 0.95), 1e-4),
        (1e-4, 1.0, 100, (0.9, 0.95), 1e-4),
    ]
    assert sft.objective.student.ema == Ema(0.9999) and adapters.objective.student.ema is None
    assert [run.objective.student.spec.edits for run in (sft, adapters)] == [
        (),
        (lora.LoRA(rank=256, alpha=128, base="bfloat16"),),
    ]
    for run in (sft, adapters):
        assert (run.batch_size, run.data.dropout, run.pipeline.steps) == (16, 0.1, 4)
        assert run.objective.times == Stratified() and run.objective.weighting == Even()
        assert run.data.codec == run.pipeline.codec and run.data.text == run.pipeline.text
        assert (run.data.image.noise, run.data.image.drop) == ((-3.0, 0.5), 0.05)
        assert (run.plan.compute, run.plan.recompute) == ("bfloat16", "block")


def test_a_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no CogVideoX"):
        cogvideox.sft("sprites-wan", str(tmp_path))
