"""The rollout of a causal model (Self Forcing, arXiv 2506.08009, algorithm 1), for training and streaming alike.

A video is made chunk by chunk, each in a few steps, from the model's own earlier chunks:

    cache = backbone.new_cache(frames=21, graded=21)
    denoise = partial(denoiser, cond=cond)                     # a LatentDenoiser over a causal backbone
    noise = path.prior((B, 21, C, H, W), draw.fold("noise"))
    exit_step = exit_steps("shared", len(steps_at), 7, step)   # one for all of the 7 chunks
    video = torch.cat([*rollout(denoise, path, noise, steps_at, cache, chunks, draw, exit_step)], dim=1)

`denoise(x_t, t, cache=…, write=…, first_position=…)` is called with x_t `[B, chunk, …]` and t `[B, 1]`. Under
torch.no_grad() memory is constant, so that `noise` may be endless.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kinema import seeds
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.guidance import Memory
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.samplers import Sampler
from kinema.seeds import Draw


@dataclass(frozen=True)
class Recompute:
    """Context made anew before each chunk, in one pass over the last clean latents, whose positions begin at 0.

    frames       how many latents before it a chunk sees, a multiple of the chunk's
    pin_first    frame 0 and the last frames - 1 instead
    image_first  once frames are left out, the first latent is replaced by that of an image, its own last pixel frame: a
                 latent that begins a sequence stands for one pixel frame, all others for four
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
    sampler: Sampler | None = None,
    prefix: Tensor | None = None,
    first_position: int = 0,
    context: Recompute | None = None,
    image: Callable[[int], Tensor] | None = None,
    ends: list["End"] | None = None,
) -> Iterator[Tensor]:
    """Yields the clean chunks `[B, chunk, …]`, float32.

    Args:
        noise: the video at times[0], `[B, T, …]`, without the prefix; or its chunks one by one, endless if need be.
        times: of the steps, decreasing, the final 0 not listed.
        cache: is reset first and belongs to this video from then on.
        exit_step: the step whose estimate ends a chunk (None: the last), one for all chunks or one for each.
        graded_frames: gradients have only the exit steps, and of these only those of chunks that begin within the last
            so many frames of the whole video.
        context_noise: the noise level at which finished chunks are written into the cache.
        renoise: between steps, "fresh" noise, or with "ode" the noise that the estimate implies.
        sampler: makes each chunk in many steps, `times`, without gradients, instead of the few-step walk above.
        prefix: clean frames `[B, P, …]` the video begins with, an image or earlier chunks; they are not yielded.
        first_position: the position of the video's first frame.
        context: makes context anew before each chunk, instead of keeping what each chunk wrote.
        image: for `context.image_first`, latent frame i's last pixel frame as an image's latent `[B, 1, …]`.
        ends: is given each chunk's last step, for `regraded`.

    Chunk k draws from `draw.fold(k)`: its step i from `.fold(i)`, its noise as context from `.fold("context")`. It is
    written when the next one is asked for, so the last never is. Raises ValueError where frames do not fill chunks, for
    steps that do not exist, and for an endless video that is to have gradients.
    """
    given = 0 if prefix is None else prefix.shape[1]
    if isinstance(noise, Tensor):
        pieces: Iterable[Tensor] = noise.split(list(chunks.lengths(noise.shape[1], given)), dim=1)
        number, graded_from = len(pieces), given + noise.shape[1] - graded_frames
    else:
        pieces, number, graded_from = noise, None, 0
    exits = _exits(exit_step, len(times), number)
    place = partial(denoise, cache=cache, first_position=first_position)

    def few_steps(x: Tensor, draw: Draw, exit_step: int, begin: int) -> Tensor:
        for i, time in enumerate(times[:exit_step]):
            t, s = _at(time, x), _at(times[i + 1], x)
            with torch.no_grad():
                x0 = place(x, t)
                x = path.corrupt(x0, s, draw.fold(i)) if renoise == "fresh" else path.step(x, t, s, x0)
        if ends is not None:
            ends.append(End(x, times[exit_step], begin))
        with torch.set_grad_enabled(torch.is_grad_enabled() and begin >= graded_from):
            return place(x, _at(times[exit_step], x))

    def write(x0: Tensor, time: float, draw: Draw, **more: Any) -> None:
        t = _at(time, x0)
        with torch.no_grad():
            place(path.corrupt(x0, t, draw.fold("context")) if time else x0, t, write=True, **more)

    cache.reset()
    if context is None:
        for part in () if prefix is None else prefix.split(list(chunks.prefix(given)), dim=1):
            write(part, 0.0, draw)
    history = None if context is None else _History(context, chunks, prefix, image)
    begin, previous = given, None
    for k, x in enumerate(pieces):
        if number is None and torch.is_grad_enabled():
            raise ValueError("an endless video has no last frames to grade; make it under torch.no_grad()")
        if history is not None and history.count:
            cache.rewind()
            latents, lengths = history.context()
            write(latents, context_noise, draw.fold(k), lengths=lengths)
        elif previous is not None:
            write(previous, context_noise, draw.fold(k - 1))
        if sampler is not None:
            with torch.no_grad():
                x0 = sampler(place, path, x, times, draw.fold(k))
        else:
            x0 = few_steps(x, draw.fold(k), next(exits), begin)
        begin += x.shape[1]
        yield x0
        previous = x0.detach()
        if history is not None:
            history.add(previous)


