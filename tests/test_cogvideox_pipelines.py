"""kinema's sampling of CogVideoX against diffusers' own pipelines, on a tiny model in the Hub's folder layout."""

import pytest
import torch
from cogvideox_world import CPU, write_model
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)

from kinema import cli, pretrained, seeds
from kinema.data.video import write_video
from kinema.diffusion.guidance import Cosine
from kinema.diffusion.samplers import DDIM, DPMpp2MSDE
from kinema.models.cogvideox.transformer import SIZES
from kinema.models.text import T5

PROMPTS = ["a red circle moves left", "a blue circle"]


@pytest.fixture(scope="module", params=list(SIZES))
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / request.param, request.param)


def noise_of(model, count=2):
    shape = model.studio.codec.latent_shape(9, 32, 48)
    return model.denoiser.path.prior((count, *shape), seeds.keys(0, "sample", list(range(count))).fold("noise"))


def test_diffusers_pipeline_makes_the_same_video(folder):
    model = pretrained.load(str(folder), CPU).with_settings(sampler=DDIM(), guidance=3.0)
    image = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    conditioned = bool(model.spec.dimensions.image_channels)
    videos = model.studio.videos(model.spec, model.denoiser, PROMPTS, images=image if conditioned else None)
    kind = CogVideoXImageToVideoPipeline if conditioned else CogVideoXPipeline
    theirs = kind.from_pretrained(folder)
    assert isinstance(theirs.scheduler, CogVideoXDPMScheduler)
    theirs.scheduler = CogVideoXDDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    text = model.studio.text(PROMPTS)["text"]
    with torch.no_grad():
        made = theirs(
            **({"image": (image + 1) / 2} if conditioned else {}),
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            latents=noise_of(model).clone(),
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="pt",
            max_sequence_length=8,
        ).frames
    assert videos.std() > 0.05
    torch.testing.assert_close((videos + 1) / 2, made, atol=2e-4, rtol=1e-3)


def test_prompts_of_diffusers_pipeline_are_ours(folder):
    theirs = CogVideoXPipeline.from_pretrained(folder)
    ours = T5(str(folder), tokens=8, unconditional="").load(CPU)
    with torch.no_grad():
        text, negative = theirs.encode_prompt(PROMPTS, max_sequence_length=8)
    torch.testing.assert_close(ours(PROMPTS)["text"], text, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours([ours.unconditional] * 2)["text"], negative, atol=1e-6, rtol=1e-6)


def test_a_video_does_not_depend_on_its_batch_and_guidance_may_follow_the_time(tmp_path):
    model = pretrained.load(str(write_model(tmp_path / "model", "1.5-5B")), CPU)
    assert isinstance(model.studio.pipeline.sampler, DPMpp2MSDE) and model.settings()["guidance"] == 3.0
    both = model.studio.latents(model.spec, model.denoiser, PROMPTS, [4, 5])
    one = model.studio.latents(model.spec, model.denoiser, PROMPTS[1:], [5])
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-4)
    other = model.with_settings(guidance=Cosine(6.0))
    assert "Cosine" in other.settings()["guidance"]
    assert not torch.allclose(other.studio.latents(other.spec, other.denoiser, PROMPTS[1:], [5]), one, atol=1e-3)


def test_written_model_loads_and_predicts_alike(folder, tmp_path):
    model = pretrained.load(str(folder), CPU)
    pretrained.write(model, tmp_path / "copy", torch.float32)
    copy = pretrained.load(str(tmp_path / "copy"), CPU)
    assert copy.settings() == model.settings()
    assert copy.spec.schedule == model.spec.schedule and copy.spec.dimensions == model.spec.dimensions
    assert all(torch.equal(t, copy.module.state_dict()[name]) for name, t in model.module.state_dict().items())


def test_command_line_continues_an_image(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "5B-I2V")
    write_video(tmp_path / "first.mp4", torch.rand(1, 3, 48, 64) * 2 - 1, 8)
    words = ["sample", str(folder), "--prompt", "a red circle", "--steps", "2", "--device", "cpu"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--image", str(tmp_path / "first.mp4")]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
    assert cli.main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "give it one, with --image" in capsys.readouterr().err
