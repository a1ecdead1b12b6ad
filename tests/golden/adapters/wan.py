"""What kinema says to the golden cases of the Wan transformers, driven by each case's config."""

import torch
from harness import Case, registered
from torch import Tensor

from kinema.diffusion.chunks import Chunks
from kinema.models.causality import Sight, Window
from kinema.models.layers import rotary, rotary_widths, rotate, sinusoid
from kinema.models.wan import layouts
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.transformer import WanSize, WanTransformer


def bidirectional(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    """Flow, activations inside and gradients of sum(flow · loss_weight)."""
    module = network(size_of(config), weights)
    seen: dict[str, Tensor] = {}
    parts = {"time_embedding": module.time_embedding, "time_modulation": module.time_projection}
    parts |= {"text_tokens": module.text_embedding} | {f"block_{i}": block for i, block in enumerate(module.blocks)}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out.detach()))
    x = inputs["x"].requires_grad_()
    text = texts(inputs)
    flow = module(video(x), inputs["t"][:, None], text=text)
    (video(flow) * inputs["loss_weight"]).sum().backward()

    tokens = seen["text_tokens"]  # rows of the prompts, then a few that stand for all rows of padding
    padding = tokens[:, -1:].expand(-1, module.size.text_len - text.shape[1], -1)
    seen["text_tokens"] = torch.cat([tokens[:, : text.shape[1]], padding], dim=1)
    seen["time_embedding"] = seen["time_embedding"][:, 0]
    seen["time_modulation"] = seen["time_modulation"][:, 0].unflatten(-1, (6, -1))
    return {
        "flow": video(flow.detach()),
        **{f"mid.{name}": value for name, value in seen.items()},
        "grad.x": x.grad,
        **gradients(module, case.order),
    }


