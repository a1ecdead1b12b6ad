"""The Wan transformer against diffusers' and against itself in other precisions, paddings and file layouts."""

import json
import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file
from tiny_causal import randomised

from kinema.errors import UsageError, UserError
from kinema.models import layers
from kinema.models.layers import rotary, rotary_widths, rotate, sinusoid
from kinema.models.wan import layouts
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import SIZES, WanSize, pad_text
from kinema.models.weights import open_weights, save

SIZE = WanSize(
    dim=48, ffn_dim=80, heads=2, layers=2, in_channels=4, out_channels=6, text_dim=20, text_len=12, freq_dim=32
)
SPEC = Wan(size=SIZE, shift=3.0)


def network(dtype=torch.float32, seed=0):
    return randomised(SPEC.load(SPEC.build(), "cpu"), seed).to(dtype)


def inputs(frames=3, rows=SIZE.text_len, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, frames, SIZE.in_channels, 4, 6, generator=generator, dtype=dtype)
    text = torch.randn(2, rows, SIZE.text_dim, generator=generator, dtype=dtype)
    text[0, rows // 2 :] = 0
    return x, text


def theirs(folder):
    """diffusers' network with the exported weights, all of which it must know and have been given.

    Its sinusoid is the one thing that is replaced: computed in single precision, it is off by 3e-5 at late times.
    """
    module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    module.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    module.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, SIZE.freq_dim)
    return module


@pytest.mark.parametrize("per_frame", [False, True])
def test_equals_diffusers(tmp_path, per_frame):
    module, (x, text) = network(), inputs()
    other = theirs(SPEC.export(module, tmp_path / "out", "diffusers"))
    t = torch.tensor([[123.0, 4.25, 999.0], [640.0, 0.0, 77.7]]) if per_frame else torch.tensor([[312.5], [999.0]])
    tokens = t.repeat_interleave(6, dim=1) if per_frame else t[:, 0]
    expected = other(x.transpose(1, 2), tokens, text).sample.transpose(1, 2)
    torch.testing.assert_close(module(x, t, text=text), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 11])
def test_short_text_equals_zero_padding_with_gradients(rows):
    module, (x, text) = network(), inputs(rows=rows)
    padded = torch.nn.functional.pad(text, (0, 0, 0, SIZE.text_len - rows))
    t = torch.tensor([[300.0], [900.0]])
    results = []
    for given in (text, padded):
        module.zero_grad()
        out = module(x, t, text=given)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("missing", [1, 2, 13, 505, 512])
def test_padding_rows_weigh_what_they_stand_for(dtype, missing):
    padded, bias = pad_text(torch.ones(1, 3, 2, dtype=dtype), 3 + missing)
    assert bias is not None and bias.shape[-1] == padded.shape[1] and not padded[:, 3:].any()
    assert float(bias.flatten()[3:].double().exp().sum()) == pytest.approx(missing, rel=1e-4)


def test_text_of_full_length_needs_no_bias_and_longer_text_is_refused():
    assert pad_text(torch.ones(1, 12, 2), 12)[1] is None
    with pytest.raises(ValueError, match="longer than the 12"):
        pad_text(torch.ones(1, 13, 2), 12)


def test_float64_and_autocast_and_bfloat16_agree_with_float32():
    module, (x, text) = network(), inputs(rows=9)
    t = torch.tensor([[300.0, 20.0, 1.0], [900.0, 0.0, 5.5]])
    exact = network(torch.float64)(x.double(), t, text=text.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(module(x, t, text=text).double(), exact, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x, t, text=text)
    half = network(torch.bfloat16)(x, t, text=text)
    for rounded in (mixed, half):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.double() - exact).std() < 0.03 * exact.std()


def test_float64_is_float64_inside():
    """A float32 anywhere inside would show as noise of 1e-7 in a finite difference."""
    module, (x, text) = network(torch.float64), inputs(dtype=torch.float64)
    t = torch.tensor([[300.0], [900.0]])
    x.requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (slope,) = torch.autograd.grad(module(x, t, text=text).sum(), x)
    with torch.no_grad():
        ahead, behind = (module(x + step * direction, t, text=text).sum() for step in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((slope * direction).sum()), rel=1e-7)


def test_sinusoid_is_the_float64_one():
    t = torch.tensor([0.0, 1.0, 0.37, 999.0, 1000.0])
    expected = [
        [f(float(x) * 10000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)] for x in t.double()
    ]
    assert torch.equal(sinusoid(t, 256), torch.tensor(expected, dtype=torch.float64).float())


