"""What kinema says to the golden cases of the bidirectional Wan transformer, driven by each case's config."""

from collections.abc import Callable

import torch
from harness import Case, adapter
from torch import Tensor

from kinema.models.layers import rotary, rotary_widths, rotate, sinusoid
from kinema.models.wan import layouts
from kinema.models.wan.transformer import WanSize, WanTransformer


def bidirectional(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], order: list[str]) -> dict:
    """Flow, activations inside and gradients of sum(flow · loss_weight); `order` lists the parameters of grad_norms."""
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
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in module.named_parameters()}
    return {
        "flow": video(flow.detach()),
        **{f"mid.{name}": value for name, value in seen.items()},
        "grad.x": x.grad,
        "grad_norms": torch.stack([gradients[name].norm() for name in order]),
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }


def diffusers_naming(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], order: list[str]) -> dict:
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


def per_frame_timesteps(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], order: list[str]) -> dict:
    with torch.no_grad():
        flow = network(size_of(config), weights)(video(inputs["x"]), inputs["t"], text=texts(inputs))
    return {"flow": video(flow)}


def rope_tables(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], order: list[str]) -> dict:
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


def time_sinusoid(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], order: list[str]) -> dict:
    return {f"dim{dim}": sinusoid(inputs["t"], dim, torch.float64) for dim in config["dims"]}


def registered(kind: str, answer: Callable[..., dict]) -> None:
    @adapter(kind)
    def run(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
        weights = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith("sd")}
        return answer(case.config, inputs, weights, case.order)


for answer in (bidirectional, diffusers_naming, per_frame_timesteps, rope_tables, time_sinusoid):
    registered(f"wan.{answer.__name__}".replace("bidirectional", "bidirectional_t2v"), answer)


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
