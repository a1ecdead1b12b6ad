"""The rollout of a causal model (Self Forcing, arXiv 2506.08009, algorithm 1): a video made chunk by chunk, each chunk in
a few steps, from its own earlier chunks. Training and streaming run this same function.

    from functools import partial
    cache = backbone.new_cache(frames=21, graded=21)
    denoise = partial(denoiser, cond=cond)                         # a LatentDenoiser over a causal backbone
    noise = path.prior((B, 21, C, H, W), draw.fold("noise"))
    exit_step = exit_steps("shared", len(steps_at), 7, step)        # a number, or one for each chunk
    video = torch.cat([*rollout(denoise, path, noise, steps_at, cache, chunks, draw.fold("rollout"), exit_step)], dim=1)

`denoise(x_t, t, cache=…, write=…, …)` is called with x_t `[B, chunk, …]` and t `[B, 1]`. What is yielded begins after
the prefix. Under torch.no_grad() nothing is graded and memory is constant, so `noise` may be endless.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.path import GaussianPath
from kinema.seeds import Draw


class Memory(Protocol):
    """What a causal denoiser keeps of the frames it has made."""

    frames: int

    def reset(self) -> None: ...
    def rewind(self) -> None: ...


@dataclass(frozen=True)
class Recompute:
    """Context made anew before each chunk, in one pass over the last clean latents, whose positions begin at 0.

    frames       how many latents before the chunk it sees, a multiple of the chunk
    pin_first    frame 0 and the last frames - 1 instead
    image_first  once earlier frames are left out, the first latent is replaced by that of an image, its last pixel frame:
                 a Wan latent that begins a sequence stands for one pixel frame; `rollout` is given it as `image`
    """

    frames: int
    pin_first: bool = False
    image_first: bool = False


def rollout(
    denoise: Callable[..., Tensor],
    path: GaussianPath,
    noise: Tensor | Iterable[Tensor],
    times: Sequence[float],
    cache: Memory,
    chunks: Chunks,
    draw: Draw,
    exit_step: int | Sequence[int] | None = None,
    *,
    graded_frames: int = 21,
    context_noise: float = 0.0,
    renoise: Literal["fresh", "ode"] = "fresh",
    prefix: Tensor | None = None,
    first_position: int = 0,
    context: Recompute | None = None,
    image: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yields the clean chunks `[B, chunk, …]`, float32, one after the other.

    Args:
        noise: the video at times[0], `[B, T, …]` without the prefix; or chunk after chunk, endless if need be.
        times: of the steps, decreasing, the final 0 not listed.
        cache: is reset first; belongs to the video from then on.
        exit_step: the step whose estimate a chunk ends with (None: the last), one for all or one for each chunk.
        graded_frames: only chunks that begin within the last so many frames of the whole video carry gradients, and of
            these only the exit step.
        context_noise: noise level at which finished chunks are written into the cache.
        renoise: between steps, "fresh" noise of `draw` or, "ode", the noise the estimate implies.
        prefix: clean frames `[B, P, …]` the video begins with, an image or earlier chunks; they are not yielded.
        first_position: the position of the video's first frame.
        context: makes the context anew before each chunk instead of keeping what each chunk wrote.
        image: with `context.image_first`, the latent `[B, 1, …]` of the last pixel frame of latent frame i.

    Randomness of chunk k is `draw.fold(k)`: `.fold(i)` after step i, `.fold("context")` when it is written. A chunk is
    written only when the next one is asked for, so the last never is. Raises ValueError where frames do not fill chunks.
    """
    raise NotImplementedError
    yield


def exit_steps(
    how: Literal["shared", "per_chunk", "last"], steps: int, chunks: int, *words: int | str
) -> int | tuple[int, ...]:
    """The steps chunks end with: a pure function of `words` (the step, the micro-batch), so that all ranks agree."""
    if how == "last":
        return steps - 1
    if how == "shared":
        return seeds.shared(steps, *words, "exit")
    return tuple(seeds.shared(steps, *words, "exit", k) for k in range(chunks))
