"""The URSA transformer: the specification's numbers, Hugging Face's Qwen3 as oracle, its files, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint as recompute

from kinema import seeds
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.logits import Logits, cross_entropy
from kinema.diffusion.token_path import MetricPath, MixturePath
from kinema.errors import UsageError, UserError
from kinema.models.ursa import layouts
from kinema.models.ursa.spec import URSA, Metric, Mixture, read_codebook
from kinema.models.ursa.text import QwenText
from kinema.models.ursa.transformer import (
    SIZES,
    URSASize,
    URSATransformer,
    build_inputs,
    initial_weights,
    rotary_3d,
    sequence_positions,
)

CPU = torch.device("cpu")
SIZE = URSASize(dim=64, ffn_dim=128, heads=4, kv_heads=2, layers=2, codes=64, words=300, bov=290, text_len=8)
LEVELS = (4, 4, 4)
KEYS = {  # of the released layout, with the layers' number out
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.*.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"model.layers.*.self_attn.{part}_norm.weight" for part in "qk"),
    *(f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    *(f"model.layers.*.{part}_layernorm.weight" for part in ("input", "post_attention")),
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(300, (2, 8), generator=generator)
    return torch.randint(64, (2, 24), generator=generator).view(2, 2, 3, 4), text


@pytest.fixture(scope="module")
def module() -> URSATransformer:
    """The specification's weights: by the sorted number of a parameter's released name."""
    made = URSATransformer(SIZE)
    named = sorted((layouts.from_kinema(name, "ursa"), p) for name, p in made.named_parameters())
    for i, (_, p) in enumerate(named):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + i))
        p.data = 1 + 0.1 * noise if p.ndim == 1 else 0.05 * noise
    return made.requires_grad_(False)


def logits(module: URSATransformer, x, text, **extra) -> Logits:
    hidden = module(x, text=text, **extra)
    return Logits(hidden, module.lm_head, hidden.dtype)


def test_the_specifications_network_says_its_numbers(module, inputs):
    x, text = inputs
    ids, positions = build_inputs(text, x, SIZE)
    whole = module.norm(module.rows(module.embed_tokens(ids), positions)) @ module.lm_head.weight.T
    assert whole.sum().item() == pytest.approx(59.68285, abs=2e-3)
    assert whole.abs().mean().item() == pytest.approx(0.3147392, rel=1e-5)
    made = logits(module, x, text)
    first = torch.tensor([-0.1979089, -0.4205146, -0.7093450, 0.2595070])
    torch.testing.assert_close(made.whole()[0, 0, 0, 0, :4], first, atol=1e-5, rtol=1e-5)
    assert cross_entropy(made, x).mean().item() == pytest.approx(4.2210908, abs=1e-5)
    changed = x.clone()
    changed[:, -1, -1, -1] = (x[:, -1, -1, -1] + 1) % 64
    assert (logits(module, changed, text).whole() - made.whole())[:, 0, 0, 0].abs().max() > 0.1  # attends both ways


def test_the_body_is_qwen3_without_a_mask(module, inputs):
    """With positions that count as in a text, and every token seeing every other."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=SIZE.vocabulary,
        hidden_size=SIZE.dim,
        intermediate_size=SIZE.ffn_dim,
        num_hidden_layers=SIZE.layers,
        num_attention_heads=SIZE.heads,
        num_key_value_heads=SIZE.kv_heads,
        head_dim=SIZE.head_dim,
        rope_theta=SIZE.theta,
        attn_implementation="eager",
    )
    oracle = Qwen3Model(config).eval()
    state = {layouts.from_kinema(name, "ursa").removeprefix("model."): p for name, p in module.state_dict().items()}
    state.pop("lm_head.weight")
    oracle.load_state_dict(state)
    x, text = inputs
    ids, _ = build_inputs(text, x, SIZE)
    length = ids.shape[1]
    with torch.no_grad():
        wanted = oracle(input_ids=ids, attention_mask=torch.zeros(2, 1, length, length)).last_hidden_state
    positions = torch.arange(length)[:, None].expand(-1, 3)
    made = module.norm(module.rows(module.embed_tokens(ids), positions))
    torch.testing.assert_close(made, wanted, atol=5e-6, rtol=1e-5)


