"""URSA's video tokenizer, Cosmos' factorised autoencoder (arXiv 2501.03575) with FSQ: pixels to codes and back.

Parameter names are those of the released weights. Unusual: the encoder's time attention looks both ways, so the code of
an image alone is not the first of a clip, and a clip longer than `sample_frames` goes through it in tiles. Videos are
`[B, T, C, H, W]`, codes `[B, T', h, w]`.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import UsageError
from kinema.models.attention import attend
from kinema.models.layers import compute_dtype
from kinema.models.ursa.fsq import dequantise, quantise


@dataclass(frozen=True)
class FSQSize:
    """The dimensions of a video tokenizer; the defaults are those released. `sample_frames` is the length of a tile."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    patch_size: int = 4
    temporal_stride: int = 4
    spatial_stride: int = 8
    sample_frames: int = 17

    @property
    def codes(self) -> int:
        return math.prod(self.levels)


class FSQVideoTokenizer(nn.Module):
    """A factorised causal autoencoder on Haar patches whose latent vectors are rounded to codes."""

    def __init__(self, size: FSQSize):
        super().__init__()
        self.size = size
        self.encoder, self.decoder = Encoder(size), Decoder(size)
        self.quant_conv = Spatial(size.latent_channels, len(size.levels), 1)
        self.post_quant_conv = Spatial(len(size.levels), size.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes `[B, T', H/8, W/8]` of F = 4m + 1 frames in [-1, 1]. UsageError names lengths that tile."""
        return quantise(self.latents(pixels), self.size.levels)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels `[B, F, 3, H, W]`, not clamped."""
        return self.decode_values(dequantise(codes, self.size.levels))

    def latents(self, pixels: Tensor) -> Tensor:
        """The numbers `[B, T', h, w, d]` before they are bounded and rounded."""
        latent_frames(self.size, pixels.shape[1])
        tile = self.size.sample_frames
        starts = range(0, max(1, pixels.shape[1] - 1), tile - 1) if tile > 1 else range(pixels.shape[1])
        return torch.cat([self._encoded(pixels[:, start : start + tile]) for start in starts], dim=1)

    def decode_values(self, values: Tensor) -> Tensor:
        """Pixels of dequantised numbers `[B, T', h, w, d]`."""
        size = self.size
        pixel_frames(size, values.shape[1])
        made = []
        for tile in values.split((size.sample_frames - 1) // size.temporal_stride + 1, dim=1):
            x = self.post_quant_conv(tile.movedim(-1, 2).to(compute_dtype(self.post_quant_conv.weight)))
            frames = unpatch(self.decoder(x).transpose(1, 2), size.patch_size).transpose(1, 2)
            made.append(frames[:, size.patch_size - 1 + bool(made) :])
        return torch.cat(made, dim=1)

    def _encoded(self, pixels: Tensor) -> Tensor:
        x = patch(pixels.to(compute_dtype(self.quant_conv.weight)).transpose(1, 2), self.size.patch_size)
        return self.quant_conv(self.encoder(x.transpose(1, 2))).movedim(2, -1)


def latent_frames(size: FSQSize, frames: int) -> int:
    """How many latent frames a clip has. UsageError, with lengths that are possible, for one that cannot be tiled."""
    stride, tile = size.temporal_stride, size.sample_frames
    if frames <= tile and frames % stride == 1:
        return (frames - 1) // stride + 1
    if frames > tile and tile > 1 and (frames - 1) % (tile - 1) == 0:
        return (frames - 1) // (tile - 1) * ((tile - 1) // stride + 1)
    unit = stride if frames < tile else tile - 1
    below = max(1, frames - 1) // unit * unit + 1 if frames > 1 else 1
    above = below + unit
    raise UsageError(
        f"{frames} frames cannot be tokenized: use {below} or {above}, 1 + a multiple of {stride} up to {tile}, "
        f"the length of a tile, or 1 + a multiple of {tile - 1} beyond"
    )


def pixel_frames(size: FSQSize, latents: int) -> int:
    """How many frames so many latent frames decode to. UsageError for a length that no clip has."""
    tile = (size.sample_frames - 1) // size.temporal_stride + 1
    if latents <= tile:
        return (latents - 1) * size.temporal_stride + 1
    if latents % tile:
        below = latents // tile * tile
        raise UsageError(
            f"{latents} latent frames are of no clip of this tokenizer, whose tiles of {size.sample_frames} frames "
            f"have {tile} each: use {below} or {below + tile}, or a tokenizer with longer tiles"
        )
    return latents // tile * (size.sample_frames - 1) + 1


def haar(x: Tensor) -> Tensor:
    """One level of `[B, C, T, H, W]` to `[B, 8C, T/2, H/2, W/2]`, / 2√2; band 4·time + 2·height + width, 1 is high."""
    bands = [x]
    for dim in (2, 3, 4):
        pairs = [band.unflatten(dim, (-1, 2)).unbind(dim + 1) for band in bands]
        bands = [sign for a, b in pairs for sign in ((a + b), (a - b))]
    return torch.cat(bands, dim=1) / 8


def unhaar(x: Tensor) -> Tensor:
    """The inverse of `haar`."""
    bands = list(x.chunk(8, dim=1))
    for dim in (4, 3, 2):
        pairs = zip(bands[0::2], bands[1::2], strict=True)
        bands = [torch.stack([low + high, low - high], dim=dim + 1).flatten(dim, dim + 1) for low, high in pairs]
    return bands[0]


def patch(video: Tensor, size: int) -> Tensor:
    """log2(size) levels of `[B, C, 1 + size·m, H, W]`, the first frame repeated: `[B, C·size³, m + 1, …]`."""
    x = torch.cat([video[:, :, :1].expand(-1, -1, size - 1, -1, -1), video], dim=2)
    for _ in range(size.bit_length() - 1):
        x = haar(x)
    return x


def unpatch(x: Tensor, size: int) -> Tensor:
    """The inverse of `patch`, with the repeated frames."""
    for _ in range(size.bit_length() - 1):
        x = unhaar(x)
    return x


class Spatial(nn.Conv3d):
    """A 1 x k x k convolution of every frame of `[B, T, C, H, W]`."""

    def __init__(self, channels: int, out: int, k: int = 3, stride: int = 1, padding: int | None = None):
        super().__init__(channels, out, (1, k, k))
        self.step, self.pad = stride, k // 2 if padding is None else padding

    def forward(self, input: Tensor) -> Tensor:
        x = input.flatten(0, 1)
        y = F.conv2d(x, self.weight[:, :, 0], self.bias, self.step, self.pad)
        return y.unflatten(0, tuple(input.shape[:2]))


class Temporal(nn.Conv3d):
    """A 3 x 1 x 1 convolution of every place of `[B, T, C, H, W]` that sees no later frame; the first repeats before
    it.
    """

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__(channels, out, (3, 1, 1))
        self.step = stride

    def forward(self, input: Tensor) -> Tensor:
        before = input[:, :1].expand(-1, 3 - self.step, -1, -1, -1)
        x = torch.cat([before, input], dim=1).transpose(1, 2).flatten(3)
        y = F.conv2d(x, self.weight[..., 0], self.bias, (self.step, 1))
        return y.transpose(1, 2).unflatten(3, tuple(input.shape[3:]))


def pair(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(Spatial(channels, out), Temporal(out, out))


class FrameNorm(nn.GroupNorm):
    """A group norm of every frame by itself."""

    def __init__(self, channels: int):
        super().__init__(1, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).unflatten(0, tuple(input.shape[:2]))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(channels), pair(channels, out)
        self.norm2, self.conv2 = FrameNorm(out), pair(out, out)
        self.conv_shortcut = Spatial(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SelfAttention(nn.Module):
    """Single-head attention `x + out(attention(norm(x)))` among the places of a frame, or the frames of a place."""

    def __init__(self, channels: int, norm: nn.Module, over_time: bool = False):
        super().__init__()
        self.group_norm, self.over_time = norm, over_time
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[B, T, C, H, W]`, or `[B, C, H, W]`."""
        video = x if x.ndim == 5 else x[:, None]
        y = self.group_norm(x).view(video.shape).movedim(2, -1)  # B T H W C
        y = y.movedim(1, 3) if self.over_time else y.flatten(2, 3)[:, :, None]  # sequences on the next to last dim
        q, k, v = (part(y).flatten(0, -3)[:, None] for part in (self.to_q, self.to_k, self.to_v))
        z = self.to_out[0](attend(q, k, v)[:, 0].view(y.shape))
        z = z.movedim(3, 1) if self.over_time else z[:, :, 0].unflatten(2, tuple(video.shape[-2:]))
        return x + z.movedim(-1, 2).reshape(x.shape)


class Down(nn.Module):
    """Halves rows and columns, or frames, or both: a strided convolution plus the average, then a 1 x 1 x 1."""

    def __init__(self, channels: int, space: bool, time: bool):
        super().__init__()
        if space:
            self.conv1 = Spatial(channels, channels, stride=2, padding=0)
        if time:
            self.conv2 = Temporal(channels, channels, stride=2)
        if space or time:
            self.conv3 = Spatial(channels, channels, 1)
        self.space, self.time = space, time

    def forward(self, x: Tensor) -> Tensor:
        if self.space:
            mean = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, tuple(x.shape[:2]))
            x = self.conv1(F.pad(x, (0, 1, 0, 1))) + mean
        if self.time:
            x = torch.cat([x[:, :1], x], dim=1)
            x = self.conv2(x) + x.unflatten(1, (-1, 2)).mean(2)
        return self.conv3(x) if self.space or self.time else x


class Up(nn.Module):
    """Doubles frames (less the first), or rows and columns, or both: repetition plus its convolution, then 1x1x1."""

    def __init__(self, channels: int, space: bool, time: bool):
        super().__init__()
        if time:
            self.conv1 = Temporal(channels, channels)
        if space:
            self.conv2 = Spatial(channels, channels)
        if space or time:
            self.conv3 = Spatial(channels, channels, 1)
        self.space, self.time = space, time

    def forward(self, x: Tensor) -> Tensor:
        if self.time:
            x = x.repeat_interleave(2, dim=1)[:, 1:]
            x = self.conv1(x) + x
        if self.space:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = self.conv2(x) + x
        return self.conv3(x) if self.space or self.time else x


class Level(nn.Module):
    """ResBlocks, then a change of size; `word` is what the released names call it."""

    def __init__(self, resnets: list[nn.Module], resize: nn.Module | None, word: str, attentions: tuple = ()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.attended = bool(attentions)
        if resize is not None:
            self.add_module(word, nn.ModuleList([resize]))
        self.word = word if resize is not None else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.resnets):
            x = block(x)
            if self.attended:
                x = self.attentions[i](x)
        return self.get_submodule(f"{self.word}.0")(x) if self.word else x


class Middle(nn.Module):
    def __init__(self, first: nn.Module, attention: nn.Module, second: nn.Module):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList([first, second]), nn.ModuleList([attention])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def middle(channels: int) -> Middle:
    space, time = (SelfAttention(channels, FrameNorm(channels), over_time) for over_time in (False, True))
    return Middle(ResBlock(channels, channels), nn.Sequential(space, time), ResBlock(channels, channels))


class Encoder(nn.Module):
    def __init__(self, size: FSQSize):
        super().__init__()
        widths, depth = size.block_out_channels, size.layers_per_block
        space, time = (int(math.log2(s / size.patch_size)) for s in (size.spatial_stride, size.temporal_stride))
        self.conv_in = pair(3 * size.patch_size**3, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(itertools.pairwise(widths)):
            last = i == len(widths) - 2
            resize = None if last else Down(out, i < space, i < time)
            self.down_blocks.append(Level(_stack(width, out, depth), resize, "downsamplers"))
        self.mid_block = middle(widths[-1])
        self.conv_norm_out, self.conv_out = FrameNorm(widths[-1]), pair(widths[-1], size.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, size: FSQSize):
        super().__init__()
        widths, depth = size.block_out_channels[::-1], size.layers_per_block + 1
        space, time = (int(math.log2(s / size.patch_size)) for s in (size.spatial_stride, size.temporal_stride))
        self.conv_in = pair(size.latent_channels, widths[0])
        self.mid_block = middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(zip((widths[0], *widths), widths[:-1], strict=False)):
            grows = 0 < i <= time  # not the mirror image of the encoder: time starts at the second level
            wide = grows or (i < space and space > time)
            resize = None if i == len(widths) - 2 else Up(out, wide, grows)
            self.up_blocks.append(Level(_stack(width, out, depth), resize, "upsamplers"))
        self.conv_norm_out, self.conv_out = FrameNorm(widths[-2]), pair(widths[-2], 3 * size.patch_size**3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _stack(channels: int, out: int, depth: int) -> list[nn.Module]:
    return [ResBlock(channels if j == 0 else out, out) for j in range(depth)]
