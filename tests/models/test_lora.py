"""Low-rank adapters: what they change, what they leave alone, and that PEFT and diffusers read them and are read."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_causal import randomised

from kinema.errors import UserError
from kinema.models import lora
from kinema.models.cogvideox import layouts
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize, CogVideoXTransformer
from kinema.models.layers import sinusoid
from kinema.models.lora import LoRA
from kinema.models.wan import layouts as wan_layouts
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize

SIZE = CogVideoXSize(
    heads=2, layers=2, head_dim=16, time_dim=8, text_dim=12, text_tokens=5, grid=(3, 4, 6), positions="slice"
)
EDIT = LoRA(rank=3, alpha=1.5)
SPEC = CogVideoX(SIZE, edits=(EDIT,))


def network(spec=SPEC, seed=1):
    """A network with every tensor random, B included."""
    return randomised(spec.load(spec.build(), "cpu"), seed)


def base_of(module, spec=SPEC):
    """The same network without its adapters."""
    plain = replace(spec, edits=())
    other = plain.load(plain.build(), "cpu")
    other.load_state_dict({name: t for name, t in module.state_dict().items() if ".lora_" not in name})
    return other


@torch.no_grad()
def out(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 4, 6, generator=generator).to(dtype)
    text = torch.randn(2, 5, 12, generator=generator).to(dtype)
    return module(x, torch.tensor([[3.0], [700.0]]), text=text)


def theirs(module, folder, spec=SPEC):
    """diffusers' network with the base weights of `module`, and the call that equals `out`."""
    spec.export(base_of(module), folder, "diffusers")
    other = CogVideoXTransformer3DModel.from_pretrained(folder).eval()
    turn = get_3d_rotary_pos_embed(16, None, (2, 3), 3, grid_type="slice", max_size=(2, 3))

    @torch.no_grad()
    def call():
        generator = torch.Generator().manual_seed(0)
        x, text = torch.randn(2, 3, 16, 4, 6, generator=generator), torch.randn(2, 5, 12, generator=generator)
        return other(x, text, torch.tensor([3.0, 700.0]), image_rotary_emb=turn).sample

    return other, call


def test_lora_at_start_equals_base():
    module = SPEC.load(SPEC.build(), "cpu")
    assert len(lora.adapted(module)) == 8
    for _, layer in lora.adapted(module):
        assert (
            not layer.lora_B.any()
            and layer.lora_A.abs().max() <= 32**-0.5
            and layer.lora_A.std() > 0.5 / 3**0.5 * 32**-0.5
        )
    torch.nn.init.normal_(module.proj_out.weight)
    assert torch.equal(out(module), out(base_of(module)))


def test_lora_leaves_forward_untouched():
    module, plain = network(), replace(SPEC, edits=()).build()
    assert type(module) is type(plain) is CogVideoXTransformer
    for name, part in plain.named_modules():
        edited = module.get_submodule(name)
        if not isinstance(edited, lora.AdaptedLinear):
            assert type(edited).forward is type(part).forward and "forward" not in vars(edited)
    names = dict(module.named_parameters())
    assert names.keys() - {name for name in names if ".lora_" in name} == dict(plain.named_parameters()).keys()


def test_trainable_set_is_the_edit():
    module = SPEC.build()
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora_{m}" for name, _ in lora.adapted(module) for m in "AB"}
    out_only = replace(SPEC, edits=(LoRA(targets=r"blocks\.1\.attn\.out$"),)).build()
    assert [name for name, _ in lora.adapted(out_only)] == ["blocks.1.attn.out"]


def test_merged_equals_unmerged_and_comes_back_bitwise():
    module = network().double()
    before, state = out(module, torch.float64), {name: t.clone() for name, t in module.state_dict().items()}
    lora.merge(module)
    lora.merge(module)  # which a second time changes nothing
    assert not torch.equal(module.blocks[0].attn.q.weight, state["blocks.0.attn.q.weight"])
    torch.testing.assert_close(out(module, torch.float64), before, atol=1e-12, rtol=1e-12)
    folded = lora.folded(module)
    lora.unmerge(module)
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    again = lora.folded(module)
    assert folded.keys() == again.keys() and all(torch.equal(t, again[name]) for name, t in folded.items())
    plain = base_of(module).double()
    plain.load_state_dict(folded)
    torch.testing.assert_close(out(plain, torch.float64), before, atol=1e-12, rtol=1e-12)


def test_file_loads_in_diffusers_with_its_scale(tmp_path):
    module = network()
    folder = lora.export(module, tmp_path / "lora", layouts.diffusers_name)
    other, call = theirs(module, tmp_path / "base")
    torch.testing.assert_close(call(), out(base_of(module)), atol=1e-5, rtol=1e-5)
    pipeline = CogVideoXPipeline(None, None, None, other, None)
    pipeline.load_lora_weights(folder)
    torch.testing.assert_close(call(), out(module), atol=1e-5, rtol=1e-5)
    assert (out(module) - out(base_of(module))).abs().max() > 0.01


def test_baked_file_needs_no_header(tmp_path):
    module = network()
    folder = lora.export(module, tmp_path / "lora", layouts.diffusers_name, bake=True)
    save_file(load_file(folder / lora.FILE), folder / lora.FILE)  # the header is gone
    other, call = theirs(module, tmp_path / "base")
    CogVideoXPipeline(None, None, None, other, None).load_lora_weights(folder)
    torch.testing.assert_close(call(), out(module), atol=1e-5, rtol=1e-5)


