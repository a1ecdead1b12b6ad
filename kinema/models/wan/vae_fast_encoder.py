"""The encoder of Wan's autoencoder as it runs fastest: diffusers' weights and its numbers, in another order of memory.

Channels come last from the first layer to the last; what is normed and activated is written where the next convolution
reads it, behind the frames kept from before. A video goes through by itself, its first frame alone and then as many
frames at once as their size says, so that its latents are a function of the video and of nothing else.

On CPUs convolutions over time are made of ones over space alone, which are five times as fast there, six of them for
four frames instead of twelve (`_InTime`). Shapes: T frames, H rows, W columns, C channels, `[T, H, W, C]`.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import compiled, wide
from kinema.models.wan.vae import VideoAutoencoder
from kinema.models.wan.vae_fast import KEPT, gamma_of, matrix_of, normed

AT_ONCE = 16  # frames that are encoded at once, at the most
FILLING, CACHED = 1 << 22, 1 << 16  # pixels that they have: what fills a GPU, and what stays in a CPU's cache
NEAR = 1 << 17  # numbers of a step of a convolution, the nearest cache's
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
        self.activate: Activate = _fused_activated if fused else activated_in_place
        encoder, mid = network.encoder, network.encoder.mid_block
        self.enter = _Conv(encoder.conv_in)
        blocks = [*encoder.down_blocks, mid.resnets[0]]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            blocks += [attention, resnet]
        self.layers: list[Layer] = [LAYERS[type(block).__name__](block) for block in blocks]
        self.norm_out, self.leave = gamma_of(encoder.norm_out), _Conv(encoder.conv_out)
        self.quant = matrix_of(network.quant_conv)
        self.stride = 2 ** sum(network.config["temperal_downsample"])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        frames, _, height, width = pixels.shape
        memory = _Memory()
        made = [self._piece(pixels[:1], memory)]
        most = min(AT_ONCE, (FILLING if pixels.is_cuda else CACHED) // (height * width))
        for piece in pixels[1:].split(max(1, most // self.stride) * self.stride) if frames > 1 else ():
            made.append(self._piece(piece, memory))
        return torch.cat(made).permute(0, 3, 1, 2)

    def _piece(self, pixels: Tensor, memory: "_Memory") -> Tensor:
        """Moments `[T', h, w, 2C]` of the frames that follow those of which `memory` keeps the last."""
        x = pixels.permute(0, 2, 3, 1)
        padded = self.enter.room(x, memory)
        padded[..., x.shape[-1] :] = 0
        padded[KEPT:, ..., : x.shape[-1]] = x
        state = self.enter(padded, memory)
        for layer in self.layers:
            state = layer(state, memory, self.activate)
        padded = self.leave.room(state.raw, memory)
        self.activate(*state.parts, self.norm_out, padded[KEPT:])
        made = summed(*self.leave(padded, memory).parts)
        memory.turn()
        return F.linear(made, *self.quant)


class _Pending:
    """A result whose bias and shortcut are still to be added, by whoever reads it."""

    def __init__(self, raw: Tensor, bias: Tensor | None, shortcut: Tensor | None = None):
        self.raw = raw
        self.parts: tuple[Tensor, Tensor | None, Tensor | None] = (raw, bias, shortcut)


class _Scratch:
    """Memory for what the next convolution reads and nobody after it: always the same, as new memory takes time."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def __call__(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self.flat.numel() < prod(shape) or (self.flat.dtype, self.flat.device) != (like.dtype, like.device):
            self.flat = like.new_empty(prod(shape))
        return self.flat[: prod(shape)].view(shape)


