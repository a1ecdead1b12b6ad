"""The CogVideoX transformer against diffusers' in all five variants, and against itself in other layouts."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file

from kinema.diffusion.schedule import ZeroSNR
from kinema.errors import UsageError, UserError
from kinema.models.cogvideox import layouts, positions
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import SIZES, CogVideoXSize, patchify, unpatchify
from kinema.models.lora import LoRA

TINY = {"heads": 2, "layers": 2, "time_dim": 32, "text_dim": 24, "text_tokens": 6}


def tiny(variant: str, **changes) -> CogVideoXSize:
    size = SIZES[variant]
    frames = 5 if size.patch[0] == 1 else 6
    return replace(
        size, **TINY, grid=(frames, 8, 12), ofs_dim=size.ofs_dim and 32, **{"positions": size.positions} | changes
    )


def seq(a: float, f: float, phase: float, shape: tuple[int, ...]) -> torch.Tensor:
    """a·sin(f·(i mod 997) + phase) in float64, then float32: numbers without a generator."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) % 997
    return (a * torch.sin(f * i + phase)).float().reshape(shape)


def network(size: CogVideoXSize, tmp_path):
    """kinema's network and diffusers', with parameters number m = 1 + 0.05·sin(0.1·i + m) or without the 1."""
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    folder = spec.export(module, tmp_path / "out", "diffusers")
    other = CogVideoXTransformer3DModel.from_config(CogVideoXTransformer3DModel.load_config(folder))
    named = sorted(other.named_parameters())
    with torch.no_grad():
        for m, (name, p) in enumerate(named):
            wave = seq(0.05, 0.1, m, tuple(p.shape))
            p.copy_(wave + float(p.ndim == 1 and name.endswith("weight")))
    state = dict(layouts.to_kinema(other.state_dict().items(), "diffusers", size.table))
    module.load_state_dict(state)
    return spec, module, other.eval()


def inputs(size: CogVideoXSize):
    frames, rows, columns = size.grid
    x = seq(1, 0.13, 0.2, (2, frames, size.in_channels, rows, columns))
    text = seq(1, 0.17, 0.4, (2, size.text_tokens, size.text_dim))
    return x, text, torch.tensor([[3.0], [977.0]])


def call(module, size, x, t, text):
    x, *image = x.split(16, dim=2)
    return module(x, t, text=text, **({"image": image[0]} if image else {}))


# mean, standard deviation, norm, first three outputs, parameters: recorded for the public implementation
PUBLISHED = {
    "2B": (-0.0126753, 1.0151742, 125.825893, (-2.0243540, -1.8453854, -1.4354806), 532_352),
    "5B": (0.0410188, 0.7828931, 97.161303, (-0.9545025, -0.7748343, -0.3169649), 532_352),
    "5B-I2V": (-0.0113106, 0.7164311, 88.802288, (-0.8359655, -0.7625630, -0.6895139), 540_544),
    "1.5-5B": (0.0054194, 0.4591848, 62.345338, (0.3323059, 0.4620342, 0.2986500), 548_800),
    "1.5-5B-I2V": (0.0062493, 0.3763036, 51.095719, (0.1272376, 0.2279917, 0.1458178), 567_296),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_equals_diffusers_and_the_recorded_numbers(tmp_path, variant):
    size = tiny(variant)
    _, module, other = network(size, tmp_path)
    x, text, t = inputs(size)
    grid = (size.grid[0] // size.patch[0], 4, 6)
    turn = None
    if size.positions != "sincos":
        turn = get_3d_rotary_pos_embed(64, None, (4, 6), grid[0], grid_type="slice", max_size=(4, 6))
    with torch.no_grad():
        ours = call(module, size, x, t, text)
        ofs = {"ofs": torch.full((1,), 2.0)} if size.ofs_dim else {}
        theirs = other(x, text, t[:, 0], image_rotary_emb=turn, **ofs).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    mean, std, norm, first, parameters = PUBLISHED[variant]
    table = module.pos_table.numel() if size.table else 0
    assert sum(p.numel() for p in module.parameters()) - table == parameters
    assert float(ours.mean()) == pytest.approx(mean, abs=2e-6) and float(ours.norm()) == pytest.approx(norm, rel=1e-5)
    assert float(ours.std(correction=0)) == pytest.approx(std, rel=1e-5)
    assert ours.flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(60, 90), (48, 90), (90, 60), (32, 32), (60, 170)])