def test_a_thousand_times_have_a_thousand_embeddings_in_bfloat16():
    module = network(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        e = module.time_embedding(sinusoid(torch.arange(1000.0), SIZE.freq_dim))
    assert e.dtype == torch.float32 and len(e.unique(dim=0)) == 1000


def test_rotary_phases_are_relative_and_have_no_end():
    widths = rotary_widths(128)
    assert widths == (44, 42, 42)
    q, k = torch.randn(2, 1, 1, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def score(a, b):
        turned = []
        for x, (t, h, w) in ((q, a), (k, b)):
            cos_sin = rotary([torch.tensor([t]), torch.tensor([h]), torch.tensor([w])], widths, torch.float64)
            turned.append(rotate(x, *cos_sin))
        assert float(turned[0].norm()) == pytest.approx(float(q.norm()))
        return float((turned[0] * turned[1]).sum())

    assert score((5, 2, 3), (3, 1, 7)) == pytest.approx(score((5005, 2, 3), (5003, 1, 7)), rel=1e-9)


def test_patches_that_do_not_fit_are_refused():
    module, (x, text) = network(), inputs()
    with pytest.raises(ValueError, match="do not divide"):
        module(x[..., :5], torch.zeros(2, 1), text=text)


def test_released_sizes_have_the_published_numbers_of_parameters():
    count = {}
    for name in SIZES:
        module = Wan(size=name).build()
        assert all(p.is_meta for p in module.parameters())
        count[name] = (sum(p.numel() for p in module.parameters()), len(list(module.parameters())))
    assert count == {"1.3B": (1_418_996_800, 825), "14B": (14_288_491_584, 1095)}


def test_start_from_nothing_depends_on_seed_and_name_alone():
    a, b = (SPEC.load(SPEC.build(), "cpu").state_dict() for _ in range(2))
    other = Wan(size=SIZE, seed=1)
    c = other.load(other.build(), "cpu").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.ffn.0.weight"], c["blocks.0.ffn.0.weight"])
    assert not a["head.head.weight"].any() and not a["blocks.1.self_attn.q.bias"].any()
    assert torch.equal(a["blocks.0.norm3.weight"], torch.ones(48))
    assert float(a["text_embedding.0.weight"].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("layout", ["kinema", "wan", "diffusers", "self_forcing"])
def test_every_layout_round_trips_with_size_and_shift(tmp_path, layout):
    module = network()
    folder = SPEC.export(module, tmp_path / "out", layout)
    SPEC.export(module, folder, layout)  # an export may be repeated
    spec = Wan.from_pretrained(str(folder))
    assert spec.size == SIZE and spec.shift == 3.0
    loaded = spec.load(Wan(weights=str(folder)).build(), "cpu").state_dict()
    assert list(loaded) == list(module.state_dict())
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in module.state_dict().items())


def test_wrapped_and_fused_names_are_understood(tmp_path):
    state = network().state_dict()
    fused = {}
    for name, tensor in state.items():
        if ".self_attn.q." in name:
            parts = [state[name.replace(".q.", f".{part}.")] for part in "qkv"]
            fused[name.replace(".q.", ".to_qkv.")] = torch.cat(parts)
        elif not any(f".self_attn.{part}." in name for part in "kv"):
            fused[name] = tensor
    dirty = {
        "model._fsdp_wrapped_module."
        + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in fused.items()
    }
    torch.save({"generator": {"model.x": torch.zeros(1)}, "generator_ema": dirty}, tmp_path / "some.pt")
    (tmp_path / "config.json").write_text(json.dumps(layouts.wan_config(SIZE)))
    spec = Wan(weights=str(tmp_path / "some.pt"))
    loaded = spec.load(spec.build(), "cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())
    with pytest.raises(UserError, match="no part 'critic'"):
        Wan(weights=str(tmp_path / "some.pt"), part="critic").build()


def test_names_of_layouts_are_inverse_to_each_other():
    for name in SPEC.build().state_dict():
        there = layouts.from_kinema(name, "diffusers")
        ((back, _),) = layouts.to_kinema([(there, torch.zeros(1))], "diffusers")
        assert back == name and (there != name or name.startswith("patch_embedding"))


def test_wrong_weights_are_refused_with_a_reason(tmp_path):
    state = network().state_dict()
    with pytest.raises(UserError, match="image-to-video"):
        layouts.recognise([*state, "blocks.0.cross_attn.k_img.weight"])
    with pytest.raises(UserError, match="not weights of a Wan"):
        layouts.recognise(["encoder.weight"])
    folder = save(tmp_path / "other", state.items(), {"config.json": {**layouts.wan_config(SIZE), "dim": 64}})
    with pytest.raises(UserError, match="dim 64, but the tensors say 48"):
        Wan(weights=str(folder)).build()
    folder = save(tmp_path / "part", list(state.items())[:-1], {"config.json": layouts.wan_config(SIZE)})
    with pytest.raises(UserError, match=r"read as layout wan: head\..* missing"):
        Wan(size=SIZE, weights=str(folder)).load(SPEC.build(), "cpu")
    with pytest.raises(UsageError, match="needs a size"):
        Wan()


def test_times_are_warped_and_do_not_list_zero():
    assert Wan(size="1.3B").times(4) == pytest.approx((1, 0.9375, 0.833333, 0.625), abs=1e-6)


def test_recomputed_equals_plain():
    module, (x, text) = network(torch.float64), inputs(rows=9, dtype=torch.float64)
    t = torch.tensor([[300.0], [900.0]])
    plain = module(x, t, text=text)
    for block in module.blocks:
        inner = block.forward
        block.forward = lambda *args, f=inner: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    again = module(x, t, text=text)
    assert torch.equal(plain, again)
    plain.sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    again.sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(module.parameters(), expected, strict=True))


def test_open_weights_of_an_export_knows_shapes_without_reading(tmp_path):
    opened = open_weights(SPEC.export(network(), tmp_path / "out"))
    assert opened.shapes["patch_embedding.weight"] == (48, 4, 1, 2, 2)


def test_generated_kernels_are_given_one_vector_as_a_vector():
    given = torch.arange(12.0).view(1, 1, 2, 6)[:, :, 1:].requires_grad_()
    found = layers._vector(given)
    assert found.shape == (6,)
    assert found.data_ptr() == given.data_ptr()
    for other in (torch.ones(6), torch.ones(1, 2, 1, 6), torch.ones(2, 6), torch.tensor(1.0), 1e-6):
        assert layers._vector(other) is other
