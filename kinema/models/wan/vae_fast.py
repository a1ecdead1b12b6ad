"""The decoder of Wan's autoencoder as it runs fastest: diffusers' weights and its numbers, in another order of memory.

Channels come last from the first layer to the last, as the convolutions of GPUs want them; each normalisation, its
activation, the sum before it and the frames kept from before it are one pass over memory, which writes what the next
convolution reads; and nothing is enlarged before it is convolved: a 3 x 3 convolution of an image with doubled pixels
is one of the image itself that makes four pixels of each. Shapes: `[B, T, H, W, C]`, contiguous.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import compiled, kernels_run, wide
from kinema.models.wan.vae import VideoAutoencoder

KEPT = 2  # frames a convolution over three remembers
BESIDE = 96  # on CUDA, of so many channels or fewer are convolutions whose frames lie beside each other


class FastVideoAutoencoder(VideoAutoencoder):
    """Decodes as `VideoAutoencoder` does, up to rounding; the first latent alone, then up to `group` at once.

    fused  compile what is elementwise, or take `vae_kernels` where they run; else the same functions run as written
    """

    def __init__(self, network: nn.Module, pixels: int, group: int = 3, fused: bool = True):
        super().__init__(network, pixels, group)
        self.decoder = FastDecoder(network, fused)

    def _pieces(self, z: Tensor, kept: list, begin: int) -> Tensor:
        return self.decoder(z, kept, begin == 0)


class FastDecoder:
    """`decoder(z [B, C, T, h, w], kept, first)` gives pixels `[B, 3, T', H, W]` and replaces what is kept."""

    def __init__(self, network: Any, fused: bool):
        self.fused = fused
        decoder = network.decoder
        self.kernels: dict[Any, Any] = {}  # by the functions for which they stand
        if fused and kernels_run(decoder.conv_in.weight.device, decoder.conv_in.weight.dtype):
            from kinema.models.wan.vae_kernels import KERNELS

            self.kernels = KERNELS
        self.post = matrix_of(network.post_quant_conv)
        self.enter = _Conv(decoder.conv_in)
        mid = decoder.mid_block
        first, attention, second = mid.resnets[0], mid.attentions[0], mid.resnets[1]
        self.layers: list[_Residual | _Attention | _Up] = [_Residual(first), _Attention(attention), _Residual(second)]
        for block in decoder.up_blocks:
            self.layers += [_Residual(resnet) for resnet in block.resnets]
            self.layers += [_Up(up) for up in block.upsamplers or ()]
        self.norm_out, self.leave = gamma_of(decoder.norm_out), _Conv(decoder.conv_out)

    @torch.no_grad()
    def __call__(self, z: Tensor, kept: list, first: bool) -> Tensor:
        memory = _Memory(kept)
        x = F.linear(z.permute(0, 2, 3, 4, 1).contiguous(), *self.post)
        padded, last = _after(memory.before(x), x, self.enter.beside)
        memory.after(last)
        state = _Pending(self.enter(padded), self.enter.bias)
        for layer in self.layers:
            state = layer(state, memory, first, self._run)
        before = memory.before(state.raw, state.fine)
        padded, last = self._run(passed, *state.parts, self.norm_out, before, state.fine, self.leave.beside)
        memory.after(last)
        made = self._run(finished, self.leave(padded), self.leave.bias)
        kept[:] = memory.done
        return made.permute(0, 4, 1, 2, 3)

    def _run(self, function: Any, *args: Any) -> Any:
        if not self.fused:
            return function(*args)
        if function in self.kernels:
            return self.kernels[function](*args)
        for x in args:  # one program for all sizes of frames, but not for all numbers of channels, which it sums over
            if isinstance(x, Tensor):
                torch._dynamo.mark_static(x, x.ndim - 1)
        return compiled(function)(*args)


class _Pending:
    """A result whose bias and shortcut are still to be added, by whoever reads it; `fine`: of four pixels each."""

    def __init__(self, raw: Tensor, bias: Tensor, shortcut: Tensor | None = None, fine: bool = False):
        self.raw, self.parts, self.fine = raw, (raw, bias, shortcut), fine


class _Memory:
    """The frames that the causal convolutions keep, in the order in which these run."""

    def __init__(self, kept: list):
        self._old: Iterator[Any] = iter(kept)
        self.done: list[Any] = []

    def before(self, like: Tensor, fine: bool = False) -> Tensor:
        """The frames before those of `like`: kept ones, or nothing but zeros."""
        old = next(self._old)
        if old is not None:
            return old
        b, _, h, w, c = like.shape
        return like.new_zeros((b, KEPT, 2 * h, 2 * w, c // 4) if fine else (b, KEPT, h, w, c))

    def after(self, frames: Tensor | None) -> None:
        self.done.append(frames)

    def skip(self) -> None:
        """Past a convolution that does not see the first latent, and does not remember it either."""
        next(self._old)
        self.done.append(None)


class _Conv:
    """A convolution over (3, 3, 3) that finds the frames before its own already there; its bias is left to the next.

    `beside`: it reads `[B, T, H, W, 3C]`, the three frames of each as the channels of one, and is one over two
    dimensions; else `[B, 2 + T, H, W, C]`. On CPUs small convolutions over three dimensions take 5 to 10 times as long
    as over two. On an H200 cuDNN takes 7.49 ms for 96 channels of 12 frames of 480 x 832 in three and 6.04 in two, but
    5.48 and 5.93 for 192 of 240 x 416, and the same for 384.
    """

    def __init__(self, conv: Any):
        weight, bias = conv.weight.detach(), conv.bias.detach()
        self.beside = not weight.is_cuda or len(weight) == weight.shape[1] <= BESIDE
        if missing := -len(weight) % 8:  # channels in multiples of 8 are what tensor cores take
            weight, bias = F.pad(weight, (0, 0) * 4 + (0, missing)), F.pad(bias, (0, missing))
        self.bias, self.padding = bias, tuple(n // 2 for n in weight.shape[3:])
        if self.beside:
            self.weight = weight.transpose(1, 2).flatten(1, 2).to(memory_format=torch.channels_last)
        else:
            self.weight = weight.to(memory_format=torch.channels_last_3d)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.beside:
            made = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, padding=(0, *self.padding))
            return made.permute(0, 2, 3, 4, 1).contiguous()
        made = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.weight, padding=self.padding)
        return made.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class _Residual:
    def __init__(self, block: Any):
        self.norm1, self.norm2 = gamma_of(block.norm1), gamma_of(block.norm2)
        self.conv1, self.conv2 = _Conv(block.conv1), _Conv(block.conv2)
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else matrix_of(block.conv_shortcut)

    def __call__(self, state: _Pending, memory: _Memory, first: bool, run: Any) -> _Pending:
        before = memory.before(state.raw, state.fine)
        x, padded, last = run(entered, *state.parts, self.norm1, before, state.fine, self.conv1.beside)
        memory.after(last)
        raw = self.conv1(padded)
        padded, last = run(passed, raw, self.conv1.bias, None, self.norm2, memory.before(raw), False, self.conv2.beside)
        memory.after(last)
        shortcut = x if self.shortcut is None else F.linear(x, *self.shortcut)
        return _Pending(self.conv2(padded), self.conv2.bias, shortcut)


class _Attention:
    """Attention of a frame's places to each other, by one head, whose width no fused kernel takes."""

    def __init__(self, block: Any):
        self.norm = gamma_of(block.norm)
        self.qkv, self.proj = matrix_of(block.to_qkv), matrix_of(block.proj)

    def __call__(self, state: _Pending, memory: _Memory, first: bool, run: Any) -> _Pending:
        x, normed = run(attentive, *state.parts, self.norm)
        q, k, v = F.linear(normed, *self.qkv).flatten(2, 3).flatten(0, 1).chunk(3, dim=-1)
        shares = run(softmax, torch.bmm(q, k.mT), q.shape[-1] ** -0.5)
        y = torch.bmm(shares, v).view_as(x)
        weight, bias = self.proj
        return _Pending(F.linear(y, weight), bias, x)


