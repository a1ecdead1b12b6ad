"""CogVideoX's autoencoder and T5: what they make of clips and prompts, and what they refuse."""

import pytest
import torch
from cogvideox_world import CPU, write_codec, write_encoder
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file

from kinema import seeds
from kinema.errors import UsageError, UserError
from kinema.models.cogvideox.vae import CogVideoXVAE, VideoAutoencoder, front_padded, placed_first
from kinema.models.text import T5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_codec(folder)
    write_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder):
    return CogVideoXVAE(str(folder)).load(CPU)


def wave(a, f, phase, *shape):
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) % 997
    return (a * torch.sin(f * i + phase)).float().reshape(shape)


def test_recorded_autoencoder_depends_on_how_a_clip_is_cut():
    """Parameter number m of the recorded network is 0.05·sin(0.1·i + m), plus 1 for the weights of norms."""
    network = AutoencoderKLCogVideoX(block_out_channels=(32, 64, 64, 128), layers_per_block=1)
    with torch.no_grad():
        for m, (name, p) in enumerate(sorted(network.named_parameters())):
            p.copy_(wave(0.05, 0.1, m, *p.shape) + float(p.ndim == 1 and name.endswith("weight")))
    assert sum(p.numel() for p in network.parameters()) == 8_113_987
    pixels = wave(1, 0.11, 0.3, 1, 3, 17, 32, 32).transpose(1, 2)
    with torch.no_grad():
        made = {}
        for chunk in ("8+1", "whole"):
            spec = CogVideoXVAE("", chunk=chunk)
            codec = VideoAutoencoder(spec, network.eval())
            made[chunk], logvar = codec.posterior(pixels)
            short = codec.posterior(pixels[:, :9])[0]
            made[chunk + " short"] = short
    assert float(made["8+1"].mean()) == pytest.approx(-0.1622577, abs=1e-4)
    assert float(made["whole"].mean()) == pytest.approx(-0.5122978, abs=1e-4)
    torch.testing.assert_close(made["8+1 short"], made["whole short"], atol=5e-6, rtol=1e-5)
    assert logvar.abs().max() <= 30


def test_encode_and_decode_equal_diffusers(codec):
    pixels = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = codec.network.encode(pixels.transpose(1, 2)).latent_dist.mode()
        latents = codec.encode(pixels)
        assert latents.shape[1:] == codec.latent_shape(9, 32, 48) == (3, 16, 4, 6)
        torch.testing.assert_close(latents, 0.7 * z.transpose(1, 2), atol=1e-5, rtol=1e-5)
        expected = codec.network.decode(z).sample.transpose(1, 2).clamp(-1, 1)
        torch.testing.assert_close(codec.decode(latents), expected, atol=1e-4, rtol=1e-4)


