"""The names URSA's tensors go by: the released ones, which are Qwen3's with a head of codes, and kinema's.

kinema calls the layers `blocks` and leaves out `model.`, as for every backbone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.models.ursa.transformer import URSASize

Layout = Literal["kinema", "ursa", "qwen3"]

# What training wrappers leave in names.
WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
CONFIG = {  # transformer/config.json
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
    "lm_head_size": "codes",
    "lm_vocab_size": "words",
    "bov_token_id": "bov",
    "rope_theta": "theta",
}


def recognise(names: Iterable[str]) -> Layout:
    """The layout of a file's names; a file in the released layout may be a text-only Qwen3, which shapes tell."""
    clean = {strip(name) for name in names}
    if "model.embed_tokens.weight" in clean:
        return "ursa" if "lm_head.weight" in clean else "qwen3"
    if "embed_tokens.weight" in clean and "blocks.0.self_attn.q_norm.weight" in clean:
        return "kinema"
    first = ", ".join(sorted(clean)[:3])
    raise UserError(f"these are not weights of a URSA transformer (names like {first}); give the transformer's file")


def strip(name: str) -> str:
    """A name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def to_kinema(named: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream to kinema's names. Names it does not know pass unchanged."""
    for name, tensor in named:
        name = strip(name)
        yield (name if layout == "kinema" else re.sub(r"^layers\.", "blocks.", name.removeprefix("model."))), tensor


def from_kinema(name: str, layout: Layout) -> str:
    """The name a tensor has in another layout."""
    if layout == "kinema" or name.startswith("lm_head."):
        return name
    return "model." + re.sub(r"^blocks\.", "layers.", name)


def size_of(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> URSASize:
    """The size of a network: from its tensors' shapes (names of any layout) and, for what they do not show, its config.

    Raises UserError where the two disagree: in particular a head whose rows are not the codes that the config states.
    """
    shapes = {name: shape for name, shape in _renamed(shapes)}
    try:
        vocabulary, dim = shapes["embed_tokens.weight"]
        rows = shapes["lm_head.weight"][0]
        head_dim = shapes["blocks.0.self_attn.q_norm.weight"][0]
        width, kv_width = (shapes[f"blocks.0.self_attn.{part}_proj.weight"][0] for part in "qk")
        ffn_dim = shapes["blocks.0.mlp.gate_proj.weight"][0]
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]}; get the complete file of a URSA transformer") from None
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    said = {ours: config[theirs] for theirs, ours in CONFIG.items() if theirs in config} | dict(config)
    for key in ("words", "bov"):
        if key not in said:
            raise UserError(f"{key} is not in the tensors; put the transformer's config.json beside the weights")
    codes = said.get("codes", rows)
    head = "codes" if rows == codes else "full"
    masked = bool(said.get("masked", False))
    if rows not in (codes, said["words"] + codes) or vocabulary != said["words"] + codes + masked:
        raise UserError(
            f"config.json says {codes} codes and {said['words']} words, but the head has {rows} rows and the embedding "
            f"{vocabulary}; one is of another model"
        )
    size = URSASize(
        dim=dim,
        ffn_dim=ffn_dim,
        heads=width // head_dim,
        kv_heads=kv_width // head_dim,
        layers=layers,
        codes=codes,
        words=said["words"],
        bov=said["bov"],
        head_dim=head_dim,
        theta=said.get("theta", 1e6),
        text_len=said.get("text_len", 320),
        head=head,
        masked=masked,
    )
    for key, value in asdict(size).items():
        if key in said and said[key] != value:
            raise UserError(f"config.json says {key} {said[key]}, but the tensors say {value}; one is of another model")
    return size


def config_of(size: URSASize) -> dict[str, Any]:
    """config.json of the released checkpoints."""
    values = asdict(size)
    config: dict[str, Any] = {"_class_name": "URSATransformer3DModel"}
    config |= {theirs: values[ours] for theirs, ours in CONFIG.items()}
    return config | {"max_window_layers": size.layers, "vocab_size": size.vocabulary}


def from_language_model(
    named: Iterable[tuple[str, Tensor]], fresh: Mapping[str, Tensor], words: int
) -> Iterator[tuple[str, Tensor]]:
    """A stream of a Qwen3 language model's tensors as a URSA network's to begin training with.

    Its embedding, padded beyond the vocabulary, gives the first `words` rows; the codes' rows and the head are `fresh`,
    by kinema's names.
    """
    for name, tensor in to_kinema(named, "qwen3"):
        if name == "embed_tokens.weight":
            yield name, torch.cat([tensor[:words], fresh[name][words:].to(tensor.dtype)])
        elif name != "lm_head.weight":
            yield name, tensor
    yield "lm_head.weight", fresh["lm_head.weight"]


def _renamed(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        name = strip(name).removeprefix("model.")
        yield re.sub(r"^layers\.", "blocks.", name), shape


def rows_of_embedding(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return dict(_renamed(shapes))["embed_tokens.weight"][0]