class _Up:
    """Twice as many rows and columns, and, after the first latent, frames."""

    def __init__(self, block: Any):
        conv = block.resample[1]
        weight = conv.weight.detach().float()
        # Of a doubled row, the upper pixel sees the row above once and its own twice, the lower one likewise.
        upper, lower = (
            weight.new_tensor(m) for m in ([[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]])
        )
        phases = [torch.einsum("ocij,yi,xj->ocyx", weight, a, b) for a in (upper, lower) for b in (upper, lower)]
        self.weight = torch.cat(phases).to(conv.weight.dtype).to(memory_format=torch.channels_last)
        self.bias = conv.bias.detach()
        self.frames = _Conv(block.time_conv) if block.mode == "upsample3d" else None

    def __call__(self, state: _Pending, memory: _Memory, first: bool, run: Any) -> _Pending:
        x = None
        if self.frames is not None and first:
            memory.skip()
        elif self.frames is not None:
            padded, last = run(remembered, *state.parts, memory.before(state.raw), self.frames.beside)
            memory.after(last)
            x = run(interleaved, self.frames(padded), self.frames.bias)
        x = run(settled, *state.parts) if x is None else x
        b, t = x.shape[:2]
        made = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.weight, padding=1)
        return _Pending(made.permute(0, 2, 3, 1).contiguous().unflatten(0, (b, t)), self.bias, fine=True)


