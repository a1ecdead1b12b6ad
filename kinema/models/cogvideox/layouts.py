"""The names CogVideoX's tensors go by: kinema's own, diffusers' and those of the original training code ("SAT").

Those of the public code for TTT layers, "ttt_video", are in `cogvideox.ttt_video`.

A layout is recognised from the names in a file, never from the file's own name. SAT fuses q, k, v and both modulations
of a block, so tensors are split on the way in and joined on the way out.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import UserError
from kinema.models.cogvideox import positions, ttt_video
from kinema.models.cogvideox.transformer import CogVideoXSize, patch_counts

Layout = Literal["kinema", "diffusers", "sat", "ttt_video"]

PREFIX = "model.diffusion_model."  # of the network in a SAT file, which may also hold an autoencoder and a text encoder
CHANNELS = (
    16  # of the latents; a SAT file does not say its temporal patch, but how many numbers its last layer puts out
)

# kinema's name of a layer: (diffusers', SAT's); `{}` is the number of a block, which is `blocks.{}.` in front of ours.
TOP = {
    "patch_embed": ("patch_embed.proj", "mixins.patch_embed.proj"),
    "text_embed": ("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
    "pos_table": ("patch_embed.pos_embedding", "mixins.pos_embed.pos_embedding"),
    "time_embed.0": ("time_embedding.linear_1", "time_embed.0"),
    "time_embed.2": ("time_embedding.linear_2", "time_embed.2"),
    "ofs_embed.0": ("ofs_embedding.linear_1", "ofs_embed.0"),
    "ofs_embed.2": ("ofs_embedding.linear_2", "ofs_embed.2"),
    "norm_final": ("norm_final", "transformer.final_layernorm"),
    "norm_out": ("norm_out.norm", "mixins.final_layer.norm_final"),
    "modulate_out": ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1"),
    "proj_out": ("proj_out", "mixins.final_layer.linear"),
}
_QKV = "transformer.layers.{}.attention.query_key_value"  # of q, k and v one after the other
_ADALN = "mixins.adaln_layer.adaLN_modulations.{}.1"  # of attention and MLP for video, then both for text
BLOCK = {
    "norm_attn": ("norm1.norm", "transformer.layers.{}.input_layernorm"),
    "norm_mlp": ("norm2.norm", "transformer.layers.{}.post_attention_layernorm"),
    "modulate_attn": ("norm1.linear", _ADALN),
    "modulate_mlp": ("norm2.linear", _ADALN),
    "attn.q": ("attn1.to_q", _QKV),
    "attn.k": ("attn1.to_k", _QKV),
    "attn.v": ("attn1.to_v", _QKV),
    "attn.out": ("attn1.to_out.0", "transformer.layers.{}.attention.dense"),
    "attn.norm_q": ("attn1.norm_q", "mixins.adaln_layer.query_layernorm_list.{}"),
    "attn.norm_k": ("attn1.norm_k", "mixins.adaln_layer.key_layernorm_list.{}"),
    "mlp.up": ("ff.net.0.proj", "transformer.layers.{}.mlp.dense_h_to_4h"),
    "mlp.down": ("ff.net.2", "transformer.layers.{}.mlp.dense_4h_to_h"),
}
# Tensors of SAT files that no forward pass reads, and tables that are computed.
UNUSED = re.compile(r"transformer\.position_embeddings\.|freqs_sin$|freqs_cos$|embed_tokens")


def recognise(names: Iterable[str]) -> Layout:
    """The layout of a file's names. Raises UserError for what is no CogVideoX transformer."""
    names = {name.removeprefix(PREFIX) for name in names}
    if ttt_video.is_ours(names):
        return "ttt_video"
    signs: dict[Layout, str] = {
        "kinema": "modulate_out.weight",
        "diffusers": "norm_out.linear.weight",
        "sat": "mixins.final_layer.adaLN_modulation.1.weight",
    }
    for layout, sign in signs.items():
        if sign in names:
            return layout
    first = ", ".join(sorted(names)[:3])
    raise UserError(
        f"these are not weights of a CogVideoX transformer (names like {first}); give the transformer's file"
    )