def test_sizes_are_those_released():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in URSATransformer(size).parameters()) for name, size in SIZES.items()}
    assert counts == {"1.7B": 1_982_172_160, "0.6B": 726_848_512, "1.7B-IBQ": 2_256_899_072}
    assert SIZES["1.7B"].vocabulary == 215_669 and SIZES["1.7B-IBQ"].vocabulary == 282_741
    assert not list(URSATransformer(SIZE).buffers())


def test_positions_continue_the_texts_count_in_time_alone():
    made = sequence_positions(8, (2, 3, 4), blocks=2)
    assert made[7].tolist() == [7, 7, 7] and made[8].tolist() == [8, 8, 8]
    assert made[9].tolist() == [9, 0, 0] and made[9 + 23].tolist() == [10, 2, 3]
    assert made[33].tolist() == [11, 11, 11] and made[34].tolist() == [12, 0, 0]


def test_positions_may_differ_from_row_to_row(module, inputs):
    x, text = inputs
    ids, positions = build_inputs(text, x, SIZE)
    embedded = module.embed_tokens(ids)
    made = module.rows(embedded, positions.expand(2, -1, -1))
    torch.testing.assert_close(made, module.rows(embedded, positions))


def test_every_axis_has_high_and_low_frequencies():
    positions = torch.eye(3, dtype=torch.int64)[:, None]
    cos, _ = rotary_3d(positions, 128, 1e6, torch.float64)
    turned = [(cos[axis, 0, 0] < 1).nonzero().flatten() for axis in range(3)]
    assert [len(pairs) for pairs in turned] == [16, 24, 24]
    assert [pairs[0].item() for pairs in turned] == [0, 1, 2] and min(pairs[-1].item() for pairs in turned) >= 45


