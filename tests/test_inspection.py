"""What is said of checkpoints of every layout, whole and not; and models by Hub id, pinned and without a network."""

import logging

import pytest
import torch
from cogvideox_world import write_model
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from kinema import cli, pretrained
from kinema.errors import UserError
from kinema.inspection import inspect
from kinema.models import hub
from kinema.models.wan import vae_layouts
from kinema.models.wan.spec import Wan
from kinema.models.wan.vae import WanVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The shipped Wan in every layout."""
    folder = tmp_path_factory.mktemp("wan")
    spec = Wan.from_pretrained("sprites-wan")
    module = spec.load(spec.build(), CPU)
    for layout in ("kinema", "wan", "diffusers", "self_forcing"):
        spec.export(module, folder / layout, layout)
    return folder


@pytest.mark.parametrize("layout", ["kinema", "wan", "diffusers", "self_forcing"])
def test_layouts_of_wan_are_told_apart(wan, layout):
    (found,) = inspect(str(wan / layout))
    spec = Wan.from_pretrained("sprites-wan")
    count = sum(p.numel() for p in spec.build().parameters())
    assert found.what == "Wan 2.1, transformer" and found.whole and found.parameters == count
    assert found.layout == {"kinema": "wan"}.get(layout, layout) and f"layers {spec.dimensions.layers}" in found.size


def test_what_lacks_and_what_is_too_much_is_listed(wan, tmp_path, capsys):
    state = load_file(wan / "wan" / "diffusion_pytorch_model.safetensors")
    del state["blocks.2.ffn.0.bias"]
    state["blocks.1.norm9.weight"] = torch.zeros(2)
    dim = Wan.from_pretrained("sprites-wan").dimensions.dim
    state["head.modulation"] = torch.zeros(1, 3, dim)
    (tmp_path / "config.json").write_text((wan / "wan" / "config.json").read_text())
    save_file(state, tmp_path / "part.safetensors")
    assert cli.main(["inspect", str(tmp_path / "part.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "missing     1: blocks.2.ffn.0.bias" in out and "unexpected  1: blocks.1.norm9.weight" in out
    assert f"head.modulation [1, 3, {dim}] for [1, 2, {dim}]" in out and "every tensor" not in out


def test_every_network_of_a_torch_file_is_told(wan, tmp_path):
    state = torch.load(wan / "self_forcing" / "model.pt", weights_only=True)["generator"]
    torch.save({"generator": state, "generator_ema": state, "critic": state}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text((wan / "wan" / "config.json").read_text())
    found = inspect(str(tmp_path / "model.pt"))
    assert [one.where.split()[-1] for one in found] == ["[generator_ema]", "[generator]", "[critic]"]
    assert all(one.whole and one.layout == "self_forcing" for one in found)


def test_pipelines_of_other_families_are_known_in_all_their_parts(tmp_path):
    found = inspect(str(write_model(tmp_path / "cog", "1.5-5B-I2V")))
    assert [one.what for one in found[1:]] == [
        "CogVideoX, image-to-video transformer",
        "CogVideoX, autoencoder",
        "T5, text encoder",
    ]
    assert found[0].what.startswith("CogVideoXImageToVideoPipeline") and all(one.whole for one in found)
    (sat,) = inspect(str(sat_of(tmp_path)))
    assert sat.layout == "sat" and sat.whole


def test_times_of_a_student_are_told_only_where_they_are_taken():
    for name, steps in (("sprites-wan-4step", 4), ("sprites-wan-causal", 50)):
        pipeline, network, *_ = inspect(name)
        assert pipeline.says["steps"] == steps and ("steps_at" in network.says) == (steps == 4)


def test_the_mixer_of_a_model_of_long_videos_is_told():
    assert inspect("sprites-ttt")[1].says["mixer"] == "lact" and "mixer" not in inspect("sprites-cogvideox")[1].says


def sat_of(tmp_path):
    model = pretrained.load(str(tmp_path / "cog"), CPU)
    return model.spec.export(model.module, tmp_path / "sat", "sat")


def test_what_is_no_checkpoint_is_said(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of a family .*names like a"):
        inspect(str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="there is nothing at"):
        inspect(str(tmp_path / "none"))
    (tmp_path / "README.md").write_text("# words")
    with pytest.raises(
        UserError, match=r"README\.md is no checkpoint; give a folder, or a file whose name ends in \.safe"
    ):
        inspect(str(tmp_path / "README.md"))
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"evil\.pt is damaged"):
        inspect(str(tmp_path / "evil.pt"))


def test_the_original_release_of_the_autoencoder_is_read(tmp_path):
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=8)
    by_name = {ours: name for name in original_names() for ours in [vae_layouts.diffusers_name(name)]}
    assert by_name.keys() == theirs.state_dict().keys() and len(by_name) == 194
    torch.save({by_name[name]: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / vae_layouts.ORIGINAL)
    (found,) = inspect(str(tmp_path / vae_layouts.ORIGINAL))
    assert found.what == "Wan 2.1, autoencoder" and found.layout == "original" and found.whole
    codec, pixels = WanVAE(str(tmp_path)).load(CPU), torch.rand(1, 5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    made = codec.encode(pixels)
    row = [torch.tensor(values)[:, None, None] for values in (codec.mean, codec.std)]
    torch.testing.assert_close(made * row[1] + row[0], mean, atol=1e-5, rtol=1e-4)


def original_names():
    """The names of the released file, put together from the description of its modules."""

    def conv(name):
        return [f"{name}.weight", f"{name}.bias"]

    def block(name, shortcut=False):
        inside = (
            [f"{name}.residual.{n}.gamma" for n in (0, 3)] + conv(f"{name}.residual.2") + conv(f"{name}.residual.6")
        )
        return inside + (conv(f"{name}.shortcut") if shortcut else [])

    def middle(half):
        attention = [f"{half}.middle.1.norm.gamma", *conv(f"{half}.middle.1.to_qkv"), *conv(f"{half}.middle.1.proj")]
        return block(f"{half}.middle.0") + attention + block(f"{half}.middle.2")

    names = conv("conv1") + conv("conv2")
    for half in ("encoder", "decoder"):
        names += conv(f"{half}.conv1") + middle(half) + [f"{half}.head.0.gamma"] + conv(f"{half}.head.2")
    down = "encoder.downsamples"
    for n in range(11):
        if n in (2, 5, 8):
            names += conv(f"{down}.{n}.resample.1") + (conv(f"{down}.{n}.time_conv") if n > 2 else [])
        else:
            names += block(f"{down}.{n}", shortcut=n in (3, 6))
    up = "decoder.upsamples"
    for n in range(15):
        if n in (3, 7, 11):
            names += conv(f"{up}.{n}.resample.1") + (conv(f"{up}.{n}.time_conv") if n < 11 else [])
        else:
            names += block(f"{up}.{n}", shortcut=n == 4)
    return names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache with one revision of a model, and no network."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    inside = tmp_path / "models--org--tiny"
    (inside / "refs").mkdir(parents=True)
    (inside / "refs" / "main").write_text(commit)
    (inside / "snapshots" / commit).parent.mkdir()
    (inside / "snapshots" / commit).symlink_to(pretrained.find("sprites-wan"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetched.cache_clear()
    yield commit
    hub.fetched.cache_clear()


def test_a_hub_id_is_its_local_copy_and_its_commit_is_said(cache, caplog):
    with caplog.at_level(logging.WARNING):
        spec, pipeline = pretrained.describe("org/tiny")
    assert f"write org/tiny@{cache} to pin it" in caplog.text
    assert spec.dimensions.layers and hub.revision_of("org/tiny") == cache
    caplog.clear()
    assert hub.located(f"org/tiny@{cache}").name == cache and "pin" not in caplog.text
    assert pipeline.text.load(CPU)(["a red star"])["text"].shape[2] == 64
    assert not any(p.is_meta for p in spec.load(spec.build(), CPU).parameters())


def test_without_a_network_a_sentence_says_what_to_do(cache):
    with pytest.raises(UserError, match=r"hf download org/other"):
        pretrained.describe("org/other")
    with pytest.raises(UserError, match=r"hf download org/tiny|cannot fetch"):
        hub.located("org/tiny@0000000000000000000000000000000000000000")


def test_a_path_that_is_mistyped_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/lattents", "./a/b", "/a/b", "a/b/c", "sprites-wann"):
        assert not hub.is_hub_id(path)
    assert hub.is_hub_id("org/name") and hub.is_hub_id("org/name@v1.0")
