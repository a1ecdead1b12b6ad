"""The umT5 encoder and the autoencoder against transformers and diffusers, on tiny random networks."""

import shutil

import pytest
import torch
from cogvideox_world import write_tokenizer
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from kinema.errors import UsageError, UserError
from kinema.models.text import UMT5, PromptEncoder, clean, original_network
from kinema.models.wan.vae import WanVAE
from kinema.models.weights import open_weights, save

WORDS = ["a", "red", "blue", "circle", "moves", "left", "right", "&", "slowly"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder: tokenizer of one token per word, random text encoder, random autoencoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    words = write_tokenizer(folder, WORDS)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=words, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    mean, std = torch.randn(16).tolist(), (torch.rand(16) + 0.5).tolist()
    AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=mean, latents_std=std
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def encoder(pipeline):
    return UMT5(str(pipeline)).load("cpu")


@pytest.fixture(scope="module")
def codec(pipeline):
    return WanVAE(str(pipeline)).load("cpu")


def test_rows_equal_the_padded_and_masked_encoder_and_are_zero_beyond_the_prompt(encoder):
    prompts = ["a red circle moves left", "a blue circle moves slowly right & left & right & left"]
    batch = encoder.tokenizer(prompts, padding="max_length", max_length=20, return_tensors="pt")
    expected = encoder.network(**batch).last_hidden_state * batch.attention_mask[..., None]
    text = encoder(prompts)["text"]
    assert text.shape == (2, 16, 24) and not text[0, 6:].any() and text[0, :6].any(-1).all()
    torch.testing.assert_close(text, expected[:, :16], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(encoder.encode(prompts, 16), text, atol=1e-6, rtol=1e-6)
    with pytest.raises(UserError, match="13 tokens, more than the 10"):
        encoder.encode(prompts, 10)


def test_an_embedding_depends_on_the_prompt_alone(encoder):
    alone = encoder(["a red circle"])["text"]
    together = UMT5(encoder.spec.path, cached=1).load("cpu")(["a red circle moves left", "a red circle", ""])["text"]
    assert torch.equal(alone[0], together[1]) and alone.shape[1] == 8


def test_embeddings_are_kept_for_the_prompts_used_last(encoder):
    fresh = PromptEncoder(UMT5(encoder.spec.path, cached=2), encoder.tokenizer, encoder.network)
    first = fresh.embed("a")
    fresh.embed("red")
    assert fresh.embed("a") is first
    fresh.embed("blue")
    assert fresh.embed("a") is first and len(fresh._kept.values) == 2


def test_long_prompts_are_cut_and_the_empty_one_is_valid(pipeline):
    encoder = UMT5(str(pipeline), max_tokens=5).load("cpu")
    assert encoder(["a " * 50, ""])["text"].shape == (2, 5, 24)
    assert encoder(["", ""])["text"][:, 0].any() and encoder.unconditional == ""


def test_prompts_are_cleaned():
    assert clean("  a&amp;amp;b \n\t cafÃ© ") == "a&b café"


def test_the_original_release_has_other_names(pipeline, tmp_path):
    network = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder")
    state, names = network.state_dict(), {}
    for i in range(2):
        block, theirs = f"encoder.block.{i}.layer", f"blocks.{i}"
        names[f"{theirs}.norm1.weight"] = f"{block}.0.layer_norm.weight"
        names[f"{theirs}.norm2.weight"] = f"{block}.1.layer_norm.weight"
        names[f"{theirs}.pos_embedding.embedding.weight"] = f"{block}.0.SelfAttention.relative_attention_bias.weight"
        for part in "qkvo":
            names[f"{theirs}.attn.{part}.weight"] = f"{block}.0.SelfAttention.{part}.weight"
        for a, b in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            names[f"{theirs}.ffn.{a}.weight"] = f"{block}.1.DenseReluDense.{b}.weight"
    names |= {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    torch.save({ours: state[theirs] for ours, theirs in names.items()}, tmp_path / "t5.pth")
    loaded = original_network(open_weights(tmp_path / "t5.pth"), torch.float32).eval()
    ids = torch.tensor([[3, 4, 7, 1]])
    assert torch.equal(loaded(ids).last_hidden_state, network.eval()(ids).last_hidden_state)


def test_what_is_missing_is_named(pipeline, tmp_path):
    with pytest.raises(UserError, match="no umT5 text encoder at"):
        UMT5(str(tmp_path)).load("cpu")
    save(tmp_path / "vae", [("a", torch.ones(1))], {"config.json": {"_class_name": "AutoencoderKL"}})
    with pytest.raises(UserError, match=r"not Wan 2\.1's autoencoder"):
        WanVAE(str(tmp_path)).load("cpu")


def test_a_damaged_or_incomplete_text_encoder_is_named_and_never_filled_at_random(pipeline, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pipeline, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, the first being encoder\.block\.1"):
        UMT5(str(copy)).load("cpu")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="no umT5 text encoder at"):
        UMT5(str(copy)).load("cpu")


def test_encode_and_decode_equal_diffusers(codec):
    pixels = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(codec.network.config[f"latents_{k}"])[:, None, None] for k in ("mean", "std"))
    z = codec.network.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    latents = codec.encode(pixels)
    assert latents.shape[1:] == codec.latent_shape(9, 32, 48) == (3, 16, 4, 6)
    torch.testing.assert_close(latents, (z - mean) / std, atol=1e-5, rtol=1e-5)
    expected = codec.network.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)
    decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1


@pytest.mark.parametrize("lengths", [(7,), (1, 3, 3), (3, 3, 1), (2, 1, 4), (1,) * 7])
@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 2, 2)])
def test_a_video_decoded_in_pieces_equals_the_whole_bit_for_bit(codec, lengths, shape):
    videos, height, width = shape
    latents = torch.randn(videos, 7, 16, height, width, generator=torch.Generator().manual_seed(2))
    pieces = [*codec.stream(latents.split(list(lengths), dim=1))]
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(lengths)]
    assert torch.equal(torch.cat(pieces, dim=1), codec.decode(latents))


