"""What kinema says to the golden cases of CogVideoX's transformer, adapters and autoencoder."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from harness import Case, adapter
from torch import Tensor, nn

from adapters.cogvideox import Given
from kinema.models import lora
from kinema.models.cogvideox import layouts, positions
from kinema.models.cogvideox.transformer import CogVideoXSize, CogVideoXTransformer
from kinema.models.cogvideox.vae import CogVideoXVAE, VideoAutoencoder, front_padded, placed_first
from kinema.models.layers import sinusoid
from kinema.models.lora import LoRA


@adapter("cogvideox.time_embedding")
def time_embedding(case, tensors):
    t = tensors["in.timestep"]
    return {f"time_{width}.embedding": sinusoid(t, width) for width in case.config["widths"]}


@adapter("cogvideox.rope")
def rope(case, tensors):
    c = case.config
    base = c["base_grid"] if c["grid_type"] == "linspace" else None
    cos, sin = positions.rope(tuple(c["grid"]), c["head_dim"], base)
    made = {"cos": cos.repeat_interleave(2, dim=1), "sin": sin.repeat_interleave(2, dim=1)}
    return made | ({"crop": torch.tensor(positions.cropped(tuple(c["grid"][1:]), base))} if base else {})


@adapter("cogvideox.sincos")
def sincos(case, tensors):
    c = case.config
    assert c["temporal_scale"] == 1
    table = positions.sincos(tuple(c["grid"]), c["dim"], c["spatial_scale"])
    return {"table": table.unflatten(0, (c["grid"][0], -1))}


@adapter("cogvideox.dit")
def dit(case, tensors):
    module = network(case, tensors)
    x, image = tensors["in.x"], tensors.get("in.image_latents")
    given = (x if image is None else torch.cat([x, image], dim=2)).requires_grad_()
    x, *rest = given.split(16, dim=2)
    cond = {"text": tensors["in.text"]} | ({"image": rest[0]} if rest else {})
    sample = module(x, tensors["in.timestep"][:, None], **cond)
    (sample * tensors["in.cotangent"]).sum().backward()
    norms = {layouts.diffusers_name(name): p.grad.norm() for name, p in module.named_parameters()}
    with torch.no_grad():
        original = network(case, tensors, norm_eps=1e-6)(x, tensors["in.timestep"][:, None], **cond)
    return {
        "sample": sample,
        "sample_eps1e6": original,
        "grad.x": given.grad,
        "grad_norms": torch.stack([norms[name] for name in case.config["grad_norm_order"]]),
    }


@adapter("cogvideox.dit_names")
def dit_names(case, tensors):
    """From SAT's names to diffusers' by way of kinema's, and back."""
    theirs, given = weights(tensors), {n[len("in.sat.") :]: t for n, t in tensors.items() if n.startswith("in.sat.")}
    assert layouts.recognise(given) == "sat" and layouts.recognise(theirs) == "diffusers"
    size = layouts.size_of(shapes(theirs), "diffusers", configuration(case))
    ours = dict(layouts.to_kinema(given.items(), "sat", size.table))
    back = dict(layouts.from_kinema(ours.items(), "sat", size))
    assert set(back) <= set(given)
    for name, tensor in given.items():
        if not layouts.UNUSED.search(name):
            torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=0)
    return dict(layouts.from_kinema(ours.items(), "diffusers", size))


@adapter("cogvideox.lora")
def adapters(case, tensors):
    plain = forward(network(case, tensors), tensors)
    prefix = "in.lora.transformer."
    named = {n[len(prefix) :].removesuffix(".weight"): t for n, t in tensors.items() if n.startswith(prefix)}
    module = edited(case, tensors, named)
    sample = forward(module, tensors)
    lora.merge(module)
    merged = {layouts.diffusers_name(name): tensor for name, tensor in lora.folded(module).items()}
    return {
        "sample_base": plain,
        "sample": sample,
        "sample_merged": forward(module, tensors),
        **{f"merged.{name}": tensor for name, tensor in merged.items()},
    }


@adapter("cogvideox.lora_names")
def adapters_of_sat(case, tensors):
    prefix = "in.sat."
    named = dict(layouts.lora_from_sat((n[len(prefix) :], t) for n, t in tensors.items() if n.startswith(prefix)))
    theirs = {layouts.diffusers_name(name[:-7]) + name[-7:]: tensor for name, tensor in named.items()}
    return {"sample_eps1e6": forward(edited(case, tensors, theirs, norm_eps=1e-6), tensors)}