def test_file_written_by_peft_loads(tmp_path):
    module = network()
    other, call = theirs(module, tmp_path / "base")
    other.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for n, p in enumerate(p for name, p in other.named_parameters() if "lora_B" in name):
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(n))
    from peft import get_peft_model_state_dict

    CogVideoXPipeline.save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers=get_peft_model_state_dict(other),
        transformer_lora_adapter_metadata=other.peft_config["default"].to_dict(),
    )
    edit = LoRA.of_file(str(tmp_path / "lora"))
    assert (edit.rank, edit.alpha) == (4, 6)
    spec = CogVideoX(weights=str(tmp_path / "base"), edits=(edit,))
    torch.testing.assert_close(out(spec.load(spec.build(), "cpu")), call(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [2, 5])
def test_lora_roundtrip_keeps_scale(tmp_path, layers):
    spec = replace(SPEC, size=replace(SIZE, layers=layers))
    module = network(spec)
    spec.export(base_of(module, spec), tmp_path / "base", "diffusers")
    lora.export(module, tmp_path / "lora", layouts.diffusers_name)
    edit = LoRA.of_file(str(tmp_path / "lora"))
    assert (edit.rank, edit.alpha) == (3, 1.5)
    again = CogVideoX(weights=str(tmp_path / "base"), edits=(edit,))
    loaded = again.load(again.build(), "cpu")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in module.state_dict().items())
    with safe_open(tmp_path / "lora" / lora.FILE, "pt") as file:
        said = json.loads(file.metadata()[lora.HEADER])
        assert len(file.keys()) == 8 * layers and said["transformer.lora_alpha"] == 1.5


def test_stacked_files_are_the_sum_of_their_terms(tmp_path):
    module = network()
    plain, name = base_of(module), "blocks.1.attn.v"
    expected, files = plain.get_submodule(name).weight.clone(), []
    for n, weight in ((0, 0.8), (1, -0.5)):
        spec = replace(SPEC, edits=(LoRA(rank=2 + n, alpha=1.0 + n, seed=n),))
        other = network(spec, seed=n)
        lora.export(other, tmp_path / str(n), layouts.diffusers_name)
        files.append((str(tmp_path / str(n)), weight))
        expected += weight * other.get_submodule(name).term().detach()
    edit = LoRA.of_file(str(lora.stack(files, tmp_path / "sum")))
    assert edit.rank == 5
    SPEC.export(plain, tmp_path / "base", "diffusers")
    spec = CogVideoX(weights=str(tmp_path / "base"), edits=(edit,))
    folded = lora.folded(spec.load(spec.build(), "cpu"))
    torch.testing.assert_close(folded[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)


def test_wan_takes_adapters_that_diffusers_reads(tmp_path):
    size = WanSize(dim=48, ffn_dim=80, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=20, text_len=12)
    spec = Wan(size, edits=(EDIT,))
    module = network(spec)
    assert len(lora.adapted(module)) == 16
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 3, 4, 4, 6, generator=generator), torch.randn(2, 12, 20, generator=generator)
    with torch.no_grad():
        ours = module(x, torch.tensor([[312.5], [900.0]]), text=text)
        spec.export(base_of(module, spec), tmp_path / "base", "diffusers")
        other = WanTransformer3DModel.from_pretrained(tmp_path / "base").eval()
        other.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, 256)  # theirs is in single precision
        pipeline = WanPipeline(None, None, None, None, other)
        pipeline.load_lora_weights(lora.export(module, tmp_path / "lora", wan_layouts.diffusers_name))
        theirs = other(x.transpose(1, 2), torch.tensor([312.5, 900.0]), text).sample.transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_base_in_bfloat16_learns_in_float32():
    spec = replace(SPEC, edits=(replace(EDIT, base="bfloat16"),))
    module = spec.load(spec.build(), "cpu")
    kinds = {(p.dtype, p.requires_grad) for p in module.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    torch.nn.init.normal_(module.proj_out.weight)
    torch.nn.init.normal_(module.blocks[0].modulate_attn.weight)
    x, text = torch.randn(1, 3, 16, 4, 6), torch.randn(1, 5, 12)
    module(x, torch.full((1, 1), 9.0), text=text).float().square().mean().backward()
    assert module.blocks[0].attn.out.lora_B.grad.any() and module.blocks[0].attn.out.lora_B.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused_with_the_fix(tmp_path):
    module = network()
    SPEC.export(base_of(module), tmp_path / "base", "diffusers")
    path = str(lora.export(module, tmp_path / "lora", layouts.diffusers_name))

    def load(**changes):
        spec = CogVideoX(weights=str(tmp_path / "base"), edits=(replace(LoRA.of_file(path), **changes),))
        return spec.load(spec.build(), "cpu")

    load()
    with pytest.raises(UserError, match="is of rank 3, not 4"):
        load(rank=4)
    with pytest.raises(UserError, match=r"alpha 1\.5, not 3"):
        load(alpha=3.0)
    with pytest.raises(UserError, match="set the targets"):
        load(targets=r"attn\.q$")
    with pytest.raises(UserError, match="no layer's name matches"):
        load(targets="nothing")
    with pytest.raises(UserError, match="no plain linear layer"):
        load(targets="modulate_attn")
    SPEC.export(base_of(network(seed=2)), tmp_path / "base", "diffusers")
    with pytest.raises(UserError, match="trained on other weights"):
        load()
    file = tmp_path / "lora" / lora.FILE
    save_file(load_file(file), file)
    with pytest.raises(UserError, match="does not say the alpha"):
        LoRA.of_file(path)
    assert LoRA.of_file(path, alpha=1.5).alpha == 1.5
    with pytest.raises(UserError, match="no adapters to export"):
        lora.export(base_of(module), tmp_path / "none", layouts.diffusers_name)
    with pytest.raises(UserError, match="no adapters of one rank"):
        LoRA.of_file(str(tmp_path / "base"))
