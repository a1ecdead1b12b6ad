"""What a decoder's convolutions over three frames read, as one Triton kernel, for NVIDIA GPUs.

A program holds some pixels of one frame. It reads the raw result and the shortcut once; it writes their sum, if that is
asked for, and the sum normed and activated straight to every place that it has in the convolution's operand: one, or
three where frames lie beside each other, and one more among the last frames. What is generated for the same writes the
activated frames, and reads them again to lay them beside each other. The frames before are copied by other programs.
Shapes: as in `vae_fast.py`.
"""

from typing import Any

import torch
import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]
from torch import Tensor

from kinema.models.triton_numbers import load
from kinema.models.wan import vae_fast
from kinema.models.wan.vae_fast import KEPT

NUMBERS, WARPS = 4096, 8  # that a program holds, channels that are not there included


def entered(
    raw: Tensor, bias: Tensor, shortcut: Tensor | None, gamma: Tensor, before: Tensor, fine: bool, beside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = raw.new_empty(len(raw), raw.shape[1], *before.shape[2:])
    return total, *_laid(raw, bias, shortcut, gamma, before, fine, beside, total)


def passed(
    raw: Tensor, bias: Tensor, shortcut: Tensor | None, gamma: Tensor, before: Tensor, fine: bool, beside: bool
) -> tuple[Tensor, Tensor]:
    return _laid(raw, bias, shortcut, gamma, before, fine, beside, None)


KERNELS: dict[Any, Any] = {vae_fast.entered: entered, vae_fast.passed: passed}


def _laid(
    raw: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    gamma: Tensor,
    before: Tensor,
    fine: bool,
    beside: bool,
    total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, frames, rows, columns, channels = len(raw), raw.shape[1], *before.shape[2:]
    wide = triton.next_power_of_2(channels)
    pixels = max(1, NUMBERS // wide)
    if beside:
        made = raw.new_empty(batch, frames, rows, columns, (1 + KEPT) * channels)
    else:
        made = raw.new_empty(batch, KEPT + frames, rows, columns, channels)
    last, raw = raw.new_empty(batch, KEPT, rows, columns, channels), raw.contiguous()
    grid = (triton.cdiv(rows * columns, pixels), KEPT + frames, batch)
    with torch.cuda.device_of(raw):  # Triton launches on the current device, wherever the tensors are
        _launch(_lay, grid)(
            raw,
            bias.contiguous(),
            raw if shortcut is None else shortcut.contiguous(),
            gamma.contiguous(),
            before.contiguous(),
            raw if total is None else total,
            made,
            last,
            frames,
            rows * columns,
            columns,
            channels**0.5,
            channels,
            wide,
            pixels,
            KEPT,
            shortcut is not None,
            fine,
            beside,
            total is not None,
            num_warps=WARPS,
        )
    return made, last


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]


@triton.jit
def _lay(
    raw_ptr,
    bias_ptr,
    shortcut_ptr,
    gamma_ptr,
    before_ptr,
    total_ptr,
    made_ptr,
    last_ptr,
    frames,
    size,
    columns,
    root,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    KEPT: tl.constexpr,
    SHORTCUT: tl.constexpr,
    FINE: tl.constexpr,
    BESIDE: tl.constexpr,
    ENTERED: tl.constexpr,
):
    video, frame = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)  # frame: of those before and all
    pixel, channel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = (pixel < size) & (channel < C)
    at = pixel * C + channel  # within a frame
    if frame < KEPT:
        frame_at = (video * KEPT + frame) * size * C
        kept = tl.load(before_ptr + frame_at + at, mask=inside, other=0.0)
        _place(made_ptr, last_ptr, kept, video, frame, frames, pixel, channel, inside, size, C, KEPT, BESIDE)
    else:
        frame_at = (video * frames + frame - KEPT) * size * C
        if FINE:  # of four pixels made from one, those of a row are beside each other
            row, column = pixel // columns, pixel % columns
            coarse = (row // 2) * (columns // 2) + column // 2
            x = tl.load(
                raw_ptr + frame_at + (coarse * 4 + (row % 2) * 2 + column % 2) * C + channel, mask=inside, other=0.0
            )
        else:
            x = tl.load(raw_ptr + frame_at + at, mask=inside, other=0.0)
        y = x.to(tl.float32) + load(bias_ptr, channel, channel < C)
        if SHORTCUT:
            y += load(shortcut_ptr + frame_at, at, inside)
        total = y.to(made_ptr.dtype.element_ty)
        if ENTERED:
            tl.store(total_ptr + frame_at + at, total, mask=inside)
        y = total.to(tl.float32)
        gamma = load(gamma_ptr, channel, channel < C) * root
        y = y / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)[:, None] * gamma
        y = (y / (1.0 + tl.exp(-y))).to(made_ptr.dtype.element_ty)
        _place(made_ptr, last_ptr, y, video, frame, frames, pixel, channel, inside, size, C, KEPT, BESIDE)


@triton.jit
def _place(
    made_ptr,
    last_ptr,
    x,
    video,
    frame,
    frames,
    pixel,
    channel,
    inside,
    size,
    C: tl.constexpr,
    KEPT: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """Frame f of those before and all is the i-th of three of frame f - i."""
    if BESIDE:
        for i in tl.static_range(KEPT + 1):  # type: ignore[reportGeneralTypeIssues]
            if (frame >= i) & (frame - i < frames):
                begin = (video * frames + frame - i) * size * (KEPT + 1) * C + i * C
                tl.store(made_ptr + begin + pixel * ((KEPT + 1) * C) + channel, x, mask=inside)
    else:
        tl.store(made_ptr + (video * (frames + KEPT) + frame) * size * C + pixel * C + channel, x, mask=inside)
    if frame >= frames:
        tl.store(last_ptr + (video * KEPT + frame - frames) * size * C + pixel * C + channel, x, mask=inside)