def edited(case: Case, tensors: dict[str, Tensor], named: dict[str, Tensor], **changes) -> CogVideoXTransformer:
    """The network with the adapter matrices that have these names of diffusers."""
    module = network(case, tensors, **changes)
    LoRA(case.config["r"], case.config["alpha"]).apply(module)
    layers = lora.adapted(module)
    assert len(named) == 2 * len(layers)
    for name, layer in layers:
        for letter in "AB":
            matrix = getattr(layer, f"lora_{letter}")
            matrix.data = named[f"{layouts.diffusers_name(name)}.lora_{letter}"]
    return module


@torch.no_grad()
def forward(module: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    cond = {"text": tensors["in.text"]}
    if "in.image_latents" in tensors:
        cond["image"] = tensors["in.image_latents"]
    return module(tensors["in.x"], tensors["in.timestep"][:, None], **cond)


def network(case: Case, tensors: dict[str, Tensor], **changes) -> CogVideoXTransformer:
    """The case's network; its rotary positions are counted from 0, whatever grid it was trained on."""
    size = size_of(case, tensors)
    if size.positions != "sincos":
        size = replace(size, positions="slice")
    if "in.ofs" in tensors:
        size = replace(size, ofs=float(tensors["in.ofs"]))
    module = CogVideoXTransformer(replace(size, **changes))
    module.load_state_dict(dict(layouts.to_kinema(weights(tensors).items(), "diffusers", size.table)))
    return module


def size_of(case: Case, tensors: dict[str, Tensor]) -> CogVideoXSize:
    return layouts.size_of(shapes(weights(tensors)), "diffusers", configuration(case))


def configuration(case: Case) -> dict:
    """The configuration in diffusers' words: the case's own, or that of the weights it shares."""
    if "num_layers" in case.config:
        return {name: value for name, value in case.config.items() if name not in ("grid", "variant")}
    manifest = json.loads((Path(case.folder) / "manifest.json").read_text(encoding="utf-8"))
    return manifest["weights"][case.entry["weights"]]["config"]


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd.")}


def shapes(named: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


@adapter("cogvideox.vae_encode")
def vae_encode(case, tensors):
    chunk = {8: "8+1", 0: "whole"}[case.config["chunk_frames"]]
    codec = autoencoder(case, tensors, chunk=chunk)
    with torch.no_grad():
        mean, logvar = codec.posterior(video(tensors["in.pixels"]))
    latents = codec.latents(mean, logvar, Given(video(tensors["in.normal"])))
    made = {"mean": mean, "logvar": logvar, "sample": latents / codec.scale, "latents": latents}
    return {name: video(x) for name, x in made.items()}


@adapter("cogvideox.vae_decode")
def vae_decode(case, tensors):
    codec, z = autoencoder(case, tensors), video(tensors["in.z"])
    assert case.config["chunk_latents"] == codec.network.num_latent_frames_batch_size
    with torch.no_grad():
        return {"pixels": video(codec.reconstruct(z)), "pixels_scaled": video(codec.reconstruct(z / codec.scale))}


@adapter("cogvideox.image_latents")
def image_latents(case, tensors):
    """Recorded as for a video that is encoded without padding and then padded like any other."""
    c = case.config
    frames, multiple = (c["frames"] - 1) // 4 + 1, c["patch_size_t"] or 1
    scale = 1 / c["scaling_factor"] if c["invert_scale_latents"] else c["scaling_factor"]
    made = front_padded(placed_first(scale * video(tensors["in.mean"]), frames), multiple)
    counts = {"latent_frames": torch.tensor(frames), "padded_latent_frames": torch.tensor(made.shape[1])}
    return {"image_latents": made, **counts}


def autoencoder(case: Case, tensors: dict[str, Tensor], **changes) -> VideoAutoencoder:
    c = case.config
    network = AutoencoderKLCogVideoX(
        block_out_channels=c["block_out_channels"],
        layers_per_block=c["layers_per_block"],
        norm_num_groups=c["norm_num_groups"],
        latent_channels=c["latent_channels"],
        scaling_factor=c["scaling_factor"],
    )
    network.load_state_dict(weights(tensors))
    return VideoAutoencoder(CogVideoXVAE("", **changes), network.eval())


def video(x: Tensor) -> Tensor:
    """The autoencoder files' `[B, C, T, H, W]` to kinema's `[B, T, C, H, W]`, and back."""
    return x.transpose(1, 2)
