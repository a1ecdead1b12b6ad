"""URSA's tokenizers: quantiser, Haar patches, tilings, files, and learning through rounded numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinema.errors import UsageError, UserError
from kinema.models.ursa.codec import FSQTraining, URSACodec, latent_shape, size_of
from kinema.models.ursa.fsq import bound, code_digits, codebook, dequantise, quantise, straight_through
from kinema.models.ursa.image_tokenizer import IBQImageTokenizer, IBQSize
from kinema.models.ursa.tokenizer import (
    FSQSize,
    FSQVideoTokenizer,
    haar,
    latent_frames,
    patch,
    pixel_frames,
    unhaar,
    unpatch,
)

CPU = torch.device("cpu")
LEVELS = (8, 8, 8, 5, 5, 5)
SIZE = FSQSize(block_out_channels=(4, 6, 6), layers_per_block=1, latent_channels=4, levels=(4, 3, 5), sample_frames=9)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_codes_and_digits_are_a_bijection():
    codes = torch.arange(64_000)
    digits = code_digits(codes, LEVELS)
    assert len(digits.unique(dim=0)) == 64_000 and (digits < torch.tensor(LEVELS)).all() and digits.min() == 0
    basis = torch.tensor([1, 8, 64, 512, 2560, 12800])
    assert torch.equal((digits * basis).sum(-1), codes)
    assert torch.equal(codebook(LEVELS), dequantise(codes, LEVELS))


def test_codes_are_those_of_the_specification():
    assert dequantise(torch.tensor(12345), LEVELS).tolist() == [-0.75, 0.75, -1, 1, 1, -1]
    made = [quantise(torch.full((6,), float(v)), LEVELS).item() for v in range(-3, 4)]
    assert made == [0, 0, 73, 32036, 63926, 63999, 63999]


def test_every_number_is_bounded_to_its_levels():
    z = torch.linspace(-50, 50, 2001)[:, None].expand(-1, 6)
    digits = bound(z, LEVELS).round() + torch.tensor([level // 2 for level in LEVELS])
    assert [len(digits[:, j].unique()) for j in range(6)] == list(LEVELS)
    assert digits.min() == 0 and (digits.amax(0) == torch.tensor(LEVELS) - 1).all()


def test_rounding_lets_the_gradient_of_the_bound_through():
    z = noise(50, 6).double().requires_grad_()
    made = straight_through(z, LEVELS)
    torch.testing.assert_close(made.float(), dequantise(quantise(z, LEVELS), LEVELS))
    weight = noise(50, 6).double()
    ours = torch.autograd.grad((made * weight).sum(), z)[0]
    half = torch.tensor([level // 2 for level in LEVELS])
    torch.testing.assert_close(ours, torch.autograd.grad((bound(z, LEVELS) / half * weight).sum(), z)[0])


def test_haar_is_undone_and_keeps_no_band_twice():
    x = noise(2, 3, 4, 6, 8)
    torch.testing.assert_close(unhaar(haar(x)), x, atol=1e-6, rtol=0)
    bands = haar(torch.ones(1, 1, 2, 2, 2)).flatten()
    assert bands.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    steps = haar(torch.tensor([1.0, -1.0]).view(1, 1, 1, 1, 2).expand(1, 1, 2, 2, 2)).flatten()
    assert steps.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]  # columns are the last number of a band


@pytest.mark.parametrize("size", [2, 4])
def test_patches_are_undone_but_for_the_repeated_first_frame(size):
    video = noise(1, 3, 1 + 2 * size, 8, 8)
    restored = unpatch(patch(video, size), size)
    torch.testing.assert_close(restored[:, :, size - 1 :], video, atol=1e-6, rtol=0)


def test_the_released_size_has_its_parameters():
    with torch.device("meta"):
        module = FSQVideoTokenizer(FSQSize())
    assert sum(p.numel() for p in module.parameters()) == 104_669_558 and len(module.state_dict()) == 306


@pytest.mark.parametrize(
    ("tile", "frames", "latents"),
    [
        (17, 1, 1),
        (17, 5, 2),
        (17, 17, 5),
        (17, 33, 10),
        (17, 49, 15),
        (49, 49, 13),
        (49, 17, 5),
        (49, 97, 26),
        (5, 9, 4),
    ],
)
def test_clips_that_tile_come_back_with_all_their_frames(tile, frames, latents):
    size = FSQSize(sample_frames=tile)
    assert latent_frames(size, frames) == latents and pixel_frames(size, latents) == frames


@pytest.mark.parametrize(("tile", "frames"), [(17, 4), (17, 16), (17, 25), (17, 48), (49, 53)])
def test_clips_that_do_not_tile_are_refused_with_lengths_that_do(tile, frames):
    size = FSQSize(sample_frames=tile)
    with pytest.raises(UsageError) as error:
        latent_frames(size, frames)
    below, above = (
        int(word.rstrip(",")) for word in str(error.value).split("use ")[1].replace(" or ", " ").split()[:2]
    )
    assert latent_frames(size, below) and latent_frames(size, above) and below <= frames <= above


def test_latents_that_no_clip_has_are_refused():
    with pytest.raises(UsageError, match="13 latent frames"):
        pixel_frames(FSQSize(sample_frames=17), 13)


def test_tiles_are_coded_alone():
    tokenizer = tiny()
    video = noise(1, 17, 3, 16, 16).clamp(-1, 1)
    codes = tokenizer.encode(video)
    assert codes.shape == (1, 6, 2, 2)
    assert torch.equal(codes, torch.cat([tokenizer.encode(video[:, :9]), tokenizer.encode(video[:, 8:])], dim=1))
    pixels = tokenizer.decode(codes)
    assert pixels.shape == video.shape
    torch.testing.assert_close(pixels[:, 9:], tokenizer.decode(codes[:, 3:])[:, 1:])


def test_the_code_of_an_image_is_not_that_of_a_clips_first_frame():
    tokenizer = tiny()
    video = noise(1, 9, 3, 32, 32).clamp(-1, 1)
    assert not torch.equal(tokenizer.encode(video[:, :1]), tokenizer.encode(video)[:, :1])


def tiny() -> FSQVideoTokenizer:
    torch.manual_seed(0)
    module = FSQVideoTokenizer(SIZE).requires_grad_(False)
    for p in module.parameters():
        p.mul_(2)
    return module


@pytest.fixture
def folder(tmp_path):
    FSQTraining(SIZE).export(tiny(), tmp_path, torch.float32)
    return tmp_path


def test_a_codec_reads_what_was_written_and_clamps(folder):
    codec = URSACodec(str(folder), pixels=16 * 16).load("cpu")
    video = noise(3, 9, 3, 16, 16).clamp(-1, 1)
    codes = codec.encode(video)
    assert codec.codes == 60 and codec.latent_shape(9, 16, 16) == tuple(codes.shape[1:]) == (3, 2, 2)
    assert torch.equal(codes, tiny().encode(video)) and codes.dtype == torch.int64
    pixels = codec.decode(codes)
    torch.testing.assert_close(pixels, tiny().decode(codes).clamp(-1, 1), atol=2e-4, rtol=1e-4)
    assert pixels.abs().max() <= 1
    assert torch.equal(pixels[1:2], codec.decode(codes[1:2]))


def test_codes_of_another_codebook_are_refused(folder):
    codec = URSACodec(str(folder)).load("cpu")
    for wrong in (-1, 60):
        with pytest.raises(UserError, match="this tokenizer has 0 to 59"):
            codec.decode(torch.full((1, 3, 2, 2), wrong))


def test_an_image_codec_codes_frames_as_images(tmp_path):
    size = IBQSize((32, 32), 1, latent_channels=4, codes=24, code_dim=3)
    torch.manual_seed(0)
    module = IBQImageTokenizer(size).requires_grad_(False)
    (tmp_path / "vae").mkdir()
    save_file(module.state_dict(), tmp_path / "vae" / "model.safetensors")
    config = {"block_out_channels": [32, 32], "layers_per_block": 1, "latent_channels": 4}
    config |= {"num_vq_embeddings": 24, "vq_embed_dim": 3}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    codec = URSACodec(str(tmp_path)).load("cpu")
    video = noise(2, 3, 3, 8, 8).clamp(-1, 1)
    codes = codec.encode(video)
    assert codes.shape == (2, 3, 4, 4)
    assert torch.equal(codes[:, 1:2], codec.encode(video[:, 1:2]))
    assert codec.decode(codes).shape == video.shape
    z = module.latents(video)
    assert torch.equal(codes, (z @ module.codebook.T).argmax(-1))


def test_files_of_another_kind_are_refused(folder):
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "sample_frames"}))
    with pytest.raises(UserError, match="lacks sample_frames"):
        URSACodec(str(folder)).load("cpu")
    with pytest.raises(UserError, match="states 7 codes, but levels"):
        size_of(config | {"num_vq_embeddings": 7}, "here")
    file.write_text(json.dumps(config | {"latent_channels": 5}))
    with pytest.raises(UserError, match="another size"):
        URSACodec(str(folder)).load("cpu")


def test_frames_of_impossible_sizes_are_refused():
    with pytest.raises(UsageError, match="height 20 is not a multiple of 8; use 16 or 24"):
        latent_shape(SIZE, 9, 20, 16)
    with pytest.raises(UsageError, match="width 4 is not a multiple of 8; use 8"):
        latent_shape(SIZE, 9, 16, 4)


def test_a_tokenizer_is_written_under_the_released_names(folder):
    names = set(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    assert {
        "encoder.conv_in.1.weight",
        "encoder.down_blocks.0.downsamplers.0.conv1.weight",
        "encoder.mid_block.attentions.0.1.to_out.0.bias",
        "decoder.up_blocks.0.upsamplers.0.conv2.weight",
        "quant_conv.weight",
    } <= names
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["num_vq_embeddings"] == 60 and config["vq_embed_dim"] == 3 and size_of(config, "here") == SIZE
