"""What `kinema stream` does: one prompt and those that follow it, to a file or to whoever reads standard output."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.video import rgb_bytes, write_stream
from kinema.diffusion.rollout import Recompute
from kinema.errors import UsageError, UserError
from kinema.models.attention import backends
from kinema.models.causality import Window
from kinema.models.wan.spec import WanCausal
from kinema.pretrained import Pretrained
from kinema.streaming import Session


def broadcast(
    model: Pretrained,
    prompt: str,
    out: Path,
    switches: Sequence[tuple[int, str]] = (),
    frames: int | None = None,
    seed: int = 0,
    window: int | None = None,
    sink: int | None = None,
    context: int | None = None,
    anew: bool = False,
    fast: bool = False,
    fp8: bool = False,
    fp8_attention: bool = False,
) -> None:
    """Writes a video to the mp4 file `out` while it is made, or as raw rgb24 frames to standard output if it is "-".

    Then it prints, as one JSON line, how fast that was, all that this depends on, and from which frame on each prompt
    holds. Ctrl-C ends the video where it is.

    Args:
        switches: (frame, prompt): the prompt holds from the first chunk on that begins with the latent frame of that
            frame, or a later one.
        frames: pixel frames; None: as many as the model's own videos have, 0: no end.
        window, sink: what a chunk sees, in latent frames, where that is not what the model was trained with.
        context: makes the context of each chunk anew from so many latent frames.
        anew: lets what was made be seen anew under a new prompt.
        fast: the same video up to rounding by the fast paths, which on CUDA takes half a minute to prepare;
            `fp8`: with their linear layers, `fp8_attention`: with their self-attention in 8 bits.

    Raises UserError for a model that is not causal, and UsageError for settings that do not go together.
    """
    spec, pipeline, raw = model.spec, model.studio.pipeline, str(out) == "-"
    if not isinstance(spec, WanCausal):
        raise UserError(f"{model.name} makes all frames of a video at once; use kinema sample, or give a causal model")
    seen = replace(
        spec,
        window=spec.window if window is None else window,
        sink=(spec.sink if window is None else 0) if sink is None else sink,
    )
    if anew and not switches:
        raise UsageError("--anew is for what was made before a new prompt; give one with --switch, or leave --anew out")
    frames, stride = pipeline.frames if frames is None else frames, model.studio.codec.stride[0]
    length = _latents(frames, stride, spec) if frames else None
    for frame, _ in switches:
        if length is not None and _latent(frame, stride) > (last := max(0, length - spec.chunk)):
            raise UsageError(
                f"--switch {frame} is not heard: the last chunk of these {frames} frames begins at frame "
                f"{_pixel(last, stride)}; "
                "switch there or before, or make the stream longer"
            )
    device = next(model.module.parameters()).device
    if device.type == "cuda":
        model.module.to(torch.bfloat16)
    model = model.quickened(fp8, fp8_attention) if fast else model
    session = model.studio.session(
        spec,
        model.denoiser,
        [prompt],
        seeds.keys(seed, "sample", [0], device=device),
        length=length,
        window=Window(seen.window, seen.sink, seen.reanchor),
        context=Recompute(context) if context else None,
    )
    for frame, words in switches:
        session.switch([words], at=_latent(frame, stride), anew=anew)

    began, done, first = time.monotonic(), 0, 0.0

    def shown() -> Iterator[Tensor]:
        nonlocal done, first
        for pixels in _cut(session.frames(), frames):
            done, first = done + len(pixels), first or time.monotonic() - began
            yield pixels

    with _ended_by_hand(session):
        if raw:
            _write(shown())
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_stream(out, shown(), pipeline.fps)
    seconds = time.monotonic() - began
    heard = [(_pixel(latent, stride), words) for latent, (words,) in session.heard]
    said = {
        "model": model.name,
        "prompts": [{"frame": frame, "prompt": words} for frame, words in heard if frame < max(1, done)],
        "device": backends(device)["device"],
        "attention": backends(device)["order"],
        "compute": str(next(model.module.parameters()).dtype).removeprefix("torch."),
        "size": [pipeline.height, pipeline.width],
        "steps": pipeline.steps,
        **{name: value for name, value in model.settings().items() if name in ("guidance", "sampler", "steps_at")},
        **{name: getattr(seen, name) for name in ("chunk", "window", "sink")},
        "context": context,
        "fast": fast,
        "fp8": fp8,
        "fp8_attention": fp8_attention,
        "seed": seed,
        "frames": done,
        "seconds": round(seconds, 3),
        "frames_per_second": round(done / seconds, 3),  # decoded and written
        "first_frames_seconds": round(first, 3),
        "out": str(out),
    }
    print(json.dumps(said), file=sys.stderr if raw else sys.stdout)


def _write(chunks: Iterable[Tensor]) -> None:
    """Raw frames to standard output, as long as somebody reads."""
    try:
        for pixels in chunks:
            sys.stdout.buffer.write(rgb_bytes(pixels))
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # what is left in the buffer must go somewhere, or Python complains as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _latent(frame: int, stride: int) -> int:
    """The latent frame that a pixel frame belongs to: the first has one, all others `stride`."""
    return -(-frame // stride)


def _pixel(latent: int, stride: int) -> int:
    """The first pixel frame of a latent frame."""
    return 1 + (latent - 1) * stride if latent else 0


def _latents(frames: int, stride: int, spec: WanCausal) -> int:
    """How many latent frames make so many pixel frames, or more to fill the last chunk."""
    return spec.chunks.fitting(1 + _latent(frames - 1, stride))[-1]


def _cut(chunks: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """The frames `[T, 3, H, W]` of the one video of a batch, and of these the first `frames` (0: all)."""
    done = 0
    for pixels in chunks:
        part = pixels[0, : frames - done] if frames else pixels[0]
        if len(part):
            yield part
        done += len(part)


@contextmanager
def _ended_by_hand(session: Session) -> Iterator[None]:
    """The first Ctrl-C ends the session, so that what it made is finished; a second one is an ordinary one."""

    def stop(*_: object) -> None:
        session.cancel()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
