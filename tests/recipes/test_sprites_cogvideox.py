"""The parts of a tiny CogVideoX for sprites are trained, joined, shipped and adapted; diffusers loads the result."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline

from kinema import config, pretrained
from kinema.data.sprites import render
from kinema.demo import demo
from kinema.errors import UserError
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.cogvideox.vae_training import CogVideoXVAESize, whitened
from kinema.recipes import sprites_cogvideox as recipes
from kinema.shipping import base
from kinema.training import checkpoint
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("frames", [9, 17])  # one chunk, and one that follows
def test_whitening_latents_changes_no_reconstruction(frames):
    spec = CogVideoXVAESize(channels=(8, 8, 8, 8), res_blocks=1, groups=4)
    network = spec.load(spec.build(), CPU).double()
    codec, pixels = spec.read(network), torch.rand(1, frames, 3, 16, 16, dtype=torch.float64) * 2 - 1
    make = torch.Generator().manual_seed(0)
    mixed, centre = (torch.randn(*shape, dtype=torch.float64, generator=make) for shape in ((16, 16), (16,)))
    with torch.no_grad():
        network.decoder.conv_in.conv.weight.zero_()  # the one layer that pads with zeros
        mean, logvar = codec.posterior(pixels)
        before = codec.reconstruct(mean)
        whitened(network, centre, mixed @ mixed.T)
        white, spread = codec.posterior(pixels)
        values, vectors = torch.linalg.eigh(mixed @ mixed.T)
        turn = vectors / values.sqrt() @ vectors.T
        expected = torch.einsum("oc,btchw->btohw", turn, mean - centre[:, None, None])
        torch.testing.assert_close(white, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(codec.reconstruct(white), before, atol=1e-8, rtol=1e-8)
        exact = torch.einsum("oc,btchw->btohw", turn**2, logvar.exp()).log()
        assert (spread <= exact + 1e-9).all(), "a geometric mean is at most the mean"


def test_whitening_reaches_the_decoders_first_layer():
    spec = CogVideoXVAESize(channels=(8, 8, 8, 8), res_blocks=1, groups=4)
    network = spec.load(spec.build(), CPU).double()
    mixed = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(mixed @ mixed.T)
    white = torch.einsum("oc,bcthw->bothw", vectors / values.sqrt() @ vectors.T, z)
    with torch.no_grad():
        before = network.decoder.conv_in(z)[0]
        whitened(network, torch.zeros(16), mixed @ mixed.T)
        torch.testing.assert_close(network.decoder.conv_in(white)[0], before, atol=1e-9, rtol=1e-9)


def test_text_codec_and_transformer_become_a_model_that_takes_adapters(tmp_path):
    Trainer(recipes.text(steps=1, batch_size=2), tmp_path / "text", CPU).train()
    Trainer(recipes.vae(steps=1, batch_size=1, frames=9, clips=16), tmp_path / "vae", CPU).train()
    base(tmp_path / "text", tmp_path / "vae", tmp_path / "base", CPU, clips=1)
    with torch.no_grad():
        latents = CogVideoXVAE(str(tmp_path / "base")).load(CPU).encode(render(recipes.EVERYTHING, [0]))
    covariance = latents.movedim(2, -1).flatten(0, -2).T.cov()
    loud = covariance.diagonal() > 0.5  # an untrained encoder says less than 16 different things
    torch.testing.assert_close(covariance[loud][:, loud], torch.eye(int(loud.sum())), atol=0.05, rtol=0)
    assert loud.sum() > 8 and latents.mean((0, 1, 3, 4)).abs().max() < 0.05
    run = recipes.cogvideox(steps=1, batch_size=1, clips=2, block=2, base=str(tmp_path / "base"))
    Trainer(run, tmp_path / "run", CPU).train()
    made = pretrained.load(str(tmp_path / "run"), CPU).with_settings(steps=1, frames=9)
    pretrained.write(made, tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file())
    assert size < 8 * 2**20
    theirs = CogVideoXPipeline.from_pretrained(tmp_path / "model")
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    options = ["--base", str(tmp_path / "model"), "--clips", "1", "--known", "1", "--rank", "2", "--steps", "1"]
    options += ["--run.batch_size", "2"]
    report = demo(tmp_path / "demo", CPU, "sprites:cogvideox_lora", options, videos=1, steps=1)
    assert "heart" in report.read_text()
    said = json.loads((tmp_path / "demo" / "scores.json").read_text())
    assert {(when, what) for when, both in said.items() for what in both} == {
        (when, what) for when in ("before", "after") for what in ("new", "known")
    }
    assert said["before"]["new"]["shape"]["n"] == 1
    run = config.load(tmp_path / "demo" / "train" / "run.yaml")
    assert run == config.configure("sprites:cogvideox_lora", options)
    assert [part.clips for part in run.data.parts] == [1, 1]
    kept = checkpoint.names(checkpoint.latest(tmp_path / "demo" / "train" / "checkpoints"))
    assert len([name for name in kept if name.startswith("student.model.")]) == 2 * 4 * 6
    with pytest.raises(UserError, match="fine-tunes no generator"):
        demo(tmp_path / "demo", CPU, "sprites:text")
    videos = made.studio.videos(made.spec, made.denoiser, ["a big red circle moves left on a black background"])
    assert videos.shape == (1, 9, 3, 64, 64) and videos.isfinite().all()
