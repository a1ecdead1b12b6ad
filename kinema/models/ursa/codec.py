"""URSA's frozen tokenizers as codecs: pixels to codes and back, whichever of the two is in the folder.

Codes are int64 `[B, T', h, w]`; pixels `[B, T, 3, H, W]` in [-1, 1].
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.sizes import check_sides
from kinema.models.ursa.fsq import straight_through
from kinema.models.ursa.image_tokenizer import IBQImageTokenizer, IBQSize
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer, latent_frames, pixel_frames
from kinema.models.weights import load_into, open_weights, save, self_made

SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "patch_size", "temporal_stride", "spatial_stride")


@dataclass(frozen=True)
class URSACodec:
    """Where a tokenizer is and how it is computed.

    path     a pipeline's folder (with `vae/`) or the tokenizer's own
    compute  dtype of its network
    pixels   how large a frame, over the batch, it takes at once; larger batches go through it in parts
    """

    path: str
    compute: Literal["float32", "bfloat16"] = "float32"
    pixels: int = 320 * 512

    @property
    def size(self) -> FSQSize | IBQSize:
        """What the tokenizer's config.json states; reads no weights."""
        opened = open_weights(self.path, "vae")
        return size_of(opened.config, str(opened.path))

    def load(self, device: torch.device | str) -> "TokenCodec":
        """Raises UserError if there is no tokenizer at `path`, one of another kind, or its files are damaged."""
        opened = open_weights(self.path, "vae")
        size = size_of(opened.config, str(opened.path))
        with torch.device("meta"):
            network = FSQVideoTokenizer(size) if isinstance(size, FSQSize) else IBQImageTokenizer(size)
        source = f"{opened.path}, read as URSA's {type(network).__name__}"
        load_into(network, opened, device, getattr(torch, self.compute), source)
        return TokenCodec(network.eval().requires_grad_(False), self.pixels)


class TokenCodec:
    """An opened tokenizer of `codes` codes."""

    def __init__(self, network: FSQVideoTokenizer | IBQImageTokenizer, pixels: int):
        self.network, self.pixels, self.codes = network, pixels, network.size.codes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return latent_shape(self.network.size, frames, height, width)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.latent_shape(pixels.shape[1], *pixels.shape[3:])
        with torch.autocast(pixels.device.type, enabled=False):  # codes are data: the same whatever they are made for
            parts = pixels.split(max(1, self.pixels // pixels[0, 0, 0].numel()))
            return torch.cat([self.network.encode(part) for part in parts])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1], float32. UserError for codes that are none, or of a length that no clip has."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            low, high = int(codes.min()), int(codes.max())
            raise UserError(f"codes go from {low} to {high}, but this tokenizer has 0 to {self.codes - 1}; use its own")
        if isinstance(self.network.size, FSQSize):
            pixel_frames(self.network.size, codes.shape[1])
        area = codes[0, 0].numel() * self.network.size.spatial_stride**2
        with torch.autocast(codes.device.type, enabled=False):
            parts = codes.split(max(1, self.pixels // area))
            return torch.cat([self.network.decode(part).float().clamp(-1, 1) for part in parts])


def latent_shape(size: FSQSize | IBQSize, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T', h, w) of a video's codes. For sizes it cannot have, UsageError names the nearest it can."""
    unit = size.spatial_stride
    check_sides(height, width, unit)
    return latent_frames(size, frames) if isinstance(size, FSQSize) else frames, height // unit, width // unit


@dataclass(frozen=True)
class FSQTraining:
    """A video tokenizer as a network that learns, from nothing: for tiny worlds."""

    size: FSQSize
    seed: int = 0

    def build(self) -> FSQVideoTokenizer:
        with torch.device("meta"):
            return FSQVideoTokenizer(self.size)

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        return load_into(module, self_made(lambda: FSQVideoTokenizer(self.size), self.seed).items(), device)

    def read(self, module: nn.Module) -> "LearningTokenizer":
        assert isinstance(module, FSQVideoTokenizer)
        return LearningTokenizer(module)

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Writes `folder/vae` in the released layout."""
        named = ((name, tensor.to(dtype)) for name, tensor in module.state_dict().items())
        return save(folder / "vae", named, {"config.json": config_of(self.size)}, stem="diffusion_pytorch_model")


class LearningTokenizer:
    """Rounds with the gradient of the bound, so that encoder and decoder learn together."""

    def __init__(self, network: FSQVideoTokenizer):
        self.network = network

    def latents(self, pixels: Tensor) -> Tensor:
        return self.network.latents(pixels)

    def rounded(self, latents: Tensor) -> Tensor:
        return straight_through(latents, self.network.size.levels)

    def reconstruct(self, values: Tensor) -> Tensor:
        return self.network.decode_values(values)


def size_of(config: dict[str, Any], source: str) -> FSQSize | IBQSize:
    """The size that a tokenizer's config.json states; what it does not state is not guessed."""
    video = "patch_size" in config
    wanted: Iterable[str] = (*SIZES, "sample_frames") if video else (*SIZES[:3], "num_vq_embeddings", "vq_embed_dim")
    if missing := [name for name in wanted if name not in config]:
        raise UserError(f"the config.json of {source} lacks {', '.join(missing)}; it is of no tokenizer of URSA's")
    shared = {name: config[name] for name in SIZES[1:3]} | {"block_out_channels": tuple(config["block_out_channels"])}
    if not video:
        attention = {f"attention_{word}": config.get(f"attn_{word}_block", word == "down") for word in ("down", "up")}
        return IBQSize(codes=config["num_vq_embeddings"], code_dim=config["vq_embed_dim"], **shared, **attention)
    levels = tuple(config.get("levels", FSQSize.levels))
    if config.get("num_vq_embeddings", math.prod(levels)) != math.prod(levels):
        raise UserError(
            f"the config.json of {source} states {config['num_vq_embeddings']} codes, but levels {levels} make "
            f"{math.prod(levels)}; add the levels of this tokenizer"
        )
    return FSQSize(levels=levels, **shared, **{name: config[name] for name in (*SIZES[3:], "sample_frames")})


def config_of(size: FSQSize) -> dict[str, Any]:
    """config.json of a video tokenizer, with the levels beside the released keys."""
    config = {**asdict(size), "_class_name": "AutoencoderVQCosmos3D", "in_channels": 3, "out_channels": 3}
    return config | {"num_vq_embeddings": size.codes, "vq_embed_dim": len(size.levels)}