class End(NamedTuple):
    """The last step of a chunk: from x `[B, chunk, …]` at `time`; `frame` is where the chunk begins."""

    x: Tensor
    time: float
    frame: int


def regraded(denoise: Callable[..., Tensor], ends: Sequence[End], cache: Memory, first_position: int = 0) -> Tensor:
    """The estimates of consecutive chunks' last steps once more, now with gradients: `[B, T, …]`, from one pass over
    all of them.

    They are those that `rollout` gives with gradients, for these see what is cached as constants; but there each chunk
    takes a pass of its own. The cache must still hold what the chunks saw (`new_cache(…, graded=…)`).
    """
    x, lengths = torch.cat([end.x for end in ends], dim=1), [end.x.shape[1] for end in ends]
    if len({end.time for end in ends}) == 1:
        t = _at(ends[0].time, x)
    else:
        t = torch.cat([_at(end.time, x).expand(-1, n) for end, n in zip(ends, lengths, strict=True)], dim=1)
    return denoise(x, t, cache=cache, at=ends[0].frame, lengths=lengths, first_position=first_position)


def exit_steps(
    how: Literal["shared", "per_chunk", "last"], steps: int, chunks: int, *words: int | str
) -> int | tuple[int, ...]:
    """The steps chunks end with: a pure function of `words` (the step, the micro-batch), so that all ranks agree."""
    if how == "last":
        return steps - 1
    if how == "shared":
        return seeds.shared(steps, *words, "exit")
    return tuple(seeds.shared(steps, *words, "exit", k) for k in range(chunks))


class _History:
    """The clean latents that may be context, and how they are divided into chunks."""

    def __init__(
        self, context: Recompute, chunks: Chunks, prefix: Tensor | None, image: Callable[[int], Tensor] | None
    ):
        if context.frames % chunks.size:
            below = context.frames - context.frames % chunks.size
            raise ValueError(
                f"context of {context.frames} frames is no multiple of chunk {chunks.size}; use {below or chunks.size}"
            )
        if context.image_first and image is None:
            raise ValueError("image_first needs `image`, which makes the latent of a frame as an image")
        self.rule, self.size, self.image = context, chunks.size, image
        self.count = 0 if prefix is None else prefix.shape[1]  # of all frames so far
        self.lengths = chunks.prefix(self.count)
        self.first, self.last = (None, None) if prefix is None else (prefix[:, :1], prefix[:, -context.frames :])

    def add(self, x0: Tensor) -> None:
        self.first = x0[:, :1] if self.first is None else self.first
        self.last = x0 if self.last is None else torch.cat([self.last, x0], dim=1)[:, -self.rule.frames :]
        self.count += x0.shape[1]
        self.lengths += (x0.shape[1],)

    def context(self) -> tuple[Tensor, tuple[int, ...]]:
        """The context of the next chunk and the lengths of its chunks."""
        n = self.rule.frames
        assert self.first is not None and self.last is not None
        if self.count <= n:
            return self.last, self.lengths
        self.lengths = ()  # they no longer matter
        latents = self.last
        if self.rule.pin_first:
            latents = torch.cat([self.first, latents[:, 1:]], dim=1)
        elif self.rule.image_first and self.image is not None:
            latents = torch.cat([self.image(self.count - n), latents[:, 1:]], dim=1)
        return latents, (self.size,) * (n // self.size)


def _exits(exit_step: int | Sequence[int] | None, steps: int, chunks: int | None) -> Iterator[int]:
    """The exit step of each chunk."""
    one = steps - 1 if exit_step is None else exit_step
    each = [one] if isinstance(one, int) else list(one)
    if not all(0 <= step < steps for step in each):
        raise ValueError(f"exit steps {each} are not among the {steps} steps")
    if isinstance(one, int):
        return repeat(one)
    if len(each) != chunks:
        raise ValueError(f"{len(each)} exit steps were given for {chunks or 'endless'} chunks; give each its own")
    return iter(each)


def _at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x), 1), time, device=x.device)