def test_rope_is_what_diffusers_pipeline_makes_at_any_size(rows, columns):
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid = (3, rows // 2, columns // 2)
    crop = get_resize_crop_region_for_grid(grid[1:], 45, 30)
    cos, sin = get_3d_rotary_pos_embed(64, crop, grid[1:], 3)
    ours = positions.rope(grid, 64, (30, 45))
    torch.testing.assert_close(ours[0].repeat_interleave(2, 1), cos, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours[1].repeat_interleave(2, 1), sin, atol=2e-5, rtol=0)
    whole = positions.rope(grid, 64, None)
    assert torch.equal(ours[0], whole[0]) == ((rows, columns) == (60, 90))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_patches_are_put_back_where_they_came_from(patch):
    x = torch.randn(2, 4, 3, 6, 8)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 48 // patch[0], 12 * patch[0])
    assert torch.equal(unpatchify(tokens, (4 // patch[0], 3, 4), patch), x)


def test_fresh_model_is_identity_in_every_block():
    size = tiny("5B")
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    x, text, t = inputs(size)
    video, words, e = torch.randn(2, 24, 128), torch.randn(2, 6, 128), torch.randn(2, 1, 32)
    for block in module.blocks:
        out = block(video, words, e, None)
        assert torch.equal(out[0], video) and torch.equal(out[1], words)
    assert not call(module, size, x, t, text).any()
    other = CogVideoX(size, seed=1)
    assert not torch.equal(
        module.patch_embed.weight, other.load(other.build(), "cpu").patch_embed.weight
    ) and torch.equal(module.patch_embed.weight, spec.load(spec.build(), "cpu").patch_embed.weight)


@pytest.mark.parametrize("layout", ["kinema", "diffusers", "sat"])
@pytest.mark.parametrize("variant", SIZES)
def test_every_layout_round_trips_with_size_and_shift(tmp_path, variant, layout):
    size = tiny(variant, head_dim=16, norm_eps=1e-6)
    _, module, _ = network(size, tmp_path)
    spec = CogVideoX(size, schedule=ZeroSNR(2.5))
    folder = spec.export(module, tmp_path / layout, layout)
    again = CogVideoX.from_pretrained(str(folder))
    assert again.size == size and again.schedule == ZeroSNR(2.5)
    loaded = again.load(CogVideoX(weights=str(folder)).build(), "cpu").state_dict()
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("variant", SIZES)
def test_size_is_read_from_other_programs_files_alone(tmp_path, variant):
    """diffusers' folder with its own config.json, and a SAT file with no configuration at all."""
    size = replace(tiny(variant), grid=SIZES[variant].grid)
    if size.table:  # which then has 17,550 rows
        size = replace(size, heads=1)
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    folder = spec.export(module, tmp_path / "out", "diffusers")
    (folder / "kinema.json").unlink()
    assert CogVideoX(weights=str(folder)).dimensions == size
    assert CogVideoX.from_pretrained(str(folder)).schedule.shift == (3.0 if variant == "2B" else 1.0)
    folder = spec.export(module, tmp_path / "sat", "sat")
    (folder / "kinema.json").unlink()
    read = CogVideoX(weights=str(folder)).dimensions
    tokens = 224 if size.patch[0] == 2 else 226  # which a SAT file does not say
    assert read == replace(size, text_tokens=tokens, ofs_dim=read.ofs_dim) and read.ofs_dim == size.ofs_dim


def test_sat_file_with_other_networks_and_unused_tables_is_understood(tmp_path):
    size = tiny("5B", head_dim=16)
    _, module, _ = network(size, tmp_path)
    given = dict(layouts.from_kinema(module.state_dict().items(), "sat", size))
    given |= {
        "model.diffusion_model.transformer.position_embeddings.weight": torch.zeros(3, 32),
        "model.diffusion_model.mixins.pos_embed.freqs_sin": torch.zeros(3, 16),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "conditioner.embedders.0.transformer.shared.weight": torch.zeros(3),
    }
    torch.save({"module": given}, tmp_path / "mp_rank_00_model_states.pt")
    spec = CogVideoX(size, weights=str(tmp_path / "mp_rank_00_model_states.pt"))
    loaded = spec.load(spec.build(), "cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in module.state_dict().items())
    torch.save({"module": given | {"model.diffusion_model.strange": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="strange unexpected"):
        spec = replace(spec, weights=str(tmp_path / "other.pt"))
        spec.load(spec.build(), "cpu")


def test_released_sizes_have_the_published_numbers_of_parameters():
    count = {}
    for name in SIZES:
        named = CogVideoX.published(name).build().named_parameters()
        count[name] = sum(p.numel() for n, p in named if n != "pos_table")
    assert count == {
        "2B": 1_693_783_872,
        "5B": 5_570_283_072,
        "5B-I2V": 5_570_479_680,
        "1.5-5B": 5_570_676_352,
        "1.5-5B-I2V": 5_571_594_880,
    }
    assert CogVideoX.published("5B-I2V").build().pos_table.shape == (1, 226 + 17_550, 3072)
    assert [CogVideoX.published(name).schedule.shift for name in SIZES] == [3, 1, 1, 1, 1]


def test_recomputed_equals_plain_and_float64_is_float64_inside(tmp_path):
    size = tiny("1.5-5B-I2V", head_dim=16)
    _, module, _ = network(size, tmp_path)
    module.double()
    x, text, t = inputs(size)
    x, text = x.double().requires_grad_(), text.double()
    plain = call(module, size, x, t, text)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ahead, behind = (call(module, size, x + step * direction, t, text).sum() for step in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((slope * direction).sum()), rel=1e-7)
    for block in module.blocks:
        inner = block.forward
        block.forward = lambda *args, f=inner: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    again = call(module, size, x, t, text)
    assert torch.equal(plain, again) and torch.equal(slope, torch.autograd.grad(again.sum(), x)[0])


def test_bfloat16_and_autocast_agree_with_float32(tmp_path):
    size = tiny("5B-I2V")
    _, module, _ = network(size, tmp_path)
    x, text, t = inputs(size)
    with torch.no_grad():
        exact = call(module, size, x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = call(module, size, x, t, text)
        half = call(module.to(torch.bfloat16), size, x, t, text)
    for rounded in (mixed, half):
        assert rounded.dtype == torch.bfloat16 and (rounded - exact).std() < 0.03 * exact.std()


def test_backbone_compiles_without_graph_breaks(tmp_path):
    size = tiny("5B-I2V", head_dim=16)
    spec = CogVideoX(size, edits=(LoRA(rank=2, alpha=1.0),))
    module = spec.load(spec.build(), "cpu")
    for n, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(n))
    x, text, t = inputs(size)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(call(compiled, size, x, t, text), call(module, size, x, t, text))


@pytest.mark.parametrize("change", ["rows", "frames", "tokens"])
def test_5b_i2v_refuses_other_geometry(tmp_path, change):
    size = tiny("5B-I2V", head_dim=16)
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    x, text, t = inputs(size)
    x, text = {"rows": (x[..., :4, :], text), "frames": (x[:, :4], text), "tokens": (x, text[:, :5])}[change]
    with pytest.raises(UsageError, match="learned positions"):
        call(module, size, x, t, text)


def test_what_a_network_does_not_take_is_refused(tmp_path):
    size = tiny("1.5-5B", head_dim=16)
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    x, text, t = inputs(size)
    with pytest.raises(ValueError, match="one time per video"):
        module(x, t.expand(2, 6), text=text)
    with pytest.raises(UsageError, match="takes no image"):
        module(x, t, text=text, image=x)
    with pytest.raises(ValueError, match="do not divide"):
        module(x[:, :5], t, text=text)
    other = CogVideoX(tiny("5B-I2V", head_dim=16))
    with pytest.raises(UsageError, match="continues an image"):
        other.load(other.build(), "cpu")(x[:, :5], t, text=text)


def test_wrong_weights_are_refused_with_a_reason(tmp_path):
    size = tiny("2B", head_dim=16)
    spec = CogVideoX(size)
    module = spec.load(spec.build(), "cpu")
    with pytest.raises(UserError, match="not weights of a CogVideoX"):
        layouts.recognise(["encoder.weight"])
    folder = spec.export(module, tmp_path / "out", "diffusers")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 30}))
    with pytest.raises(UserError, match="num_layers 30, but the tensors say 2"):
        CogVideoX(weights=str(folder)).build()
    file = folder / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "proj_out" not in name}
    torch.save(kept, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"read as layout diffusers: proj_out\.weight"):
        CogVideoX(size, weights=str(tmp_path / "part.pt")).load(spec.build(), "cpu")
    with pytest.raises(UsageError, match="needs a size"):
        CogVideoX()
    with pytest.raises(UsageError, match="no CogVideoX of size"):
        CogVideoX("3B")