def diffusers_naming(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    """The flow of weights that come under diffusers' names, for one time per video and one per frame."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert layouts.recognise(weights) == "diffusers"
    text = inputs["text_padded"]
    size = layouts.size_of(shapes, "diffusers", {**config, "text_len": text.shape[1]})
    module = network(size, dict(layouts.to_kinema(weights.items(), "diffusers")))
    with torch.no_grad():
        flow = module(video(inputs["x"]), inputs["t"][:, None], text=text)
        per_frame = module(video(inputs["per_frame.x"]), inputs["per_frame.t"], text=text)
    return {"flow": video(flow), "per_frame.flow": video(per_frame)}


def per_frame_timesteps(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    with torch.no_grad():
        flow = network(size_of(config), weights)(video(inputs["x"]), inputs["t"], text=texts(inputs))
    return {"flow": video(flow)}


def rope_tables(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    made = {}
    frames, height, width = config["grid"]
    for dim in config["head_dims"]:
        widths = rotary_widths(dim)
        assert list(widths) == config["axis_split"][str(dim)]
        tables = [rotary([inputs["rows"]], [part], torch.float64) for part in widths]
        made[f"d{dim}.cos"], made[f"d{dim}.sin"] = (torch.cat(table, dim=-1) for table in zip(*tables, strict=True))
        for start in config["starts"]:
            positions = [torch.arange(start, start + frames), torch.arange(height), torch.arange(width)]
            q_BNLD = inputs[f"d{dim}.q"].transpose(1, 2)
            made[f"d{dim}.rotated_start{start}"] = rotate(q_BNLD, *rotary(positions, widths)).transpose(1, 2)
    return made


def time_sinusoid(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    return {f"dim{dim}": sinusoid(inputs["t"], dim, torch.float64) for dim in config["dims"]}


def causal_cached(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    """The masked forward, and call after call through the cache; a call that begins where the last one did replaces it.

    What a call that is not the last on its frames leaves in the cache counts for nothing, so only the last one writes.
    """
    module = causal_network(config, weights)
    text, made = texts(inputs), {}
    calls = sorted({name.split(".")[0] for name in inputs if name.startswith("call_")})
    starts = [int(inputs[f"{call}.start"]) for call in calls]
    cache = module.new_cache(config["num_frames"])
    with torch.no_grad():
        for call, start, following in zip(calls, starts, [*starts[1:], None], strict=True):
            assert start == cache.frames
            x, t = video(inputs[f"{call}.x"]), inputs[f"{call}.t"]
            flow = module(x, t, text=text, cache=cache, write=following != start)
            made[f"{call}.flow"] = video(flow)
        if "full.x" in inputs:
            flow = module(video(inputs["full.x"]), inputs["full.t"], text=text, lengths=config["block_sizes"])
            made["full.flow"] = video(flow)
    notes = case.entry.get("notes", {})
    for layer in range(len(module.blocks)) if "cached_frames" in notes else ():
        for name, tensor in zip("kv", cache.read(layer, notes["cached_frames"]), strict=True):
            made[f"cache.layer{layer}.{name}"] = tensor
    return made


def teacher_forcing(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    module = causal_network(config, weights)
    noisy, clean = inputs["x_noisy"].requires_grad_(), inputs["x_clean"].requires_grad_()
    arguments = {"clean": video(clean), "text": texts(inputs), "lengths": config["block_sizes"]}
    flow = video(module(video(noisy), inputs["t"], **arguments))
    made = {"flow": flow.detach()}
    (flow * inputs["loss_weight"]).sum().backward()
    if "t_clean_aug" in inputs:
        with torch.no_grad():
            flow = module(video(noisy), inputs["t"], clean_timestep=inputs["t_clean_aug"], **arguments)
        made["flow_aug"] = video(flow)
    return {**made, **gradients(module, case.order), "grad.x_noisy": noisy.grad, "grad.x_clean": clean.grad}


def attention_masks(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    made = {}
    for name, entry in config["masks"].items():
        sight = Sight(tuple(entry["block_sizes"]), window_of(entry), entry["mode"] == "teacher_forcing")
        made[name] = sight.mask(entry["tokens_per_frame"], torch.device("cpu")).to(torch.uint8)
    return made


for answer in (
    bidirectional,
    diffusers_naming,
    per_frame_timesteps,
    rope_tables,
    time_sinusoid,
    causal_cached,
    teacher_forcing,
    attention_masks,
):
    registered(f"wan.{answer.__name__}".replace("bidirectional", "bidirectional_t2v"), answer)
registered("wan.causal_window", causal_cached)


def video(x: Tensor) -> Tensor:
    """The golden files' `[B, C, T, H, W]` to kinema's `[B, T, C, H, W]`, and back."""
    return x.transpose(1, 2)


def texts(inputs: dict[str, Tensor]) -> Tensor:
    """The prompts `in.text.0`, `in.text.1` … of different lengths as one batch, zero beyond each."""
    count = sum(name.startswith("text.") for name in inputs)
    return torch.nn.utils.rnn.pad_sequence([inputs[f"text.{i}"] for i in range(count)], batch_first=True)


def size_of(config: dict) -> WanSize:
    return WanSize(
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        text_len=config["text_len"],
        freq_dim=config["freq_dim"],
    )


def network(size: WanSize, weights: dict[str, Tensor]) -> WanTransformer:
    module = WanTransformer(size)
    module.load_state_dict(weights)
    return module


def causal_network(config: dict, weights: dict[str, Tensor]) -> WanCausalTransformer:
    """Chunks as long as they come: the cases say their lengths at each call."""
    module = WanCausalTransformer(size_of(config), Chunks(max(config.get("block_sizes", [1]))), window_of(config))
    module.load_state_dict(weights)
    return module


def window_of(config: dict) -> Window:
    """The window of a case, whose sinks stay where they were unless it says otherwise."""
    sink, frames = config.get("sink_frames", 0), config.get("window_frames")
    return Window(frames, sink, config.get("reanchor_sink", False))


def gradients(module: torch.nn.Module, order: list[str]) -> dict[str, Tensor]:
    """The gradient of every parameter, zero where it has none, and the norms of those that `order` lists."""
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in module.named_parameters()}
    norms = torch.stack([found[name].norm() for name in order])
    return {"grad_norms": norms, **{f"grad.{name}": gradient for name, gradient in found.items()}}
