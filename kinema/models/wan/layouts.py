"""The names Wan's tensors go by: those of the original checkpoints, which are kinema's, diffusers', and Self-Forcing's.

A layout is recognised from the names in a file, never from the file's own name. "self_forcing" is the original names
below `model.`, in a torch file that may hold several networks.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.models.wan.transformer import WanSize

Layout = Literal["wan", "diffusers", "self_forcing"]

# What training wrappers leave in names, as whole components and anywhere.
WRAPPERS = {"model", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}

IMAGE = ("img_emb.", "k_img", "v_img", "image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")

TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
# diffusers numbers a block's norms in the order they are called, so the affine norm3 is its norm2.
BLOCK = {"modulation": "scale_shift_table", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
BLOCK |= {
    f"{ours}.{part}": f"{theirs}.{name}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in {
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "o": "to_out.0",
        "norm_q": "norm_q",
        "norm_k": "norm_k",
    }.items()
}
FROM_TOP, FROM_BLOCK = ({theirs: ours for ours, theirs in table.items()} for table in (TOP, BLOCK))


def recognise(names: Iterable[str]) -> Layout:
    """The layout of a file's names. Raises UserError for image-to-video weights and for what is no Wan at all."""
    names = list(names)
    clean = {strip(name) for name in names}
    if image := next((name for name in clean if any(mark in name for mark in IMAGE)), None):
        raise UserError(
            f"these are weights of an image-to-video Wan ({image}), whose image attention kinema does not have; "
            "take the text-to-video weights, which continue an image given as first latent frame"
        )
    if "condition_embedder.time_proj.weight" in clean:
        return "diffusers"
    if "time_projection.1.weight" in clean:
        return "self_forcing" if any(name.startswith("model.") for name in names) else "wan"
    first = ", ".join(sorted(clean)[:3])
    raise UserError(f"these are not weights of a Wan transformer (names like {first}); give the transformer's file")


def strip(name: str) -> str:
    """A name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def to_kinema(named: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream to kinema's names and splits fused q, k, v. Names it does not know pass unchanged."""
    for name, tensor in named:
        name = strip(name)
        if layout == "diffusers":
            name = _rename(name, FROM_TOP, FROM_BLOCK)
        if ".to_qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".to_qkv.", f".{part}."), rows
        else:
            yield name, tensor


def fused(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Joins q, k and v of each self-attention, as soon as all three came, to what `to_kinema` splits."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named:
        if not (match := re.fullmatch(r"(blocks\.\d+\.self_attn\.)([qkv])(\..+)", name)):
            yield name, tensor
            continue
        whole = f"{match[1]}to_qkv{match[3]}"
        parts = waiting.setdefault(whole, {})
        parts[match[2]] = tensor
        if len(parts) == 3:
            yield whole, torch.cat([waiting[whole][part] for part in "qkv"])
            del waiting[whole]
    for whole, parts in waiting.items():
        yield from ((whole.replace("to_qkv", part), tensor) for part, tensor in parts.items())  # incomplete: for errors


def from_kinema(name: str, layout: Layout) -> str:
    """The name a tensor has in another layout."""
    if layout == "diffusers":
        return _rename(name, TOP, BLOCK)
    return f"model.{name}" if layout == "self_forcing" else name


def size_of(shapes: Mapping[str, tuple[int, ...]], layout: Layout, config: Mapping[str, Any]) -> WanSize:
    """The size of a network, read from its tensors' shapes.

    What shapes do not show comes from `config`, with the keys of any layout: the heads (without it, of 128 channels, as
    in all released sizes) and the text length (512). Raises UserError where the two disagree.
    """
    top, block = (FROM_TOP, FROM_BLOCK) if layout == "diffusers" else ({}, {})
    shapes = {_rename(strip(name), top, block): shape for name, shape in shapes.items()}
    try:
        dim, in_channels, *patch = shapes["patch_embedding.weight"]
        ffn_dim, text_dim = shapes["blocks.0.ffn.0.weight"][0], shapes["text_embedding.0.weight"][1]
        freq_dim, out = shapes["time_embedding.0.weight"][1], shapes["head.head.weight"][0]
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]}, read as layout {layout}; get the complete file") from None
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    given = (config.get(key) for key in ("heads", "num_heads", "num_attention_heads"))
    heads = next((n for n in given if n), dim // 128)
    if not heads or dim % heads:
        raise UserError(
            f"cannot tell the number of heads of a Wan of width {dim}; put its config.json beside the weights"
        )
    size = WanSize(
        dim=dim,
        ffn_dim=ffn_dim,
        heads=heads,
        layers=layers,
        in_channels=in_channels,
        out_channels=out // math.prod(patch),
        text_dim=text_dim,
        text_len=config.get("text_len", 512),
        freq_dim=freq_dim,
        patch=(patch[0], patch[1], patch[2]),
        eps=config.get("eps", 1e-6),
    )
    for key, value in (asdict(size) | wan_config(size) | diffusers_config(size)).items():
        said = config.get(key)
        if isinstance(value, int | list) and said is not None and said != value:
            raise UserError(f"config.json says {key} {said}, but the tensors say {value}; one is of another model")
    return size


def wan_config(size: WanSize) -> dict[str, Any]:
    """config.json of the original checkpoints."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": size.dim,
        "ffn_dim": size.ffn_dim,
        "freq_dim": size.freq_dim,
        "in_dim": size.in_channels,
        "out_dim": size.out_channels,
        "num_heads": size.heads,
        "num_layers": size.layers,
        "text_dim": size.text_dim,
        "text_len": size.text_len,
        "patch_size": list(size.patch),
        "eps": size.eps,
    }


def diffusers_config(size: WanSize) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel, which has no place for the text length."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": size.head_dim,
        "cross_attn_norm": True,
        "eps": size.eps,
        "ffn_dim": size.ffn_dim,
        "freq_dim": size.freq_dim,
        "image_dim": None,
        "in_channels": size.in_channels,
        "num_attention_heads": size.heads,
        "num_layers": size.layers,
        "out_channels": size.out_channels,
        "patch_size": list(size.patch),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": size.text_dim,
    }


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    assert match, name
    prefix, stem, leaf = match[1] or "", match[2], match[3] or ""
    return prefix + (block if prefix else top).get(stem, stem) + leaf