def test_two_graded_passes_on_different_grids_recompute_as_they_were(inputs):
    """Nothing of a pass is kept on the module, so that a later one cannot change what is recomputed."""
    grads = []
    for wrap in (False, True):
        module = URSATransformer(SIZE)
        module.load_state_dict(dict(initial_weights(module, 0)))
        if wrap:
            for block in module.blocks:
                block.forward = (lambda f: lambda *a: recompute(f, *a, use_reentrant=False))(block.forward)
        x, text = inputs
        losses = [cross_entropy(logits(module, y, text), y).mean() for y in (x, x[:, :, :2, :3])]
        sum(losses).backward()
        grads.append([p.grad for p in module.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_is_the_same_alone_and_in_a_batch(module, inputs):
    x, text = inputs
    torch.testing.assert_close(module(x[1:], text=text[1:]), module(x, text=text)[1:])


def test_noise_on_embeddings_is_of_the_tables_size(module, inputs):
    x, text = inputs
    noise = seeds.keys(0, "noise", range(2)).normal(2, 3, 4, 64)
    assert torch.equal(module(x, text=text, noise=noise, sigma=0.0), module(x, text=text))
    seen: list[torch.Tensor] = []
    handle = module.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x, text=text, noise=noise, sigma=1.0)
    handle.remove()
    rms = module.embed_tokens.weight.square().mean().sqrt()
    torch.testing.assert_close(seen[0][:, 9:], rms * noise.flatten(1, 3))


def test_a_text_of_another_length_is_refused(module, inputs):
    x, text = inputs
    with pytest.raises(ValueError, match="7 tokens, but this network reads 8"):
        module(x, text=text[:, 1:])


def test_a_loss_in_bfloat16_has_float32_logits_and_gradients(inputs):
    x, text = inputs
    module = URSATransformer(SIZE)
    module.load_state_dict(dict(initial_weights(module, 0)))
    with torch.autocast("cpu", torch.bfloat16):
        made = logits(module, x, text)
        loss = cross_entropy(made, x)
    loss.mean().backward()
    assert made.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert module.lm_head.weight.grad is not None and module.lm_head.weight.grad.dtype == torch.float32


def test_the_loss_of_a_frame_is_the_mean_of_its_tokens(module, inputs):
    x, text = inputs
    denoiser = TokenDenoiser(module, module.lm_head, MetricPath(torch.randn(64, 4), 0.9, 3.0))
    draw, t = seeds.keys(0, "loss", range(2)), torch.tensor([[0.3, 0.9], [0.5, 0.5]])
    x_t = denoiser.path.corrupt(x, t, draw.fold("noise"))
    each = cross_entropy(denoiser(x_t, t, {"text": text}), x)
    torch.testing.assert_close(denoiser.loss(x, t, {"text": text}, draw), each.flatten(2).mean(2))


def test_a_masked_models_loss_is_of_its_masked_tokens(inputs):
    from dataclasses import replace

    x, text = inputs
    module = URSATransformer(replace(SIZE, masked=True))
    module.load_state_dict(dict(initial_weights(module, 0)))
    denoiser = TokenDenoiser(module, module.lm_head, MixturePath(64, "mask"))
    x_t = x.clone()
    x_t[:, :, 0, 0] = 64
    each = cross_entropy(denoiser(x_t, torch.ones(2, 1), {"text": text}), x)
    error = denoiser.error(x_t, x, torch.ones(2, 1), {"text": text})
    torch.testing.assert_close(error, each[:, :, 0, 0])


def spec(**changes) -> URSA:
    return URSA(**{"path": Metric(LEVELS, 0.9, 3.0), "size": SIZE, "seed": 3} | changes)


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with random weights."""
    made = spec(shift=2.0)
    made.export(made.load(made.build(), CPU), tmp_path / "transformer", dtype=torch.float32)
    made.export_path(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"num_vq_embeddings": 64}))
    return tmp_path


def test_a_folder_says_everything_about_itself(folder, inputs):
    x, text = inputs
    read = URSA.from_pretrained(str(folder))
    assert read.dimensions == SIZE and read.shift == 2.0 and read.path == Metric(str(folder), 0.9, 3.0)
    made, ours = read.load(read.build(), CPU), spec().load(spec().build(), CPU)
    torch.testing.assert_close(made(x, text=text), ours(x, text=text))
    torch.testing.assert_close(read.read(made).path.codebook, spec().read(ours).path.codebook)


def test_exports_have_the_released_names_and_nothing_else(folder):
    names = set(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert {name.replace(".0.", ".*.").replace(".1.", ".*.") for name in names} == KEYS and len(names) == 3 + 2 * 11
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["vocab_size"] == 364 and config["lm_head_size"] == 64 and config["max_window_layers"] == 2


def test_a_student_file_loads_strictly(folder, tmp_path, inputs):
    made = spec()
    module = made.load(made.build(), CPU)
    file = made.export_file(module, tmp_path / "out" / "student.pt", torch.float32)
    state = torch.load(file, weights_only=True)
    again = URSATransformer(SIZE)
    again.load_state_dict(dict(layouts.to_kinema(state.items(), "ursa")), strict=True)
    x, text = inputs
    torch.testing.assert_close(again(x, text=text), module(x, text=text))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_files_of_training_wrappers_are_read(folder, tmp_path, wrapper):
    made = spec()
    module = made.load(made.build(), CPU)
    state = {wrapper + layouts.from_kinema(name, "ursa"): p for name, p in module.state_dict().items()}
    (tmp_path / "w").mkdir()
    torch.save(state, tmp_path / "w" / "model.bin")
    (tmp_path / "w" / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    (tmp_path / "w" / "kinema.json").write_text((folder / "transformer" / "kinema.json").read_text())
    read = spec(weights=str(tmp_path / "w"), size=None)
    for a, b in zip(read.load(read.build(), CPU).parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_language_model_gives_its_words_and_body(tmp_path):
    module = spec().load(spec().build(), CPU)
    state = {layouts.from_kinema(name, "ursa"): p.detach() for name, p in module.state_dict().items()}
    state["model.embed_tokens.weight"] = torch.randn(320, 64)  # padded beyond its 300 words
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / "qwen.pt")
    begun = spec(weights=str(tmp_path / "qwen.pt"), seed=9)
    made = begun.load(begun.build(), CPU)
    assert torch.equal(made.embed_tokens.weight[:300], state["model.embed_tokens.weight"][:300])
    fresh = dict(initial_weights(made, 9))
    assert torch.equal(made.embed_tokens.weight[300:], fresh["embed_tokens.weight"][300:])
    assert torch.equal(made.lm_head.weight, fresh["lm_head.weight"])
    assert torch.equal(made.blocks[1].mlp.up_proj.weight, module.blocks[1].mlp.up_proj.weight)


def test_a_full_head_gives_the_codes_of_a_language_models_vocabulary(inputs):
    from dataclasses import replace

    x, text = inputs
    full = URSATransformer(replace(SIZE, head="full"))
    full.load_state_dict(dict(initial_weights(full, 0)))
    made = logits(full, x, text)
    wanted = made.hidden @ full.lm_head.weight[300:].T
    torch.testing.assert_close(made.whole(), wanted.detach())
    cross_entropy(made, x).mean().backward()
    assert full.lm_head.weight.grad[:300].abs().sum() == 0 and full.lm_head.weight.grad[300:].abs().sum() > 0


def test_a_pipeline_is_copied_around_a_new_transformer(folder, tmp_path):
    made = spec(seed=8)
    module = made.load(made.build(), CPU)
    out = made.export_pipeline(module, folder, tmp_path / "out", torch.float32)
    for file in ("scheduler/scheduler_model.pth", "vae/config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    again = URSA.from_pretrained(str(out))
    assert torch.equal(again.load(again.build(), CPU).lm_head.weight, module.lm_head.weight)


def test_a_student_does_not_go_into_another_tokenizers_folder(folder, tmp_path):
    (folder / "vae" / "config.json").write_text(json.dumps({"num_vq_embeddings": 131072}))
    made = spec()
    with pytest.raises(UserError, match=r"64 codes but the tokenizer of .* has 131,072"):
        made.export_pipeline(made.load(made.build(), CPU), folder, tmp_path / "out")


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_codebook_that_could_run_code_is_refused(folder, capsys):
    import pickle

    (folder / "scheduler" / "scheduler_model.pth").write_bytes(pickle.dumps({"path.emb": Payload()}))
    with pytest.raises(UserError):
        read_codebook(folder)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda said: said.pop("alpha"), "alpha"),
        (lambda said: said.pop("shift"), "shift"),
        (lambda said: said.pop("c"), "does not say c"),
    ],
)
def test_a_path_that_does_not_say_its_numbers_is_not_guessed(folder, break_it, message):
    file = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text())
    break_it(said)
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match=message):
        URSA.from_pretrained(str(folder))


def test_a_scheduler_without_alpha_is_the_mixture(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"alpha": None, "shift": 1.0}))
    read = URSA.from_pretrained(str(folder))
    assert read.path == Mixture() and isinstance(read.token_path(CPU), MixturePath)


def test_a_head_and_a_codebook_of_different_sizes_are_refused(folder):
    torch.save({"path.emb": torch.randn(60, 3)}, folder / "scheduler" / "scheduler_model.pth")
    read = URSA.from_pretrained(str(folder))
    with pytest.raises(UserError, match=r"64 codes but the codebook .* has 60"):
        read.read(read.load(read.build(), CPU))


def test_a_head_that_its_config_contradicts_is_refused(folder):
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"lm_head_size": 60}
    file.write_text(json.dumps(config))
    (folder / "transformer" / "kinema.json").unlink()
    with pytest.raises(UserError, match="60 codes and 300 words, but the head has 64 rows"):
        URSA(Metric(LEVELS, 0.9, 3.0), weights=str(folder)).dimensions  # noqa: B018


def test_impossible_specs_are_refused():
    with pytest.raises(UsageError, match="size"):
        URSA(Mixture())
    with pytest.raises(UsageError, match="7B"):
        URSA(Mixture(), "7B")
    with pytest.raises(UsageError, match="MASK"):
        URSA(Mixture("mask"), SIZE)


def test_prompts_are_padded_on_the_left_and_cut_on_the_right(caplog):
    text = QwenText("sprites-wan", length=6, motion=9.0).load("cpu")
    bare = QwenText("sprites-wan", length=6).load("cpu")
    ids = bare(["a big circle", "a big red circle moves left on a black background"])["text"]
    assert ids.shape == (2, 6) and ids.dtype == torch.int64
    assert (ids[0, :2] == 0).all() and (ids[0, 2:] != 0).all() and (ids[1] != 0).all()
    assert bare.truncated == 1 and bare.seen == 2 and "cut off" in caplog.text
    assert text.moving("a circle") == "motion=9.0, a circle" and text.moving("") == ""
    assert (bare([""])["text"] == 0).all()
