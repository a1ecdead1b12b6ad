"""URSA's image tokenizer, a 2-D VQGAN with a learned codebook (IBQ, arXiv 2412.02692): images to codes and back.

Parameter names are those of the released weights. The frames of a video `[B, T, 3, H, W]` are images of their own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import compute_dtype
from kinema.models.ursa.tokenizer import Level, Middle, SelfAttention


@dataclass(frozen=True)
class IBQSize:
    """The dimensions of an image tokenizer with a learned codebook `[codes, code_dim]`."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    codes: int
    code_dim: int
    attention_down: bool = True
    attention_up: bool = False

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class IBQImageTokenizer(nn.Module):
    """A 2-D VQGAN whose code is the row of the codebook with the largest inner product; frames are images."""

    def __init__(self, size: IBQSize):
        super().__init__()
        self.size = size
        self.encoder, self.decoder = ImageEncoder(size), ImageDecoder(size)
        self.quant_conv = nn.Conv2d(size.latent_channels, size.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(size.code_dim, size.latent_channels, 1)
        self.quantizer = nn.ModuleDict({"embedding": nn.Embedding(size.codes, size.code_dim)})

    @property
    def codebook(self) -> Tensor:
        return self.quantizer["embedding"].weight  # type: ignore[return-value]

    def encode(self, pixels: Tensor) -> Tensor:
        z = self.latents(pixels).float()
        with torch.autocast(z.device.type, enabled=False):
            rows = [(part @ self.codebook.float().T).argmax(-1) for part in z.flatten(0, -2).split(1024)]
        return torch.cat(rows).view(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels, not clamped."""
        values = F.embedding(codes, self.codebook).movedim(-1, 2)
        x = self.post_quant_conv(values.flatten(0, 1).to(compute_dtype(self.post_quant_conv.weight)))
        return self.decoder(x).unflatten(0, tuple(codes.shape[:2]))

    def latents(self, pixels: Tensor) -> Tensor:
        """The vectors `[B, T, h, w, d]` that are looked up."""
        x = pixels.flatten(0, 1).to(compute_dtype(self.quant_conv.weight))
        return self.quant_conv(self.encoder(x)).movedim(1, -1).unflatten(0, tuple(pixels.shape[:2]))


class ImageResBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class ImageDown(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ImageUp(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ImageEncoder(nn.Module):
    def __init__(self, size: IBQSize):
        super().__init__()
        widths = size.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            blocks = _image_stack(widths[max(i - 1, 0)], out, size.layers_per_block)
            attended = _attentions(out, len(blocks)) if last and size.attention_down else ()
            self.down_blocks.append(Level(blocks, None if last else ImageDown(out), "downsamplers", attended))
        self.mid_block = image_middle(widths[-1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], size.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class ImageDecoder(nn.Module):
    def __init__(self, size: IBQSize):
        super().__init__()
        widths = size.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(size.latent_channels, widths[0], 3, padding=1)
        self.mid_block = image_middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            blocks = _image_stack(widths[max(i - 1, 0)], out, size.layers_per_block + 1)
            attended = _attentions(out, len(blocks)) if i == 0 and size.attention_up else ()
            resize = None if i == len(widths) - 1 else ImageUp(out)
            self.up_blocks.append(Level(blocks, resize, "upsamplers", attended))
        self.conv_norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def image_middle(channels: int) -> Middle:
    attention = SelfAttention(channels, group_norm(channels))
    return Middle(ImageResBlock(channels, channels), attention, ImageResBlock(channels, channels))


def _image_stack(channels: int, out: int, depth: int) -> list[nn.Module]:
    return [ImageResBlock(channels if j == 0 else out, out) for j in range(depth)]


def _attentions(channels: int, count: int) -> tuple[Any, ...]:
    return tuple(SelfAttention(channels, group_norm(channels)) for _ in range(count))