def test_parts_of_a_batch_equal_the_whole(folder, codec):
    pixels = torch.rand(3, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    parts = CogVideoXVAE(str(folder), pixels=1).load(CPU)
    with torch.no_grad():
        torch.testing.assert_close(parts.encode(pixels), codec.encode(pixels), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            parts.decode(codec.encode(pixels)), codec.decode(codec.encode(pixels)), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("multiple", [1, 2])
def test_only_padding_is_trimmed(folder, codec, multiple):
    padded = CogVideoXVAE(str(folder), multiple=multiple).load(CPU)
    pixels = torch.rand(1, 17, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        plain, latents = codec.encode(pixels), padded.encode(pixels)
        assert latents.shape[1:] == padded.latent_shape(17, 16, 16) and latents.shape[1] == 5 + (multiple == 2)
        assert torch.equal(latents[:, multiple - 1 :], plain)
        assert torch.equal(padded.decode(latents), codec.decode(plain))


@pytest.mark.parametrize("count", [1, 3, 21])
def test_decode_gives_4L_minus_3_frames(codec, count):
    with torch.no_grad():
        assert codec.decode(torch.zeros(1, count, 16, 1, 1)).shape == (1, 4 * count - 3, 3, 8, 8)


@pytest.mark.parametrize(("multiple", "frames"), [(1, 0), (2, 1), (4, 3)])
def test_padding_is_in_front_and_fills_the_multiple(multiple, frames):
    video = torch.arange(5.0).reshape(1, 5, 1)
    made = front_padded(video, multiple)
    assert made.flatten().tolist() == [0.0] * frames + [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.equal(front_padded(made, multiple), made)


def test_image_condition_occupies_frame_zero_only(folder):
    image = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scales = {}
    with torch.no_grad():
        for kind in ("multiply", "plain", "divide"):
            codec = CogVideoXVAE(str(folder), image_scale=kind, multiple=2).load(CPU)
            latents = codec.image_latents(image, 6)
            assert latents.shape == (2, 6, 16, 2, 4) and not latents[:, 1:].any() and latents[:, 0].any()
            scales[kind] = latents[:, 0] / codec.moments(image[:, None])[0][:, 0]
    assert [float(scale.mean()) for scale in scales.values()] == pytest.approx([0.7, 1, 1 / 0.7], rel=1e-5)
    assert torch.equal(placed_first(torch.ones(1, 1, 2), 3), torch.tensor([[[1.0, 1], [0, 0], [0, 0]]]))


def test_scales_are_those_of_the_configuration_unless_given(folder, tmp_path):
    write_codec(tmp_path, invert=True)
    assert CogVideoXVAE(str(tmp_path)).load(CPU).image_scale == pytest.approx(1 / 0.7)
    assert CogVideoXVAE(str(folder)).load(CPU).image_scale == pytest.approx(0.7)
    other = CogVideoXVAE(str(tmp_path), latent_scale=1.15258426, image_scale="plain").load(CPU)
    assert (other.scale, other.image_scale) == (1.15258426, 1.0)


def test_posterior_differs_per_visit_and_not_per_batch(codec):
    mean, logvar = torch.zeros(2, 3, 16, 2, 2), torch.zeros(2, 3, 16, 2, 2)
    first, second = (codec.latents(mean, logvar, seeds.keys(0, "train", samples)) for samples in ([4, 5], [5, 6]))
    assert torch.equal(first[1], second[0]) and not torch.equal(first[0], second[0])
    assert float(first.std()) == pytest.approx(0.7, rel=0.1)
    assert not codec.latents(mean, logvar).any()


def test_original_names_are_understood(folder, tmp_path):
    ours = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    theirs = {"loss.discriminator.weight": torch.zeros(1)}
    for name, tensor in ours.items():
        if "up_blocks." in name:
            head, _, tail = name.partition("up_blocks.")
            number, _, rest = tail.partition(".")
            name = f"{head}up.{3 - int(number)}.{rest}"
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for a, b in (("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample")):
            name = name.replace(f".{a}.", f".{b}.")
        name = name.replace(".upsamplers.0.", ".upsample.").replace(".conv_shortcut.", ".nin_shortcut.")
        theirs[name] = tensor
    assert not set(theirs) & set(ours) - {name for name in ours if "conv" in name or "norm" in name}
    torch.save({"state_dict": theirs}, tmp_path / "3d-vae.pt")
    (tmp_path / "config.json").write_text((folder / "vae" / "config.json").read_text())
    codec = CogVideoXVAE(str(tmp_path / "3d-vae.pt"), latent_scale=0.7).load(CPU)
    assert all(torch.equal(tensor, codec.network.state_dict()[name]) for name, tensor in ours.items())
    with pytest.raises(UserError, match="does not say the scale"):
        CogVideoXVAE(str(tmp_path / "3d-vae.pt")).load(CPU)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5, 32, 48), "use 1 or 9"),
        ((16, 32, 48), "use 9 or 17"),
        ((9, 40, 48), "use 32 or 48"),
        ((9, 32, 8), "use 16"),
        ((0, 32, 48), "use 1 or 9"),
    ],
)
def test_sizes_that_cannot_be_encoded_name_those_that_can(codec, size, message):
    with pytest.raises(UsageError, match=message):
        codec.latent_shape(*size)
    with pytest.raises(UsageError, match=message):
        codec.encode(torch.zeros(1, size[0], 3, *size[1:]))


def test_prompts_are_padded_and_padding_is_encoded_like_words(folder):
    encoder = T5(str(folder), tokens=7).load(CPU)
    text = encoder(["a red circle", "a blue circle moves slowly"])["text"]
    ids = encoder.tokenizer("a red circle", padding="max_length", max_length=7, return_tensors="pt").input_ids
    assert text.shape == (2, 7, 24) and text[0, -1].any()
    expected = encoder.network(ids).last_hidden_state[0]  # without a mask
    torch.testing.assert_close(text[0], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(encoder(["a red circle"])["text"][0], text[0])
    together = encoder.encode(["a red circle", None], 7)
    torch.testing.assert_close(together[0], text[0], atol=1e-6, rtol=1e-6)
    assert not together[1].any()
    with pytest.raises(UserError, match="7 tokens, not 8"):
        encoder.encode(["a"], 8)


def test_no_text_is_zeros_or_the_given_words(folder):
    zeros, words = (T5(str(folder), 7, unconditional).load(CPU) for unconditional in (None, ""))
    assert not zeros([zeros.unconditional])["text"].any()
    assert torch.equal(words([words.unconditional])["text"], words([""])["text"]) and words([""])["text"].any()


def test_a_prompt_that_is_cut_is_reported(folder, caplog):
    encoder = T5(str(folder), tokens=4).load(CPU)
    assert encoder(["a red circle moves left slowly"])["text"].shape == (1, 4, 24)
    assert "7 tokens is cut to 4" in caplog.text
    with pytest.raises(UserError, match="no T5 text encoder"):
        T5(str(folder / "vae")).load(CPU)
