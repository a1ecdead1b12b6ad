"""Long video: scans, TTT layers, whole networks with them, and the diffusion of the public code they come from."""

import types
from dataclasses import replace
from functools import partial

import torch
from harness import Case, adapter
from torch import Tensor, nn

from adapters.cogvideox import Given, Subsampled, levels
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import Cosine, guided
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import V
from kinema.diffusion.samplers import DPMpp2MSDE
from kinema.diffusion.schedule import ZeroSNR
from kinema.diffusion.times import sat_trailing
from kinema.models.cogvideox import layouts, positions, ttt_video
from kinema.models.cogvideox.transformer import CogVideoXSize, CogVideoXTransformer
from kinema.models.layers import sinusoid
from kinema.models.ttt import scan as inner
from kinema.models.ttt.full_attention import NoMixer
from kinema.models.ttt.mixer import mix
from kinema.models.ttt.order import ScanOrder, Segments, scan_order
from kinema.models.ttt.ttt_layer import TTTMLP, TTTLayer, TTTLinear
from kinema.models.ttt.turn import Turn

KINDS = {"ttt_linear": TTTLinear, "ttt_mlp": TTTMLP}
MIXER = "dit.layers.0.seq_modeling_block.ssm.ttt."


@adapter("ttt.op")
def op(case, tensors):
    assert case.config["inner_eps"] == inner.EPS
    names = [name for name in ("W1", "b1", "W2", "b2") if f"in.{name}" in tensors]
    given = {name: tensors[f"in.{name}"].clone().requires_grad_() for name in ("q", "k", "v", "lr", *names)}
    norm = tuple(tensors[f"in.norm_{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    q, k, v, eta = (given[name] for name in ("q", "k", "v", "lr"))
    state = tuple(given[name].expand(len(q), *given[name].shape) for name in names)
    o, last = inner.scan(q, k, v - k, eta, state, norm, case.config["mini_batch"], snapshot_every=2)
    (o * tensors["in.loss_weight"]).sum().backward()
    return {
        "o": o,
        **{f"final.{name}": tensor for name, tensor in zip(names, last, strict=True)},
        **{f"grad.{name}": tensor.grad for name, tensor in given.items()},
        **{f"grad.norm_{name}": tensor.grad for name, tensor in zip(("weight", "bias"), norm, strict=True)},
    }


@adapter("ttt.layer")
def layer(case, tensors):
    module, (there, _) = mixer_of(case, tensors), walks(case)
    x = tensors["in.x"].double().requires_grad_()
    parts = module.turned(module.project(x), there.turn)
    y = module(x, there)
    (y * tensors["in.loss_weight"]).sum().backward()
    grads = gradients(module, "blocks.0.mixer.", MIXER)
    q, k, target, eta = parts
    return {
        "mid.q": q,
        "mid.k": k,
        "mid.v_target_plus_k": target + k,
        "mid.lr": eta,
        "y": y,
        "grad.x": x.grad,
        "grad_norms": torch.stack([grads[name].norm() for name in case.order]),
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }


@adapter("ttt.bidirectional")
def bidirectional(case, tensors):
    module, ways = mixer_of(case, tensors), walks(case)
    x = tensors["in.x"].double().requires_grad_()
    y = mix(module, "sequential", x, *ways, case.config["text_tokens"])
    (y * tensors["in.loss_weight"]).sum().backward()
    grads = gradients(module, "blocks.0.mixer.", "dit.layers.0.seq_modeling_block.")
    return {"y": y, "grad.x": x.grad, **{f"grad.{name}": grad for name, grad in grads.items()}}


@adapter("ttt.dit")
def dit(case, tensors):
    module, seen = network(case, tensors), {}
    video, text = (tensors[f"in.{name}"].double() for name in ("video", "text"))
    for n, block in enumerate(module.blocks):
        block.register_forward_hook(partial(keep, seen, n))
    calls = []
    module.blocks[0].mixer.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    v = module(video, tensors["in.t"][:, None].double(), text=text)
    made = {"v": v, **seen}
    if "in.loss_weight" in tensors:
        (v * tensors["in.loss_weight"]).sum().backward()
        grads = gradients(module, "", "")
        made["grad_norms"] = torch.stack([grads[name].norm() for name in case.order])
    words = text.shape[1] * text.shape[2]
    (forward, out_forward), (reverse, out_reverse) = calls
    reverse = torch.cat([reverse[:, :words], reverse[:, words:].flip(1)], dim=1)  # of one segment, whose text stays
    names = ("input_forward", "output_forward", "input_reverse", "output_reverse")
    mid = zip(names, (forward, out_forward, reverse, out_reverse), strict=True)
    return made | {f"mid.ttt_{name}": tensor for name, tensor in mid}


@adapter("ttt.dit_reference_interleave")
def dit_reference_interleave(case, tensors):
    """The rates of other tokens, by way of a walk that kinema does not have."""
    video, text = (tensors[f"in.{name}"].double() for name in ("video", "text"))
    made = {}
    for name, rows in (("v_rows", True), ("v_last_row", False)):
        module = network(case, tensors)
        for block in module.blocks:
            walk = partial(misplaced_walk, segments=(text.shape[1], text.shape[2]), rows=rows)
            block.mixer.walk = types.MethodType(walk, block.mixer)
        made[name] = module(video, tensors["in.t"][:, None].double(), text=text)
    return made


def misplaced_walk(
    mixer: TTTLayer, streams: tuple[Tensor, ...], order: ScanOrder, segments: tuple[int, int], rows: bool
) -> Tensor:
    """Rates are grouped into mini-batches before tokens take their places in the scan; a token carries the rates of the
    group it was in, and of the new mini-batch the last row (or, by `rows`, each row for its own output) is used."""
    q, k, target, eta = streams
    length, b = q.shape[2], mixer.mini_batch
    natural = torch.arange(length)
    if order.turn.cos[0][0, 0] != 1:  # the walk back, whose first frame is not at time 0
        words = segments[0] * segments[1]
        natural = torch.cat([natural[:words].view(segments).flip(0).flatten(), natural[words:].flip(0)])
    before = natural.argsort()[order.index[0]]  # scan position → place in the sequence before
    group = (before // b)[:, None] * b + torch.arange(b)
    matrix = eta[:, :, natural][:, :, group]  # B H L b
    norm, state, outputs = mixer._norm(q.dtype), mixer.initial_state(len(q)), []
    scanned = [order.gather(x).split(b, dim=2) for x in (q, k, target)]
    for q_b, k_b, t_b, rates in zip(*scanned, matrix.split(b, dim=2), strict=True):
        last = rates[:, :, -1]
        outputs.append(inner.dual(state, q_b, k_b, t_b, rates if rows else last, norm))
        state = inner.learned(state, k_b, t_b, last, norm)
    return order.scatter(torch.cat(outputs, dim=2))


@adapter("ttt.backbone_diffusers_naming")
def backbone_diffusers_naming(case, tensors):
    """With one segment and without a mixer a long network is the plain one."""
    prefix = "sd_diffusers."
    named = {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}
    size = layouts.size_of({name: tuple(t.shape) for name, t in named.items()}, "diffusers", case.config)
    made = {}
    for name, eps in (("v", size.norm_eps), ("v_eps1e6", 1e-6)):
        module = CogVideoXTransformer(replace(size, norm_eps=eps, positions="slice"))
        if name == "v_eps1e6":
            module.lengthen(NoMixer())
        module = module.double()
        module.load_state_dict(dict(layouts.to_kinema(named.items(), "diffusers")))
        made[name] = module(
            tensors["in.video"].double(), tensors["in.t"][:, None].double(), text=tensors["in.text"].double()
        )
    return made


@adapter("ttt.rope")
def rope(case, tensors):
    made, grid = {}, tuple(case.config["grid"])
    for d in case.config["head_dims"]:
        cos, sin = positions.rope(grid, d, None, dtype=torch.float64)
        turn = Turn.at(positions.places(grid, None), d, torch.float64)
        ones = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(d // 2).expand(len(cos), -1)
        turned = turn.rotate(ones)  # (1, 0) turned is (cos, sin)
        made |= {
            f"d{d}.cos": cos.repeat_interleave(2, dim=-1),
            f"d{d}.sin": sin.repeat_interleave(2, dim=-1),
            f"d{d}.rotated": turn.rotate(tensors[f"in.d{d}.x"].double()),
            f"d{d}.scan_angles_cos": turned[:, ::2],
            f"d{d}.scan_angles_sin": turned[:, 1::2],
        }
    return made


@adapter("ttt.schedule")
def schedule(case, tensors):
    c = case.config
    alpha = ZeroSNR(1.0, c["num_timesteps"], (c["linear_start"], c["linear_end"])).abar().sqrt()
    made = {"a_1000_all": alpha, "a_1000": alpha[tensors["in.indices"]]}
    made |= {f"n{n}.timesteps": levels(sat_trailing(n)) for n in c["steps"]}
    return made | {f"t_embedding_{d}": sinusoid(tensors["in.t_embed"], d) for d in c["embedding_dims"]}


@adapter("ttt.schedule_subsampled")
def schedule_subsampled(case, tensors):
    return {f"n{n}.a": Subsampled(1.0, n).root() for n in case.config["steps"]}


@adapter("ttt.training_loss")
def training_loss(case, tensors):
    table, module = ZeroSNR(), network(case, tensors)
    x0, noise, text = (tensors[f"in.{name}"].double() for name in ("video", "noise", "text"))
    path, t = GaussianPath(table), table.time_at(tensors["in.t"])[:, None]
    outputs = []

    def watched(*args, **kwargs):
        outputs.append(module(*args, **kwargs))
        return outputs[-1]

    loss = LatentDenoiser(watched, path, V()).loss(x0, t, {"text": text}, Given({"noise": noise})).mean(1)
    loss.mean().backward()
    grads = gradients(module, "", "")
    return {
        "a": path.at(t, x0)[0].flatten(),
        "x_t": path.mix(x0, noise, t),
        "v": outputs[0],
        "loss": loss,
        "grad_norms": torch.stack([grads[name].norm() for name in case.order]),
    }


@adapter("ttt.sampler")
def sampler(case, tensors):
    return sampled(case, tensors, ZeroSNR())


@adapter("ttt.sampler_original_tables")
def sampler_original_tables(case, tensors):
    return sampled(case, tensors, Subsampled(1.0, case.config["num_steps"]))


def sampled(case: Case, tensors: dict[str, Tensor], table) -> dict[str, Tensor]:
    n = case.config["num_steps"]
    times = torch.tensor(sat_trailing(n), dtype=torch.float64)
    training = ZeroSNR().abar().sqrt()
    read = training[table.snapped()] if isinstance(table, Subsampled) else training[levels(times.tolist())]
    states, estimates = [], []

    def step_of(t: Tensor) -> int:
        return int((times - float(t.flatten()[0])).abs().argmin())

    def network(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        level = levels(times.tolist())[step_of(t)]
        v = 0.8 * torch.tanh(x) * torch.cos(level / 500) + cond["c"].view(-1, 1, 1, 1, 1) + 0.3 * x
        a = read[step_of(t)]
        return a * x - (1 - a**2).sqrt() * v

    conds = [{"c": tensors[f"in.{name}"].double()} for name in ("cond", "uncond")]
    denoise = guided(network, *conds, lambda t: tensors["in.guidance"][step_of(t)].expand(t.shape))

    def watched(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        estimates.append(denoise(x, t))
        return estimates[-1]

    draw = Given(tensors["in.noise"].double())
    final = DPMpp2MSDE()(watched, GaussianPath(table), tensors["in.x"].double(), times.tolist(), draw)
    a = table(times)[0]
    return {
        "timesteps": levels(times.tolist()),
        "a": a,
        "a_next": torch.cat([a[1:], torch.ones(1, dtype=a.dtype)]),
        "a_denoiser": read,
        "denoised": torch.stack(estimates),
        "states": torch.stack([*states[1:], final]),
    }


@adapter("ttt.guidance_schedule")
def guidance_schedule(case, tensors):
    t = 1 - tensors["in.s"].double() / case.config["num_steps"]
    laws = case.config["schedules"].items()
    return {name: Cosine(law["scale"], law["exponent"], falling=False)(t) for name, law in laws}


def spec_of(case: Case) -> TTTLinear | TTTMLP:
    c = case.config
    assert c["inner_eps"] == inner.EPS
    return KINDS[c["inner_model"]](mini_batch=c["mini_batch"], base_lr=c["base_lr"], n=c["mini_batch"])


def network(case: Case, tensors: dict[str, Tensor]) -> CogVideoXTransformer:
    c = case.config
    rows, columns = c["tokens_hw"]
    side = c["patch_size"]
    size = CogVideoXSize(
        heads=c["num_heads"],
        layers=c["num_layers"],
        head_dim=c["model_dim"] // c["num_heads"],
        in_channels=c["in_channels"],
        out_channels=c["in_channels"],
        patch=(1, side, side),
        positions="slice",
        grid=(c["attn_length"] + 1, side * rows, side * columns),
        time_dim=c["time_embed_dim"],
        text_dim=c["text_dim"],
        norm_eps=c["layer_norm_eps"],
    )
    module = CogVideoXTransformer(size)
    module.lengthen(spec_of(case))
    module = module.double()
    module.load_state_dict(dict(layouts.to_kinema(weights(tensors).items(), "ttt_video")))
    if c["lr_weight_zeroed"]:
        for block in module.blocks:
            nn.init.zeros_(block.mixer.lr.weight)
    return module


def mixer_of(case: Case, tensors: dict[str, Tensor]) -> TTTLayer:
    """The mixer of the first block."""
    c, prefix = case.config, "blocks.0.mixer."
    module = spec_of(case).build(c["model_dim"], c["model_dim"] // c["num_heads"]).double()
    named = dict(layouts.to_kinema(weights(tensors).items(), "ttt_video"))
    module.load_state_dict({n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)})
    return module


def walks(case: Case) -> tuple[ScanOrder, ScanOrder]:
    c = case.config
    grid = (c["num_frames"], *c["tokens_hw"])
    segments = Segments.of(grid, 1, c["num_frames"] - 1, c["text_tokens"])
    turn = Turn.at(positions.places(grid, None), c["model_dim"] // c["num_heads"], torch.float64)
    multiple = c["mini_batch"]
    return (
        scan_order(segments, turn, kind="reference", multiple=multiple),
        scan_order(segments, turn.flipped(), kind="reference", multiple=multiple, backward=True),
    )


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[3:]: tensor.double() for name, tensor in tensors.items() if name.startswith("sd.")}


def gradients(module: nn.Module, ours: str, theirs: str) -> dict[str, Tensor]:
    """By the names of the public code, without the prefix `theirs`; zero where nothing reaches a parameter."""
    named = [(ours + name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in module.named_parameters()]
    patch = (module.size.in_channels, *module.size.patch[1:]) if isinstance(module, CogVideoXTransformer) else (1, 1, 1)
    return {name.removeprefix(theirs): grad for name, grad in ttt_video.from_kinema(named, patch)}


def keep(seen: dict[str, Tensor], number: int, module: nn.Module, args: tuple, streams: tuple[Tensor, Tensor]) -> None:
    seen[f"mid.layer_{number}.video"], seen[f"mid.layer_{number}.text"] = streams