class _Memory:
    """The frames that the causal convolutions keep, in the order in which these run; `first`: there are none yet."""

    def __init__(self) -> None:
        self.first, self.scratch = True, _Scratch()
        self._old: Iterator[Tensor] = iter(())
        self._new: list[Tensor] = []

    def before(self) -> Tensor | None:
        return None if self.first else next(self._old)

    def after(self, frames: Tensor) -> None:
        self._new.append(frames.clone())

    def turn(self) -> None:
        """What was kept of the piece that ends is what the next one finds."""
        self.first, self._old, self._new = False, iter(self._new), []


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
        room = memory.scratch((KEPT + like.shape[0], *like.shape[1:3], self.channels), self.weight)
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
        made = x.new_empty(frames, *x.shape[1:3], len(self.bias))
        step = 4 * max(1, NEAR // x[0].numel())
        for begin in range(0, whole, step):
            end = min(whole, begin + step)
            self._fours(x[begin : end + KEPT], made[begin:end])
        if frames > whole:
            parts = [x[whole + i : frames + i] for i in range(1 + KEPT)]
            made[whole:] = over_space(torch.cat(parts, dim=-1), self.joined, self.bias, padding=1)
        return made

    def _fours(self, x: Tensor, made: Tensor) -> None:
        """Writes four frames for each four of `x` after the first two."""

        def value(place: int, frames: Tensor) -> Tensor:
            # The bias at 1 alone is the bias of each frame.
            return over_space(frames, self.values[place], self.bias if place == 1 else None, padding=1)

        def pair(place: int, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
            """Sum and difference of the values at a place and at its negative."""
            one, other = value(place, even + odd), value(place + 1, even.sub_(odd))
            return one + other, one.sub_(other)

        a, b, c, d, e, f = (x[i : len(x) + i - 5 : 4] for i in range(6))
        first, second, third, fourth = (made[i::4] for i in range(4))
        ones, one = pair(1, torch.sub(e, c, alpha=4), torch.sub(d, b, alpha=4))
        twos, two = pair(3, e - c, (d - b).mul_(2))
        torch.add(ones, twos, out=first).add_(value(0, torch.sub(e, c, alpha=5).add_(a, alpha=4)))
        torch.add(one, two, alpha=2, out=second)
        torch.add(ones, twos, alpha=4, out=third)
        torch.add(one, two, alpha=8, out=fourth).add_(value(5, torch.sub(f, d, alpha=5).add_(b, alpha=4)))


class _Residual:
    def __init__(self, block: Any):
        self.norm1, self.norm2 = gamma_of(block.norm1), gamma_of(block.norm2)
        self.conv1, self.conv2 = _Conv(block.conv1), _Conv(block.conv2)
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else matrix_of(block.conv_shortcut)

    def __call__(self, state: _Pending, memory: _Memory, activate: "Activate") -> _Pending:
        padded = self.conv1.room(state.raw, memory)
        x = activate(*state.parts, self.norm1, padded[KEPT:])
        inner = self.conv1(padded, memory)
        padded = self.conv2.room(inner.raw, memory)
        activate(*inner.parts, self.norm2, padded[KEPT:])
        shortcut = x if self.shortcut is None else F.linear(x, *self.shortcut)
        return _Pending(*self.conv2(padded, memory).parts[:2], shortcut)


class _Attention:
    """Attention of a frame's places to each other, by one head, whose width no fused kernel takes."""

    def __init__(self, block: Any):
        self.norm = gamma_of(block.norm)
        self.qkv, self.proj = matrix_of(block.to_qkv), matrix_of(block.proj)

    def __call__(self, state: _Pending, memory: _Memory, activate: "Activate") -> _Pending:
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

    def __call__(self, state: _Pending, memory: _Memory, activate: "Activate") -> _Pending:
        x = over_space(bordered(*state.parts, memory.scratch), self.weight, self.bias, stride=2)
        if self.frames is None:
            return _Pending(x, None)
        before = memory.before()
        memory.after(x[-1:])
        if before is None:
            return _Pending(x, None)
        x = torch.cat([before, x])
        return _Pending(F.linear(torch.cat([x[:-1:2], x[1::2], x[2::2]], dim=-1), *self.frames), None)


Layer = Callable[[_Pending, _Memory, "Activate"], _Pending]
LAYERS: dict[str, Callable[[Any], Layer]] = {
    "WanResidualBlock": _Residual,
    "WanAttentionBlock": _Attention,
    "WanResample": _Down,
}


def over_space(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    made = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding)
    return made.permute(0, 2, 3, 1).contiguous()


# --- what is elementwise ---------------------------------------------------------------------------------------------

Activate = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], Tensor]


def summed(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
    for other in (bias, shortcut):
        raw = raw if other is None else raw + other
    return raw


def bordered(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None, scratch: _Scratch) -> Tensor:
    """The sum with a row and a column of zeros behind it, which a convolution of every second place reads."""
    frames, height, width, channels = raw.shape
    made = scratch((frames, height + 1, width + 1, channels), raw)
    made[:, height:] = 0
    made[:, :, width:] = 0
    torch.add(summed(raw, bias, None), 0 if shortcut is None else shortcut, out=made[:, :height, :width])
    return made


def activated(raw: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor, out: Tensor) -> Tensor:
    """raw + bias + shortcut; it normed and activated is written to `out`."""
    x = summed(raw.to(wide(raw.dtype)), bias, shortcut).to(raw.dtype)
    out.copy_(F.silu(normed(x, gamma)))
    return x


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
