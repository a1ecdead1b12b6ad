"""What kinema says to the golden cases of URSA, driven by each case's config. Their tau is 1 - t.

A draw of the files is a tensor of uniform numbers: `Given` hands them out under the names of kinema's own streams.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from harness import Case, registered
from torch import Tensor, nn

from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import Above, guided
from kinema.diffusion.logits import Logits, cross_entropy, draw
from kinema.diffusion.times import Shifted, shifted
from kinema.diffusion.token_path import MetricPath, MixturePath
from kinema.diffusion.token_sampling import Jumps
from kinema.models.ursa import layouts
from kinema.models.ursa.fsq import bound, code_digits, codebook, dequantise, quantise
from kinema.models.ursa.image_tokenizer import IBQImageTokenizer, IBQSize
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer, haar, patch, unpatch
from kinema.models.ursa.transformer import (
    URSASize,
    URSATransformer,
    build_inputs,
    rotary_3d,
    rotate_halves,
    sequence_positions,
)


@dataclass
class Given:
    """A `Draw` whose streams are given tensors, by the path of names they are folded under."""

    streams: dict[str, Tensor]
    name: str = ""
    place: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: int = 0
    shared: int = 0

    def fold(self, name: int | str) -> "Given":
        return Given(self.streams, f"{self.name}.{name}" if self.name else str(name))

    def uniform(self, *shape: int) -> Tensor:
        return self.streams[self.name].reshape(-1, *shape)

    normal = uniform

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.uniform(*shape)


class Plain(nn.Module):
    """A head whose logits are its hidden rows."""

    def forward(self, hidden: Tensor, loop):
        return loop(hidden, torch.eye(hidden.shape[-1], dtype=hidden.dtype))


PLAIN = Plain()


def plain(z: Tensor) -> Logits:
    """Given logits as an estimate."""
    return Logits(z, PLAIN, z.dtype)


def rope(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    grid, text, blocks, marked = config["grid"], config["text_length"], config["num_blocks"], config["has_bov"]
    positions = sequence_positions(text, tuple(grid), blocks, marked)
    turn = rotary_3d(positions, config["head_dim"], config["rope_theta"], torch.float32)
    q, k = (rotate_halves(inputs[name].transpose(1, 2), *turn) for name in "qk")
    return {
        "visual_positions": positions[text:].unflatten(0, (blocks, -1)),
        "positions": positions,
        "cos": turn[0][0],
        "sin": turn[1][0],
        "q_rotated": torch.stack(q.chunk(2, dim=-1), dim=-1).flatten(-2).transpose(1, 2),
        "scores": q @ k.transpose(-1, -2),
    }


def inputs(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    size, codes, text = size_of(config), inputs["codes"], inputs["text_ids"]
    ids, positions = build_inputs(text, codes, size)
    labels = torch.full_like(ids, -100)
    labels[:, text.shape[1] + 1 :] = inputs["clean_codes"].flatten(1)
    count = torch.tensor(codes[0].numel())
    return {"input_ids": ids, "positions": positions, "num_visual_tokens": count, "labels": labels}


def forward(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    module = network(config, weights)
    text, codes = parts_of(inputs["input_ids"], module.size, config["grid"])
    changed = codes.clone()
    changed[:, -1, -1, -1] = (changed[:, -1, -1, -1] + 1) % module.size.codes
    with torch.no_grad():
        embedded = module.embed_tokens(inputs["input_ids"])
        hidden = module.norm(module.rows(embedded, inputs["positions"]))
        ids, positions = build_inputs(text, changed, module.size)
        first = module.norm(module.rows(module.embed_tokens(ids), positions))[:, 0]
        return {
            "hidden": hidden,
            "logits": hidden @ module.lm_head.weight.T,
            "visual_logits": visual(module, codes, text).whole().flatten(1, 3),
            "first_row_after_changing_last_token": first @ module.lm_head.weight.T,
        }


def loss(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    module = network(config, weights)
    text, codes = parts_of(inputs["input_ids"], module.size, config["grid"])
    logits = visual(module, codes, text)
    token_loss = cross_entropy(logits, inputs["clean_codes"])
    token_loss.mean().backward()
    right = logits.whole().argmax(-1) == inputs["clean_codes"]
    return {
        "loss": token_loss.mean(),
        "accuracy": right.float().mean(),
        "token_loss": token_loss.flatten(1),
        **gradients_of(module, case.order or config["grad_norm_order"]),
    }


def time_grid(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    made = {}
    for grid in config["grids"]:
        times = torch.tensor(shifted(grid["n"], grid["shift"]), dtype=torch.float64)
        made[f"n{grid['n']}_shift{named(grid['shift'])}.tau"] = 1 - times
    for shift in config["training_shifts"]:
        times = Shifted(shift).quantile(MixturePath(2), inputs["uniform"])  # type: ignore[arg-type]
        made[f"training_shift{named(shift)}.tau"] = 1 - times
    return made


def metric_path(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path, x0 = path_of(config, inputs), inputs["x_1"]
    t = 1 - torch.tensor(config["tau"], dtype=torch.float64)
    log_p = torch.stack([path.log_prob(x0, time.float().expand(len(x0))) for time in t])
    p, distance = log_p.exp(), path.distances(x0)
    rows = 1 - torch.tensor([0.3, 0.6, 0.95])[:, None].expand(3, 2)
    return {
        "codebook_normalized": path.unit,
        "distance": distance,
        "beta": path.beta(t),
        "beta_prime": path.beta_slope(t),
        "prob": p,
        "self_prob": p[:, torch.arange(len(x0)), x0],
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "expected_distance": (p * distance).sum(-1),
        "prob_per_sample": path.log_prob(x0, rows.flatten()).exp().unflatten(0, (3, 2)),
    }


def metric_corrupt(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path, x0 = path_of(config, inputs), inputs["x_1"]
    t = 1 - inputs["tau"]
    t = t if t.ndim == 2 else t[:, None]
    each = t[:, :, None, None].expand(x0.shape)
    prob = path.log_prob(x0.flatten(), each.flatten()).exp().unflatten(0, x0.shape)
    return {"prob": prob, "x_t": path.corrupt(x0, t, Given({"": inputs["uniform"]}))}


def mixture_path(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path, x0, t = MixturePath(config["K"]), inputs["x_1"], 1 - inputs["tau"][:, None]
    video, codes = x0[:, :, None, None], torch.arange(config["K"])
    given = Given({"": inputs["uniform"], "code": inputs["x_0"]})
    prob = torch.stack([path.likelihood(codes[k].expand_as(video), video, t) for k in codes], dim=-1)
    # the instantaneous rate: the share that jumps in a step of the reference rule, per unit of time
    now = torch.full_like(t, 1 - config["velocity_tau"]).double()
    step = 1e-6
    share = -torch.expm1(-step / now) / step
    return {
        "x_t": path.corrupt(video, t, given)[:, :, 0, 0],
        "prob": prob[:, :, 0, 0],
        "velocity": nn.functional.one_hot(x0, config["K"]) * share[..., None].float(),
    }


def velocity(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path, x_t, x0 = path_of(config, inputs), inputs["x_t"].flatten(), inputs["x_1"].flatten()
    made: dict[str, list[Tensor]] = {"velocity": [], "rate": [], "jump_prob": [], "jump_prob_integrated": []}
    for tau, h in zip(config["tau"], config["h"], strict=True):
        t = torch.tensor(1 - tau).expand(len(x_t))
        rates = path.log_rates(x_t, x0, t)
        flow = rates.exp() * path.beta_slope(t)[:, None]
        made["velocity"].append(flow)
        made["rate"].append(flow.sum(-1))
        for name, integral in (("jump_prob", "reference"), ("jump_prob_integrated", "exact")):
            made[name].append(-torch.expm1(-path.hazard(rates, t, t - h, integral)))
    return {name: torch.stack(parts).unflatten(1, inputs["x_t"].shape) for name, parts in made.items()}


def step(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path, shape = path_of(config, inputs), inputs["x_t"].shape
    x_t, z = inputs["x_t"][:, None, None], inputs["logits"][:, None, None]
    t = torch.full((len(x_t), 1), 1 - config["tau"])
    s = torch.zeros_like(t) if config["last"] else t - config["h"]
    streams = {"x0": "uniform_x1", "jump": "uniform_jump", "to": "uniform_destination"}
    given = Given({name: inputs[file] for name, file in streams.items()})
    x_1 = draw(plain(z), inputs["uniform_x1"][:, None, None]).tokens
    each, until = (time.expand(shape).flatten() for time in (t, s))
    rates = path.log_rates(x_t.flatten(), x_1.flatten(), each)
    rate = (rates.exp().sum(-1) * path.beta_slope(each)).view(shape)
    chance = -torch.expm1(-path.hazard(rates, each, until, "reference")).view(shape)
    if config["last"]:
        rate, chance = torch.zeros(shape), torch.ones(shape)
    return {
        "x_1": x_1[:, 0, 0],
        "rate": rate,
        "jump_prob": chance,
        "jump": (inputs["uniform_jump"] < chance).long(),
        "x_next": path.step(x_t, t, s, plain(z), given, integral="reference")[:, 0, 0],
    }


def guidance(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    scale = Above(config["guidance_scale"], 1 - config["guidance_trunc"])
    t = 1 - torch.tensor(config["tau"], dtype=torch.float64)
    w = scale(t)
    cond, uncond = plain(inputs["cond"]), plain(inputs["uncond"])
    return {"scale": w.float(), "logits": torch.stack([(uncond + float(one) * (cond - uncond)).whole() for one in w])}


def sample(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    module = network(config, weights)
    path, n = path_of(config, inputs), config["num_steps"]
    denoiser = TokenDenoiser(module, module.lm_head, path)
    text, negative = ({"text": inputs[name]} for name in ("text_ids", "negative_text_ids"))
    inner = guided(denoiser, text, negative, config["guidance_scale"])
    names = {"x0": "uniform_x1", "jump": "uniform_jump", "to": "uniform_destination"}
    shape = inputs["x_init"].shape[1:]
    streams = {f"{i}.{ours}": inputs[file][:, i] for i in range(n) for ours, file in names.items()}
    seen: list[Tensor] = []
    states: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor, where: Tensor | bool = True) -> Logits:
        states.append(x)
        estimate = inner(x, t, where)
        seen.append(estimate.whole().flatten(1, 3))
        return estimate

    sampler = Jumps(guided_above=1 - config["guidance_trunc"], integral="reference")
    with torch.no_grad():
        final = sampler(denoise, path, inputs["x_init"], shifted(n, config["shift"]), Given(streams))
    x_1 = [
        draw(plain(z.unflatten(1, shape)), streams[f"{i}.x0"].reshape(-1, *shape)).tokens for i, z in enumerate(seen)
    ]
    return {
        "logits": torch.stack(seen, dim=1),
        "x_1": torch.stack(x_1, dim=1).flatten(2),
        "x": torch.stack([*states[1:], final], dim=1).flatten(2),
        "final": final,
    }


def fsq(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    levels = tuple(config["levels"])
    codes = quantise(inputs["z"].movedim(1, -1), levels)
    basis = [1]
    for level in levels[:-1]:
        basis.append(basis[-1] * level)
    digits = code_digits(torch.tensor(basis), levels)
    assert (digits == torch.eye(len(levels), dtype=torch.int64)).all() and len(codebook(levels)) == config["num_codes"]
    return {
        "digits": code_digits(inputs["ids"], levels),
        "dequantized": dequantise(inputs["ids"], levels),
        "bounded": bound(inputs["grid"][:, None].expand(-1, len(levels)), levels),
        "codes": codes,
        "basis": torch.tensor(basis),
        "requantized": dequantise(codes, levels).movedim(-1, 1),
    }


def haar_(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    patches = patch(inputs["video"], config["patch_size"])
    restored = unpatch(patches, config["patch_size"])
    return {"bands": haar(inputs["x"]), "patches": patches, "restored": restored}


def fsq_tokenizer(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    tokenizer = FSQVideoTokenizer(fsq_size(config))
    tokenizer.load_state_dict(weights)
    pixels = inputs["pixels"].transpose(1, 2)
    with torch.no_grad():
        codes = tokenizer.encode(pixels)
        made = {"z": tokenizer.latents(pixels).movedim(-1, 1), "codes": codes}
        made["pixels"] = tokenizer.decode(codes).transpose(1, 2)
        if "random_codes" in inputs:
            made["random_pixels"] = tokenizer.decode(inputs["random_codes"]).transpose(1, 2)
    return made


def ibq_tokenizer(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    size = IBQSize(
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        codes=config["num_vq_embeddings"],
        code_dim=config["vq_embed_dim"],
        attention_down=config["attn_down_block"],
        attention_up=config["attn_up_block"],
    )
    tokenizer = IBQImageTokenizer(size)
    tokenizer.load_state_dict(weights)
    pixels = inputs["pixels"][:, None]
    with torch.no_grad():
        codes = tokenizer.encode(pixels)
        return {
            "z": tokenizer.latents(pixels)[:, 0].movedim(-1, 1),
            "codes": codes[:, 0],
            "pixels": tokenizer.decode(codes)[:, 0],
            "frames": tokenizer.decode(inputs["video_codes"]).transpose(1, 2),
        }


for answer in (
    rope,
    inputs,
    forward,
    loss,
    time_grid,
    metric_path,
    metric_corrupt,
    mixture_path,
    velocity,
    step,
    guidance,
    sample,
    fsq,
    haar_,
    fsq_tokenizer,
    ibq_tokenizer,
):
    registered(f"ursa.{answer.__name__.rstrip('_')}", answer)


def size_of(config: dict) -> URSASize:
    return URSASize(
        dim=config["hidden_size"],
        ffn_dim=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        layers=config["num_hidden_layers"],
        codes=config["lm_head_size"],
        words=config["lm_vocab_size"],
        bov=config["bov_token_id"],
        head_dim=config["head_dim"],
        theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        text_len=None,
    )


def network(config: dict, weights: dict[str, Tensor]) -> URSATransformer:
    module = URSATransformer(size_of(config))
    assert layouts.recognise(weights) == "ursa"
    module.load_state_dict(dict(layouts.to_kinema(weights.items(), "ursa")))
    return module


def path_of(config: dict, inputs: dict[str, Tensor]) -> MetricPath:
    return MetricPath(inputs["codebook"], config["alpha"], config["c"], config["eps"])


def visual(module: URSATransformer, codes: Tensor, text: Tensor) -> Logits:
    hidden = module(codes, text=text)
    return Logits(hidden, module.lm_head, hidden.dtype)


def parts_of(ids: Tensor, size: URSASize, grid: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Text ids and codes of a sequence."""
    frames, height, width = grid
    n = frames * height * width
    return ids[:, : -n - 1], (ids[:, -n:] - size.words).unflatten(1, (frames, height, width))


def gradients_of(module: nn.Module, order: list[str]) -> dict[str, Tensor]:
    """Gradients under the files' names, and their norms in the given order."""
    found = {layouts.from_kinema(name, "ursa"): p.grad for name, p in module.named_parameters()}
    found = {name: grad if grad is not None else torch.zeros(()) for name, grad in found.items()}
    norms = torch.stack([found[name].norm() for name in order])
    return {"grad_norms": norms, **{f"grad.{name}": grad for name, grad in found.items()}}


def fsq_size(config: dict) -> FSQSize:
    return FSQSize(
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        levels=tuple(config.get("levels", FSQSize.levels)),
        sample_frames=config["sample_frames"],
        patch_size=config["patch_size"],
        temporal_stride=config["temporal_stride"],
        spatial_stride=config["spatial_stride"],
    )


def named(number: float) -> str:
    return f"{number:g}".replace(".", "p")
