"""Every recipe of the embedded world builds, takes steps, and can be resumed and sampled from."""

import pytest
import torch

from kinema import config, pretrained
from kinema.data.sprites_data import SpriteVideos
from kinema.errors import UsageError, UserError
from kinema.evaluation.summary import from_folder
from kinema.recipes import sprites
from kinema.shipping import base
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = {
    "text": {"batch_size": 4},
    "vae": {"batch_size": 1, "frames": 5, "clips": 16},
    "wan": {"batch_size": 2, "clips": 4, "block": 2},
    "learn": {"clips": 4},
}


@pytest.mark.parametrize("name", SMALL)
def test_recipe_takes_steps_and_its_run_reads_back(name, tmp_path):
    run = getattr(sprites, name)(steps=2, **SMALL[name])
    trainer = Trainer(run, tmp_path, CPU)
    before = {key: tensor.clone() for key, tensor in trainer._state().items() if ".model." in key}
    trainer.train()
    after = trainer._state()
    assert config.load(tmp_path / "run.yaml") == run
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(after[key].isfinite().all() for key in before)
    assert trainer.step == 2 and from_folder(tmp_path).exists()


def test_frames_that_a_codec_cannot_give_back_stop_a_run_that_then_starts_corrected(tmp_path):
    with pytest.raises(UsageError, match="8 frames cannot be encoded; use 5 or 9"):
        Trainer(sprites.vae(steps=1, batch_size=1, frames=8, clips=16), tmp_path, CPU).train()
    trainer = Trainer(sprites.vae(steps=1, batch_size=1, frames=5, clips=16), tmp_path, CPU)
    trainer.train()
    with pytest.raises(UserError, match="belongs to another run"):
        Trainer(sprites.vae(steps=1, batch_size=1, frames=9, clips=16), tmp_path, CPU)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("wan", {"clips": 0}, "clips is 0"),
        ("wan", {"block": 0}, "block is 0"),
        ("vae", {"frames": 0}, "frames is 0"),
        ("vae", {"start": "sprites-ursa"}, "of class AutoencoderVQCosmos3D, not AutoencoderKLWan"),
        ("vae", {"start": "no"}, "no weights at no"),
        ("ode_pairs", {"steps": 0}, "0 steps cannot keep 4 states evenly; use 4"),
    ],
)
def test_what_a_recipe_cannot_begin_with_is_refused(name, wrong, says):
    with pytest.raises(UserError, match=says):
        getattr(sprites, name)(**wrong)


def test_windows_longer_than_a_clip_are_of_longer_clips():
    assert sprites.vae(frames=37).data.world.frames == 37 and sprites.vae(frames=9).data.world.frames == 33
    with pytest.raises(UsageError, match="a clip of this world has 33"):
        SpriteVideos(frames=37)


def test_text_and_codec_of_two_runs_become_a_base_that_a_generator_trains_on(tmp_path):
    Trainer(sprites.text(steps=1, batch_size=2), tmp_path / "text", CPU).train()
    Trainer(sprites.vae(steps=1, batch_size=1, frames=5, clips=16), tmp_path / "vae", CPU).train()
    with pytest.raises(UserError, match="vae did not train a text encoder"):
        base(tmp_path / "vae", tmp_path / "text", tmp_path / "base", CPU)
    assert not (tmp_path / "base").exists()
    base(tmp_path / "text", tmp_path / "vae", tmp_path / "base", CPU, clips=2)
    run = sprites.wan(steps=1, batch_size=2, clips=4, block=2, base=str(tmp_path / "base"))
    Trainer(run, tmp_path / "wan", CPU).train()
    made = pretrained.load(str(tmp_path / "wan"), CPU).with_settings(steps=1)
    pretrained.write(made, tmp_path / "out")
    videos = (
        pretrained.load(str(tmp_path / "out"), CPU)
        .with_settings(steps=1)
        .studio.videos(made.spec, made.denoiser, ["a big red circle moves left on a black background"])
    )
    assert videos.shape == (1, 33, 3, 64, 64) and videos.isfinite().all()


def test_codec_of_the_shipped_model_gives_back_what_it_is_shown():
    from kinema.data.sprites import World, render
    from kinema.models.wan.vae import WanVAE

    codec = WanVAE("sprites-wan").load(CPU)
    pixels = render(World(seed=5, split="all", one=1, two=1, behind=1), range(8))
    error = (codec.decode(codec.encode(pixels)) - pixels).square().mean()
    assert 10 * torch.log10(4 / error) > 30
