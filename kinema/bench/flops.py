"""Floating-point operations of Wan, counted: two for each multiplication of a matrix product, and nothing else."""

import math
from collections.abc import Sequence

from kinema.diffusion.chunks import Chunks
from kinema.models.causality import Window
from kinema.models.wan.transformer import WanSize

BACKWARD_LINEAR, BACKWARD_ATTENTION = 2.0, 2.5  # of the forward; the second makes the scores again, as all kernels do


def linear(size: WanSize, tokens: int) -> float:
    """Of all that does not look at other tokens: projections, hidden layers, patches and head."""
    block = 2 * size.dim * size.dim * (4 + 2) + 2 * 2 * size.dim * size.ffn_dim
    edges = 2 * size.dim * math.prod(size.patch) * (size.in_channels + size.out_channels)
    return tokens * (size.layers * block + edges)


def attention(size: WanSize, queries: int, keys: int) -> float:
    return size.layers * 4.0 * size.dim * queries * keys


def text(size: WanSize) -> float:
    """Of the text's embedding, keys and values."""
    return size.text_len * (2 * size.text_dim * size.dim + 2 * size.dim**2 + size.layers * 4 * size.dim**2)


def forward(size: WanSize, tokens: int, keys: int) -> float:
    """Of a pass whose tokens see `keys` tokens, without the text's own part."""
    return linear(size, tokens) + attention(size, tokens, keys) + attention(size, tokens, size.text_len)


def backward(size: WanSize, tokens: int, keys: int) -> float:
    looks = attention(size, tokens, keys) + attention(size, tokens, size.text_len)
    return BACKWARD_LINEAR * linear(size, tokens) + BACKWARD_ATTENTION * looks


def chunk_passes(size: WanSize, frames: int, tokens: int, chunks: Chunks, window: Window) -> list[float]:
    """Of one pass over each chunk of a video, `tokens` being those of a frame."""
    return [forward(size, n * tokens, seen * tokens) for n, seen in _seen(frames, chunks, window)]


def chunk_backwards(size: WanSize, frames: int, tokens: int, chunks: Chunks, window: Window) -> float:
    """Of the backward of one pass over each chunk; what was cached is a constant."""
    total = 0.0
    for n, seen in _seen(frames, chunks, window):
        looks = attention(size, n * tokens, seen * tokens) + attention(size, n * tokens, size.text_len)
        total += BACKWARD_LINEAR * linear(size, n * tokens) + BACKWARD_ATTENTION * looks
    return total


def rollout(passes: Sequence[float], steps: int) -> float:
    """Of a video made in `steps` evaluations of each chunk and one that remembers it, for all but the last."""
    return steps * sum(passes) + sum(passes[:-1])


def _seen(frames: int, chunks: Chunks, window: Window) -> list[tuple[int, int]]:
    """For each chunk its frames and how many it sees, itself included."""
    found, end = [], 0
    for n in chunks.lengths(frames):
        end += n
        found.append((n, sum(map(len, window.seen(end)))))
    return found
