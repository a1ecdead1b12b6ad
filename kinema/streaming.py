"""Video as a stream: prompts in, frames out chunk by chunk, for as long as one likes and in constant memory.

A session is one video, or a batch of them, in the making; a server is a thin consumer of its `frames`.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.chunks import Chunks
from kinema.diffusion.guidance import Branches, Scale, guided
from kinema.diffusion.rollout import Recompute, rollout
from kinema.diffusion.samplers import Sampler, UniPC
from kinema.errors import UsageError
from kinema.models.causality import Window
from kinema.models.wan.last_frames import LastFrames
from kinema.models.wan.spec import WanCausal
from kinema.seeds import Keys


class Cancelled(Exception):
    """The session was cancelled while it made a chunk."""


@dataclass(eq=False)
class Session:
    """Videos in the making, one for each prompt and each row of `draw`.

    spec, denoiser  the causal network and how it is read; text and codec are opened
    shape           (C, h, w) of a latent frame
    length          of the videos in latent frames, an image included; None: no end
    steps           for each chunk: as many as `spec.steps_at` has are these (None too), others are the sampler's
    guidance        w of uncond + w·(cond − uncond), or w as a function of the time
    window          what a chunk sees, where that is not what the network was trained with
    context         makes the context of each chunk anew, instead of keeping what each chunk wrote
    image           pixels `[B, 1, 3, H, W]` the videos begin with

    The noise of a chunk depends on the draw and the chunk's number alone, so a stream equals a video made at once.
    """

    spec: WanCausal
    denoiser: Any
    text: Any
    codec: Any
    prompts: Sequence[str]
    draw: Keys
    shape: tuple[int, int, int]
    length: int | None = None
    steps: int | None = None
    sampler: Sampler = field(default_factory=UniPC)
    guidance: Scale = 1.0
    window: Window | None = None
    context: Recompute | None = None
    image: Tensor | None = None

    made: int = field(default=0, init=False)  # latent frames so far
    heard: list[tuple[int, Sequence[str]]] = field(default_factory=list, init=False)  # latent frame, prompts from it on

    def __post_init__(self):
        backbone, chunk = self.denoiser.backbone, self.spec.chunk
        seen = (self.window or backbone.window).frames
        if self.length is None and seen is None and self.context is None:
            raise UsageError(
                "a stream without end needs a window; give one, or say how many frames the video is to have"
            )
        if self.context is not None and (self.context.frames < chunk or self.context.frames % chunk):
            fits = max(chunk, self.context.frames - self.context.frames % chunk)
            raise UsageError(f"context of {self.context.frames} frames is no multiple of chunk {chunk}; use {fits}")
        self._prefix = None if self.image is None else self.codec.encode(self.image)
        given = 0 if self._prefix is None else 1
        if self.length is not None:
            try:
                self.spec.chunks.lengths(self.length - given, given)
            except ValueError as error:
                raise UsageError(f"a video of {self.length} latent frames cannot be streamed: {error}") from None
        capacity = self.length if self.context is None else self.context.frames + chunk
        self._caches = [backbone.new_cache(capacity, window=self.window) for _ in range(1 + (self.guidance != 1))]
        self._cache: Any = self._caches[0] if len(self._caches) == 1 else Branches(*self._caches)
        # What a new prompt is told again of the video: all that the next chunk sees.
        self._again = self.length or 0 if seen is None else max(chunk, -(-(seen - chunk) // chunk) * chunk)
        self._recent: Tensor | None = None
        images = self.context is not None and self.context.image_first
        self._images = LastFrames(self.codec, self.context.frames) if images and self.context is not None else None
        self._lock = threading.Lock()
        self._switches: list[tuple[int, Sequence[str], bool]] = []
        self._stopped = False
        self._say(self.prompts)

    def switch(self, prompts: Sequence[str], at: int = 0, anew: bool = False) -> None:
        """Changes the prompts from the first chunk on that begins at or after latent frame `at`.

        The frames made so far stay as they were seen under the old prompts, or, with `anew`, are seen again under the
        new ones (with `context`, every chunk's context is).
        """
        with self._lock:
            self._switches = sorted([*self._switches, (at, prompts, anew)], key=lambda switch: switch[0])

    def cancel(self) -> None:
        """Ends the video before the next network evaluation, from any thread, and frees its memory."""
        self._stopped = True

    @property
    def nbytes(self) -> int:
        """The memory of keys and values."""
        return sum(cache.nbytes for cache in self._caches)

    def latents(self) -> Iterator[Tensor]:
        """The videos' clean latents `[B, n, C, h, w]`, chunk by chunk, an image's first."""
        for latents, *_ in self._made():
            yield latents

    def frames(self) -> Iterator[Tensor]:
        """The videos' pixels `[B, n, 3, H, W]` in [-1, 1] on the CPU, chunk by chunk.

        Another thread makes the next chunks while this one decodes. On CUDA, where either would fill the device alone,
        they take turns: the next chunk's work is queued behind the decoding of this one, for who watches waits for
        these frames, and for the next ones only then. (On streams side by side, the decoder's of high priority, a
        video took longer on one H200 than both one after the other, and its first frames came after the second chunk.)
        """
        device = self.draw.key.device
        queued: queue.Queue | None = queue.Queue() if device.type == "cuda" else None  # what waits for decodings
        state = None
        for latents, pixels, finished in _ahead(lambda: self._in_turn(queued), self.cancel):
            if queued is None:
                if pixels is None:
                    pixels, state = self.codec.decode_next(latents, state)
                yield pixels
                continue
            stream, decoded = torch.cuda.current_stream(device), torch.cuda.Event()
            stream.wait_event(finished)
            latents.record_stream(stream)
            if pixels is None:
                pixels, state = self.codec.decode_next(latents, state)
            else:
                pixels.record_stream(stream)
            shown = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            shown.copy_(pixels, non_blocking=True)
            decoded.record(stream)
            queued.put(lambda end=decoded: torch.cuda.current_stream(device).wait_event(end))
            decoded.synchronize()
            yield shown

    def _in_turn(self, queued: queue.Queue | None) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """What `_made` makes; with `queued`, each chunk only once what is put there was called, one for each before."""
        for item in self._made():
            yield item
            while queued is not None and not self._stopped:
                with suppress(queue.Empty):
                    queued.get(timeout=0.05)()
                    break

    @torch.no_grad()
    def _made(self) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """Latents, their pixels if they are known, and on CUDA the event of both being there."""
        try:
            for latents in self._segments():
                pixels = self._remember(latents)
                finished = torch.cuda.Event() if latents.is_cuda else None
                if finished is not None:
                    finished.record(torch.cuda.current_stream(latents.device))
                yield latents, pixels, finished
        except Cancelled:
            return
        finally:
            self._caches, self._cache, self._recent, self._images = [], None, None, None

    def _segments(self) -> Iterator[Tensor]:
        """Chunks; whenever the video is to be seen anew, a rollout begins with the latest of them as given frames."""
        steps = len(self.spec.steps_at) if self.steps is None else self.steps
        sampler = None if self.spec.few_step(steps) else self.sampler
        options = {"sampler": sampler, "context": self.context, "image": self._images}
        times = self.spec.times(steps)
        path, chunks, prefix, begin = self.denoiser.path, self.spec.chunks, self._prefix, 0
        if prefix is not None:
            yield prefix
        while not self._finished:
            draw = self.draw.fold("steps").fold(self.made)
            made = rollout(
                self._denoise,
                path,
                self._noise(),
                times,
                self._cache,
                chunks,
                draw,
                prefix=prefix,
                first_position=begin,
                **options,
            )
            yield from made
            if self._recent is not None:
                prefix, begin, chunks = self._recent, self.made - self._recent.shape[1], Chunks(self.spec.chunk)

    def _noise(self) -> Iterator[Tensor]:
        """The noise of chunk after chunk, until the end or until the video is to be seen anew."""
        while not self._finished and not self._prompted():
            frames = 1 if self.spec.first_frame_alone and not self.made else self.spec.chunk
            yield self.draw.fold("noise").fold(self.made).normal(frames, *self.shape)

    def _denoise(self, x: Tensor, t: Tensor, **more: Any) -> Tensor:
        if self._stopped:
            raise Cancelled
        return self._guided(x, t, **more)

    @property
    def _finished(self) -> bool:
        return self.length is not None and self.made >= self.length

    def _prompted(self) -> bool:
        """Lets the prompts that are due take effect; whether what was made is to be seen anew under them."""
        anew = False
        with self._lock:
            while self._switches and self._switches[0][0] <= self.made:
                _, prompts, again = self._switches.pop(0)
                self._say(prompts)
                anew |= again
        return anew and self._recent is not None

    def _say(self, prompts: Sequence[str]) -> None:
        self.heard.append((self.made, prompts))
        cond = self.text(prompts)
        uncond = self.text([self.text.unconditional] * len(prompts)) if self.guidance != 1 else {}
        self._guided = guided(self.denoiser, cond, uncond, self.guidance)
        self._cache.forget_text()

    def _remember(self, latents: Tensor) -> Tensor | None:
        """Counts a chunk and keeps of it what later ones may need; its pixels where these are needed for that."""
        self.made += latents.shape[1]
        if self.context is None:
            recent = latents if self._recent is None else torch.cat([self._recent, latents], dim=1)
            self._recent = recent[:, -self._again :]
            return None
        return None if self._images is None else self._images.add(latents)


def _ahead(make: Callable[[], Iterator[Any]], cancel: Callable[[], None]) -> Iterator[Any]:
    """The items of a generator that works ahead, by one item or two, in a thread of its own."""
    items: queue.Queue = queue.Queue(maxsize=1)
    end = object()

    def run() -> None:
        try:
            for item in make():
                items.put((item, None))
            items.put((end, None))
        except BaseException as error:
            items.put((end, error))

    thread = threading.Thread(target=run, name="kinema-stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        cancel()
        while thread.is_alive():
            with suppress(queue.Empty):
                items.get(timeout=0.05)