# --- what is elementwise ---------------------------------------------------------------------------------------------


def settled(raw: Tensor, bias: Tensor, shortcut: Tensor | None, fine: bool = False) -> Tensor:
    """raw + bias + shortcut; `fine`: of `[B, T, H, W, 4C]` the pixels `[B, T, 2H, 2W, C]`."""
    if fine:
        x = raw.unflatten(-1, (2, 2, -1)).permute(0, 1, 2, 4, 3, 5, 6)  # B T H 2 W 2 C
        raw = x.flatten(4, 5).flatten(2, 3)
    x = raw.to(wide(raw.dtype)) + bias
    return (x if shortcut is None else x + shortcut).to(raw.dtype)


def entered(
    raw: Tensor, bias: Tensor, shortcut: Tensor | None, gamma: Tensor, before: Tensor, fine: bool, beside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, what the next convolution reads (it normed and activated, after the frames before), its last frames."""
    x = settled(raw, bias, shortcut, fine)
    return x, *_after(before, F.silu(normed(x, gamma)).to(x.dtype), beside)


def passed(
    raw: Tensor, bias: Tensor, shortcut: Tensor | None, gamma: Tensor, before: Tensor, fine: bool, beside: bool
) -> tuple[Tensor, Tensor]:
    """The same where nothing else reads the sum."""
    return entered(raw, bias, shortcut, gamma, before, fine, beside)[1:]


def remembered(
    raw: Tensor, bias: Tensor, shortcut: Tensor | None, before: Tensor, beside: bool
) -> tuple[Tensor, Tensor]:
    """The sum after the frames before it, and its last frames."""
    return _after(before, settled(raw, bias, shortcut), beside)


def interleaved(raw: Tensor, bias: Tensor) -> Tensor:
    """Of `[B, T, H, W, 2C]` the frames `[B, 2T, H, W, C]`."""
    x = settled(raw, bias, None).unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def attentive(raw: Tensor, bias: Tensor, shortcut: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and it normed."""
    x = settled(raw, bias, shortcut)
    return x, normed(x, gamma).to(x.dtype)


def softmax(scores: Tensor, scale: float) -> Tensor:
    return (scores.to(wide(scores.dtype)) * scale).softmax(-1).to(scores.dtype)


def finished(raw: Tensor, bias: Tensor) -> Tensor:
    """The three colours."""
    return (raw[..., :3].to(wide(raw.dtype)) + bias[:3]).to(raw.dtype)


def normed(x: Tensor, gamma: Tensor) -> Tensor:
    dtype = wide(x.dtype)
    return F.normalize(x.to(dtype), dim=-1) * (x.shape[-1] ** 0.5 * gamma.to(dtype))


def _after(before: Tensor, x: Tensor, beside: bool) -> tuple[Tensor, Tensor]:
    """What a convolution reads (`_Conv`), and the last frames."""
    padded = torch.cat([before, x], dim=1)
    last = padded[:, -KEPT:].clone()
    if beside:
        padded = torch.cat([padded[:, i : i + x.shape[1]] for i in range(1 + KEPT)], dim=-1)
    return padded, last


def gamma_of(norm: Any) -> Tensor:
    return norm.gamma.detach().flatten()


def matrix_of(conv: Any) -> tuple[Tensor, Tensor]:
    """A convolution over one place as weight and bias of a linear layer."""
    return conv.weight.detach().flatten(1), conv.bias.detach()
