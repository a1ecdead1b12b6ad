"""The names that the public code of arXiv 2504.05298 gives to a CogVideoX with TTT layers, to and from kinema's.

Its checkpoints are flat (`dit.…`, converted) or nested (`model.dit.…`, saved in training). Rows are in the same order
and nothing is fused; of the rates it keeps one dim more. Biases and weights share the names of their layers.
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from kinema.errors import UserError

PREFIX = re.compile(r"(model\.)?dit\.")
SIGN = "final_layer.adaLN_modulation.1.weight"

TOP = {
    "patch_embed": "patch_embedding.vid_proj",
    "text_embed": "patch_embedding.text_proj",
    "time_embed.0": "time_embed.0",
    "time_embed.2": "time_embed.2",
    "norm_final": "transformer_norm",
    "norm_out": "final_layer.norm",
    "modulate_out": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_INNER = "seq_modeling_block.ssm.ttt."
BLOCK = {
    "norm_attn": "pre_seq_layernorm",
    "norm_mlp": "pre_mlp_layernorm",
    "modulate_attn": "pre_seq_adaLN_modulation.1",
    "modulate_mlp": "pre_mlp_adaLN_modulation.1",
    **{
        f"attn.{ours}": f"seq_modeling_block.{theirs}"
        for ours, theirs in (*zip("qkv", "qkv", strict=True), ("out", "o"))
    },
    "attn.norm_q": "seq_modeling_block.q_norm",
    "attn.norm_k": "seq_modeling_block.k_norm",
    "mlp.up": "mlp.layer1",
    "mlp.down": "mlp.layer2",
    **{f"mixer.to_{letter}": f"{_INNER}w{letter}" for letter in "qkv"},
    "mixer.to_out": f"{_INNER}wo",
    "mixer.out_norm": f"{_INNER}post_norm",
}
# of whole tensors
TENSORS = {
    "mixer.target_norm.weight": f"{_INNER}ttt_norm_weight",
    "mixer.target_norm.bias": f"{_INNER}ttt_norm_bias",
    "mixer.lr.weight": f"{_INNER}learnable_ttt_lr_weight",
    "mixer.lr.bias": f"{_INNER}learnable_ttt_lr_bias",
    **{f"mixer.{name}": f"{_INNER}{name}" for name in ("W1", "b1", "W2", "b2")},
    **{
        f"mixer.gate.{way}_{part}": f"seq_modeling_block.{way}_ssm_gating_{part}.gating_alpha"
        for way in ("forward", "backward")
        for part in ("video", "text")
    },
}


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are names of this layout, flat or nested."""
    return any(PREFIX.sub("", name, count=1) == SIGN and PREFIX.match(name) for name in names)


def to_kinema(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names it does not know pass unchanged, so that loading can list them."""
    top, block, tensors = ({theirs: ours for ours, theirs in table.items()} for table in (TOP, BLOCK, TENSORS))
    for name, tensor in named:
        match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?", PREFIX.sub("", name, count=1))
        assert match, name
        number, layer, leaf = match[1], match[2], match[3] or ""
        if number is None:
            ours = top[layer] + leaf if layer in top else name
            yield ours, tensor.flatten(1) if ours == "patch_embed.weight" else tensor  # there a convolution
        elif layer in block:
            yield f"blocks.{number}.{block[layer]}{leaf}", tensor
        elif layer in tensors and not leaf:
            ours = tensors[layer]
            yield f"blocks.{number}.{ours}", tensor.squeeze(1) if ours.startswith("mixer.lr.") else tensor
        else:
            yield name, tensor


def from_kinema(named: Iterable[tuple[str, Tensor]], patch: tuple[int, int, int]) -> Iterator[tuple[str, Tensor]]:
    """The inverse, flat. UserError for a tensor that the public code has no place for.

    `patch` are the (channels, rows, columns) that a token is made of.
    """
    for name, tensor in named:
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
        assert match, name
        number, layer, leaf = match[1], match[2], match[3] or ""
        if number is None and layer in TOP:
            yield f"dit.{TOP[layer]}{leaf}", tensor.unflatten(1, patch) if name == "patch_embed.weight" else tensor
        elif layer + leaf in TENSORS:
            theirs = f"dit.layers.{number}.{TENSORS[layer + leaf]}"
            yield theirs, tensor.unsqueeze(1) if layer == "mixer.lr" else tensor
        elif layer in BLOCK:
            yield f"dit.layers.{number}.{BLOCK[layer]}{leaf}", tensor
        else:
            raise UserError(
                f"layout ttt_video has no name for {name}; it is for CogVideoX-5B with ttt_linear or ttt_mlp"
            )