def to_kinema(named: Iterable[tuple[str, Tensor]], layout: Layout, table: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream to kinema's names and brings its tensors into kinema's shapes.

    Names it does not know pass unchanged, so that loading can list them. `table` is whether the network learned its
    position table; the one in other networks' files is computed, and left out.
    """
    convert = {
        "kinema": _same,
        "diffusers": _from_diffusers,
        "sat": _from_sat,
        "ttt_video": ttt_video.to_kinema,
    }[layout]
    for name, tensor in convert(named):
        if name != "pos_table" or table:
            yield name, tensor


def from_kinema(
    named: Iterable[tuple[str, Tensor]], layout: Layout, size: CogVideoXSize
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_kinema`."""
    if layout == "kinema":
        yield from named
    elif layout == "sat":
        yield from _to_sat(named, size)
    elif layout == "ttt_video":
        yield from ttt_video.from_kinema(named, (size.in_channels, *size.patch[1:]))
    else:
        for name, tensor in named:
            if name == "patch_embed.weight" and size.patch[0] == 1:
                tensor = tensor.unflatten(1, (size.in_channels, *size.patch[1:]))  # a convolution in the 1.0 models
            yield diffusers_name(name), tensor


def diffusers_name(name: str) -> str:
    """diffusers' name of a tensor, or of a layer."""
    block, layer, leaf = _parts(name)
    if block is None:
        return TOP.get(layer, (layer, ""))[0] + leaf
    return f"transformer_blocks.{block}.{BLOCK.get(layer, (layer, ''))[0]}{leaf}"


def lora_from_sat(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The adapter matrices of a SAT file as `blocks.N.attn.q.lora_A` …, what is no adapter left out.

    SAT's alpha is 1, whatever the rank, and is not in the file.
    """
    pattern = r"(?:.*\.)?layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d)"
    for name, tensor in named:
        if match := re.fullmatch(pattern, name):
            block, fused, letter, part = match.groups()
            layer = "out" if fused == "dense" else "qkv"[int(part)]
            yield f"blocks.{block}.attn.{layer}.lora_{letter}", tensor


def size_of(shapes: Mapping[str, tuple[int, ...]], layout: Layout, config: Mapping[str, Any]) -> CogVideoXSize:
    """The size of a network, read from its tensors' shapes.

    What shapes do not show comes from `config`, with the keys of diffusers or kinema, or else is what the published
    network of that shape has. Raises UserError where the two disagree.
    """
    meta = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    there = {name: tuple(tensor.shape) for name, tensor in to_kinema(meta, layout)}
    try:
        dim, text_dim = there["text_embed.weight"]
        head_dim, time_dim = there["blocks.0.attn.norm_q.weight"][0], there["time_embed.0.weight"][0]
        features_in, features_out = there["patch_embed.weight"][1], there["proj_out.weight"][0]
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]}, read as layout {layout}; get the complete file") from None
    patch = _patch(config, features_out)
    grid = _grid(config, patch)
    out_channels, in_channels = features_out // math.prod(patch), features_in // math.prod(patch)
    coded = "pos_table" in there  # a SAT file has the computed table of 2B as well as the learned one of 5B-I2V
    table = config.get("table", config.get("use_learned_positional_embeddings", coded and in_channels > out_channels))
    rotary = config.get("use_rotary_positional_embeddings", table or not coded)
    tokens = 224 if layout == "sat" and patch[0] == 2 else 226
    size = CogVideoXSize(
        heads=dim // head_dim,
        layers=1 + max(int(name.split(".")[1]) for name in there if name.startswith("blocks.")),
        head_dim=head_dim,
        in_channels=in_channels,
        out_channels=out_channels,
        patch=patch,
        positions=config.get("positions", ("crop" if patch[0] == 1 else "slice") if rotary else "sincos"),
        table=table,
        grid=grid,
        time_dim=time_dim,
        ofs_dim=there.get("ofs_embed.0.weight", (0,))[0],
        ofs=config.get("ofs", 2.0),
        text_dim=text_dim,
        text_tokens=config.get("text_tokens", config.get("max_text_seq_length", tokens)),
        spatial_scale=config.get("spatial_scale", config.get("spatial_interpolation_scale", 1.875)),
        norm_eps=config.get("norm_eps", 1e-6 if layout == "ttt_video" else 1e-5),
    )
    for key, value in (diffusers_config(size) | asdict(size)).items():
        said = config.get(key)
        if key not in ("patch_bias", "sample_frames") and said is not None and _plain(said) != _plain(value):
            raise UserError(f"config.json says {key} {said}, but the tensors say {value}; one is of another model")
    return size


def diffusers_config(size: CogVideoXSize) -> dict[str, Any]:
    """config.json of diffusers' CogVideoXTransformer3DModel."""
    frames, rows, columns = size.grid
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": size.head_dim,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": size.in_channels,
        "max_text_seq_length": size.text_tokens,
        "norm_elementwise_affine": True,
        "norm_eps": size.norm_eps,
        "num_attention_heads": size.heads,
        "num_layers": size.layers,
        "ofs_embed_dim": size.ofs_dim or None,
        "out_channels": size.out_channels,
        "patch_bias": True,
        "patch_size": size.patch[1],
        "patch_size_t": None if size.patch[0] == 1 else size.patch[0],
        "sample_frames": 4 * (frames - 1) + 1,
        "sample_height": rows,
        "sample_width": columns,
        "spatial_interpolation_scale": size.spatial_scale,
        "temporal_compression_ratio": 4,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": size.text_dim,
        "time_embed_dim": size.time_dim,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": size.table,
        "use_rotary_positional_embeddings": size.positions != "sincos",
    }


def _same(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from named


def _from_diffusers(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    top, block = ({theirs: ours for ours, (theirs, _) in table.items()} for table in (TOP, BLOCK))
    for name, tensor in named:
        match = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
        assert match, name
        number, layer, leaf = match[1], match[2], match[3] or ""
        ours = f"blocks.{number}.{block.get(layer, layer)}" if number else top.get(layer, layer)
        yield ours + leaf, tensor.flatten(1) if ours == "patch_embed" and not leaf.endswith("bias") else tensor


def _from_sat(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    patterns: list[tuple[re.Pattern[str], tuple[str, ...]]]
    patterns = [(re.compile(re.escape(theirs)), (ours,)) for ours, (_, theirs) in TOP.items()]
    for theirs in dict.fromkeys(theirs for _, theirs in BLOCK.values()):
        fused = tuple(f"blocks.{{}}.{ours}" for ours, (_, other) in BLOCK.items() if other == theirs)
        patterns.append((re.compile(re.escape(theirs).replace(r"\{\}", r"(\d+)")), fused))
    for name, tensor in named:
        if name.startswith(("first_stage_model.", "conditioner.")) or UNUSED.search(name):
            continue
        match = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name.removeprefix(PREFIX))
        assert match, name
        layer, leaf = match[1], match[2] or ""
        for pattern, ours in patterns:
            if found := pattern.fullmatch(layer):
                for part, rows in zip(ours, _split(tensor, len(ours)), strict=True):
                    yield part.format(*found.groups()) + leaf, rows
                break
        else:
            yield name, tensor


def _to_sat(named: Iterable[tuple[str, Tensor]], size: CogVideoXSize) -> Iterator[tuple[str, Tensor]]:
    waiting: dict[str, dict[str, Tensor]] = {}  # SAT's name → the tensors of ours that it is made of, so far
    for name, tensor in named:
        block, layer, leaf = _parts(name)
        _, theirs = TOP[layer] if block is None else BLOCK[layer]
        theirs = PREFIX + theirs.format(block) + leaf
        needed = [ours for ours, (_, other) in BLOCK.items() if block is not None and other == BLOCK[layer][1]] or [
            layer
        ]
        there = waiting.setdefault(theirs, {})
        there[layer] = tensor
        if len(there) == len(needed):
            del waiting[theirs]
            yield theirs, _joined([there[ours] for ours in needed])
    if size.positions == "sincos":  # SAT keeps the computed table too
        code = positions.sincos(patch_counts(size.grid, size.patch), size.dim, size.spatial_scale)
        yield PREFIX + TOP["pos_table"][1], F.pad(code, (0, 0, size.text_tokens, 0))[None]


def _split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """SAT's tensor as the ones it was made of: itself, two modulations, or q, k and v."""
    if parts == 2:
        video_attn, video_mlp, text_attn, text_mlp = tensor.chunk(4)
        return torch.cat([video_attn, text_attn]), torch.cat([video_mlp, text_mlp])
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def _joined(parts: list[Tensor]) -> Tensor:
    """The inverse of `_split`."""
    if len(parts) == 2:
        (video_attn, text_attn), (video_mlp, text_mlp) = (part.chunk(2) for part in parts)
        parts = [video_attn, video_mlp, text_attn, text_mlp]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _parts(name: str) -> tuple[str | None, str, str]:
    """(number of the block, layer, ".weight" or ".bias") of one of kinema's names."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match, name
    return match[1], match[2], match[3] or ""


def _patch(config: Mapping[str, Any], features_out: int) -> tuple[int, int, int]:
    if "patch" in config:
        frames, rows, columns = config["patch"]
        return frames, rows, columns
    side = config.get("patch_size", 2)
    channels = config.get("out_channels", CHANNELS)
    return features_out // (channels * side * side), side, side


def _grid(config: Mapping[str, Any], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    if "grid" in config:
        frames, rows, columns = config["grid"]
        return frames, rows, columns
    frames, rows, columns = (13, 60, 90) if patch[0] == 1 else (21, 300, 300)  # as published
    frames = (config.get("sample_frames", 4 * frames - 3) - 1) // 4 + 1
    return frames, config.get("sample_height", rows), config.get("sample_width", columns)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
