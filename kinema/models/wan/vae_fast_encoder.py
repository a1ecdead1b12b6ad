"""The encoder of Wan's autoencoder as it runs fastest: diffusers' weights and its numbers, in another order of memory.

Channels come last from the first layer to the last; what is normed and activated is written where the next convolution
reads it, behind the frames kept from before. A video goes through by itself, its first frame alone and then as many
frames at once as their size says, so that its latents are a function of the video and of nothing else.

On CPUs convolutions over time are made of ones over space alone, which are five times as fast there, six of them for
four frames instead of twelve (`_InTime`). Shapes: T frames, H rows, W columns, C channels, `[T, H, W, C]`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import compiled, wide
from kinema.models.wan.vae import VideoAutoencoder
from kinema.models.wan.vae_fast import KEPT, gamma_of, matrix_of, normed

AT_ONCE = 16  # frames that are encoded at once, at the most
FILLING, CACHED = 1 << 22, 1 << 16  # pixels that they have: what fills a GPU, and what stays in a CPU's cache
LAST = torch.channels_last


class FastVideoEncoder(VideoAutoencoder):
    """Encodes as `VideoAutoencoder` does, up to rounding, each video of a batch by itself.

    fused  compile what is elementwise; else it runs in few passes over memory, one after the other
    """

    def __init__(self, network: nn.Module, pixels: int, fused: bool):
        super().__init__(network, pixels)
        self.encoder = FastEncoder(network, fused)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = torch.stack([self.encoder(video) for video in pixels]).chunk(2, dim=2)
        return mean, logvar.clamp(-30, 20)


class FastEncoder:
    """`encoder(pixels [T, 3, H, W])` gives the moments `[T', 2C, h, w]` of T = 1 + 4(T' - 1) frames."""

    def __init__(self, network: Any, fused: bool):
        self.how = FUSED if fused else WRITTEN_OUT
        encoder, mid = network.encoder, network.encoder.mid_block
        self.enter = _Conv(encoder.conv_in)
        blocks = [*encoder.down_blocks, mid.resnets[0]]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            blocks += [attention, resnet]
        self.layers = [LAYERS[type(block).__name__](block) for block in blocks]
        self.norm_out, self.leave = gamma_of(encoder.norm_out), _Conv(encoder.conv_out)
        self.quant = matrix_of(network.quant_conv)
        self.stride = 2 ** sum(network.config["temperal_downsample"])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        frames, _, height, width = pixels.shape
        kept: list[Tensor] = []
        made = [self._piece(pixels[:1], kept)]
        most = min(AT_ONCE, (FILLING if pixels.is_cuda else CACHED) // (height * width))
        for piece in pixels[1:].split(max(1, most // self.stride) * self.stride) if frames > 1 else ():
            made.append(self._piece(piece, kept))
        return torch.cat(made).permute(0, 3, 1, 2)

    def _piece(self, pixels: Tensor, kept: list[Tensor]) -> Tensor:
        """Moments `[T', h, w, 2C]` of the frames that follow those of which `kept` is left; replaces it."""
        memory, x = _Memory(kept), pixels.permute(0, 2, 3, 1)
        padded = self.enter.room(x, memory)
        padded[KEPT:, ..., : x.shape[-1]] = x
        state = self.enter(padded, memory)
        for layer in self.layers:
            state = layer(state, memory, self.how)
        padded = self.leave.room(state.raw, memory)
        self.how.activate(*state.parts, self.norm_out, padded[KEPT:])
        made = F.linear(summed(*self.leave(padded, memory).parts), *self.quant)
        kept[:] = memory.done
        return made


class _Pending:
    """A result whose bias and shortcut are still to be added, by whoever reads it."""

    def __init__(self, raw: Tensor, bias: Tensor | None, shortcut: Tensor | None = None):
        self.raw, self.parts = raw, (raw, bias, shortcut)


class _Memory:
    """The frames that the causal convolutions keep, in the order in which these run; `first`: there are none yet."""

    def __init__(self, kept: list[Tensor]):
        self.first = not kept
        self._old: Iterator[Tensor] = iter(kept)
        self.done: list[Tensor] = []

    def before(self) -> Tensor | None:
        return None if self.first else next(self._old)

    def after(self, frames: Tensor) -> None:
        self.done.append(frames.clone())


class _Conv:
    """A causal convolution over (3, 3, 3), of frames that lie behind those kept from before."""

    def __init__(self, conv: Any):
        weight, self.bias = conv.weight.detach(), conv.bias.detach()
        if weight.is_cuda:  # channels in multiples of 8 are what tensor cores take
            weight = F.pad(weight, (0, 0) * 3 + (0, -weight.shape[1] % 8))
        self.channels = weight.shape[1]
        self.alone = weight[:, :, -1].contiguous(memory_format=LAST)  # before a first frame there is nothing
        self.in_time = None if weight.is_cuda else _InTime(weight, self.bias)
        self.weight = weight.contiguous(memory_format=torch.channels_last_3d) if weight.is_cuda else weight

    def room(self, like: Tensor, memory: _Memory) -> Tensor:
        """Where the input `[T, H, W, C]` goes, `[KEPT + T, H, W, C']`, with the frames before it already there."""
        frames, height, width, channels = like.shape
        make = like.new_empty if channels == self.channels else like.new_zeros
        room = make((KEPT + frames, height, width, self.channels), dtype=self.weight.dtype)
        before = memory.before()
        room[:KEPT] = 0 if before is None else before
        return room

    def __call__(self, padded: Tensor, memory: _Memory) -> _Pending:
        memory.after(padded[-KEPT:])
        if memory.first:
            return _Pending(over_space(padded[KEPT:], self.alone, self.bias, padding=1), None)
        if self.in_time is not None:
            return _Pending(self.in_time(padded), None)
        made = F.conv3d(padded.permute(3, 0, 1, 2)[None], self.weight, padding=(0, 1, 1))
        return _Pending(made[0].permute(1, 2, 3, 0).contiguous(), self.bias)


class _InTime:
    """A convolution over (3, 3, 3), of `[2 + T, H, W, C]` to `[T, H, W, C']`, by convolutions over (3, 3).

    Over time it is a product of polynomials, and so known from its values at six places: at 0, 1, -1, 2, -2 and
    infinity, each of which one convolution makes of four frames (Winograd's F(4, 3), arXiv 1509.09308). What is left
    over of the frames, and all of them in a dtype too short for it, are channels of one convolution.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.bias, self.values = bias, []
        self.joined = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=LAST)
        if weight.dtype == wide(weight.dtype):
            places = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
            at = torch.tensor(places, dtype=torch.float64) / 24
            values = torch.einsum("pt,octyx->pocyx", at, weight.double()).to(weight.dtype)
            self.values = [value.contiguous(memory_format=LAST) for value in values]

    def __call__(self, x: Tensor) -> Tensor:
        frames = x.shape[0] - KEPT
        whole = frames // 4 * 4 if self.values else 0
        made = [self._fours(x[: whole + KEPT])] if whole else []
        if frames > whole:
            parts = [x[whole + i : frames + i] for i in range(1 + KEPT)]
            made.append(over_space(torch.cat(parts, dim=-1), self.joined, self.bias, padding=1))
        return torch.cat(made) if len(made) > 1 else made[0]

    def _fours(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = (x[i : len(x) + i - 5 : 4] for i in range(6))
        even, odd = torch.sub(e, c, alpha=4), torch.sub(d, b, alpha=4)
        near, twice = e - c, (d - b).mul_(2)
        at = [
            (even - c).add_(a, alpha=4),
            even + odd,
            even.sub_(odd),
            near + twice,
            near.sub_(twice),
            torch.add(f, d, alpha=-5).add_(b, alpha=4),
        ]
        # The bias at 1 alone is the bias of each frame.
        biases = [self.bias if place == 1 else None for place in range(6)]
        zero, one, minus, two, below, last = map(over_space, at, self.values, biases, [1] * 6)
        made = x.new_empty(len(x) - KEPT, *one.shape[1:])
        torch.add(one, minus, out=(ones := torch.empty_like(one)))
        torch.add(two, below, out=(twos := torch.empty_like(two)))
        one, two = one.sub_(minus), two.sub_(below)
        torch.add(ones, twos, out=made[0::4]).add_(zero)
        torch.add(one, two, alpha=2, out=made[1::4])
        torch.add(ones, twos, alpha=4, out=made[2::4])
        torch.add(one, two, alpha=8, out=made[3::4]).add_(last)
        return made


class _Residual:
    def __init__(self, block: Any):
        self.norm1, self.norm2 = gamma_of(block.norm1), gamma_of(block.norm2)
        self.conv1, self.conv2 = _Conv(block.conv1), _Conv(block.conv2)
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else matrix_of(block.conv_shortcut)

    def __call__(self, state: _Pending, memory: _Memory, how: "Elementwise") -> _Pending:
        padded = self.conv1.room(state.raw, memory)
        x = how.activate(*state.parts, self.norm1, padded[KEPT:])
        inner = self.conv1(padded, memory)
        padded = self.conv2.room(inner.raw, memory)
        how.activate(*inner.parts, self.norm2, padded[KEPT:])
        shortcut = x if self.shortcut is None else F.linear(x, *self.shortcut)
        return _Pending(*self.conv2(padded, memory).parts[:2], shortcut)


class _Attention:
    """Attention of a frame's places to each other, by one head, whose width no fused kernel takes."""

    def __init__(self, block: Any):
        self.norm = gamma_of(block.norm)
        self.qkv, self.proj = matrix_of(block.to_qkv), matrix_of(block.proj)

    def __call__(self, state: _Pending, memory: _Memory, how: "Elementwise") -> _Pending:
        x = summed(*state.parts)
        q, k, v = F.linear(normed(x, self.norm).to(x.dtype), *self.qkv).flatten(1, 2).chunk(3, dim=-1)
        shares = torch.softmax(torch.bmm(q * q.shape[-1] ** -0.5, k.mT), dim=-1)
        return _Pending(F.linear(torch.bmm(shares, v).view_as(x), *self.proj), None, x)


class _Down:
    """Half as many rows and columns, and, after the first frame, frames."""

    def __init__(self, block: Any):
        conv = block.resample[1]
        self.weight, self.bias = conv.weight.detach().contiguous(memory_format=LAST), conv.bias.detach()
        self.frames = None
        if block.mode == "downsample3d":
            weight = block.time_conv.weight.detach()[..., 0, 0]
            self.frames = weight.transpose(1, 2).flatten(1).contiguous(), block.time_conv.bias.detach()

    def __call__(self, state: _Pending, memory: _Memory, how: "Elementwise") -> _Pending:
        x = over_space(how.border(*state.parts), self.weight, self.bias, stride=2)
        if self.frames is None:
            return _Pending(x, None)
        before = memory.before()
        memory.after(x[-1:])
        if before is None:
            return _Pending(x, None)
        x = torch.cat([before, x])
        return _Pending(F.linear(torch.cat([x[:-1:2], x[1::2], x[2::2]], dim=-1), *self.frames), None)


LAYERS = {"WanResidualBlock": _Residual, "WanAttentionBlock": _Attention, "WanResample": _Down}


def over_space(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    made = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding)
    return made.permute(0, 2, 3, 1).contiguous()


# --- what is elementwise ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elementwise:
    """activate  raw + bias + shortcut, returned, which may be `raw`; it normed and activated goes to the last argument
    border    the same sum with a row and a column of zeros behind it
    """

    activate: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
    border: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def summed(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
    for other in (bias, shortcut):
        raw = raw if other is None else raw + other
    return raw


def activated(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, out: Tensor) -> Tensor:
    x = raw.to(wide(raw.dtype))
    x = summed(x, bias, shortcut).to(raw.dtype)
    out.copy_(F.silu(normed(x, gamma)))
    return x


def bordered(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
    return F.pad(summed(raw.to(wide(raw.dtype)), bias, shortcut).to(raw.dtype), (0, 0, 0, 1, 0, 1))


def activated_in_place(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, out: Tensor) -> Tensor:
    """`activated` in as few passes as there are without a compiler; the sum is `raw`, overwritten."""
    for other in (bias, shortcut):
        raw = raw if other is None else raw.add_(other)
    x = raw.to(wide(raw.dtype))
    y = out if out.dtype == x.dtype else torch.empty_like(x)
    torch.div(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12), out=y)
    F.silu(y.mul_(x.shape[-1] ** 0.5 * gamma.to(x.dtype)), inplace=True)
    if y is not out:
        out.copy_(y)
    return raw


def _fused_activated(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, out: Tensor) -> Tensor:
    """As one program for all sizes of frames, from the first on, so that no number depends on which came first."""
    rows = [None if x is None else x.flatten(0, 2) for x in (raw, shortcut, out)]
    for x in rows:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch._dynamo.mark_static(x, 1)
    return compiled(activated)(rows[0], bias, rows[1], gamma, rows[2]).view_as(raw)


def _fused_bordered(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
    for x in (raw, shortcut):
        if x is not None:
            torch._dynamo.mark_static(x, x.ndim - 1)
    return compiled(bordered)(raw, bias, shortcut)


WRITTEN_OUT = Elementwise(activated_in_place, bordered)
FUSED = Elementwise(_fused_activated, _fused_bordered)