def test_a_stream_equals_diffusers_whole_decoding(codec):
    latents = torch.randn(2, 7, 16, 2, 4, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(codec.network.config[f"latents_{k}"])[:, None, None] for k in ("mean", "std"))
    expected = codec.network.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)
    streamed = torch.cat([*codec.stream(latents.split([1, 2, 4], dim=1))], dim=1)
    torch.testing.assert_close(streamed, expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_decoding_is_a_function_of_the_latents_and_what_is_left_of_earlier_ones(codec):
    latents = torch.randn(1, 4, 16, 2, 2, generator=torch.Generator().manual_seed(3))
    _, state = codec.decode_next(latents[:, :2])
    first, _ = codec.decode_next(latents[:, 2:], state)
    codec.decode_next(-latents[:, 2:], state)
    again, after = codec.decode_next(latents[:, 2:], state)
    assert torch.equal(first, again) and (state.latents, after.latents) == (2, 4)


def test_groups_of_latents_equal_one_at_a_time(pipeline, codec):
    latents = torch.randn(2, 10, 16, 2, 4, generator=torch.Generator().manual_seed(4))
    grouped = WanVAE(str(pipeline), group=3, pixels=1).load("cpu")
    whole = grouped.decode(latents)
    torch.testing.assert_close(whole, codec.decode(latents), atol=1e-5, rtol=1e-5)
    for lengths in ([3, 3, 3, 1], [1, 2, 3, 4], [6, 4]):
        assert torch.equal(torch.cat([*grouped.stream(latents.split(lengths, dim=1))], dim=1), whole)


def test_parts_of_a_batch_equal_the_whole(pipeline, codec):
    pixels = torch.rand(3, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    parts = WanVAE(str(pipeline), pixels=1).load("cpu")
    latents = codec.encode(pixels)
    torch.testing.assert_close(parts.encode(pixels), latents, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts.decode(latents), codec.decode(latents), atol=1e-5, rtol=1e-5)


def test_autocast_does_not_reach_data(codec, encoder):
    pixels = torch.zeros(1, 1, 3, 16, 16)
    expected, text = codec.encode(pixels), encoder.embed("a red circle")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(pixels), expected)
        assert torch.equal(UMT5(encoder.spec.path).load("cpu").embed("a red circle"), text)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((80, 64, 64), "use 77 or 81"),
        ((0, 64, 64), "use 1 or 5"),
        ((81, 8, 64), "use 16"),
        ((81, 64, 72), "use 64 or 80"),
    ],
)
def test_sizes_that_cannot_be_encoded_name_those_that_can(codec, size, message):
    with pytest.raises(UsageError, match=message):
        codec.latent_shape(*size)
    with pytest.raises(UsageError, match=message):
        codec.encode(torch.zeros(1, size[0], 3, *size[1:]))
