"""`kinema prepare` of videos and of other systems' data: which model for, cut how, from where."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kinema.data import shards
from kinema.data.buckets import ASPECTS, buckets
from kinema.data.convert import ttt_video
from kinema.data.cutting import Cut
from kinema.data.ledger import verify
from kinema.data.preparing import Report
from kinema.data.public_lmdb import ConvertLMDB
from kinema.data.scanning import Progress
from kinema.data.targets import PIECE, Family, Target
from kinema.errors import UsageError, UserError
from kinema.models.hub import revision_of
from kinema.models.text import T5
from kinema.pretrained import describe

MODELS: dict[Family, str] = {
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "cogvideox": "zai-org/CogVideoX-5b",
    "ttt": "zai-org/CogVideoX-5b",
    "ursa": "BAAI/URSA-1.7B-FSQ320",
}
KINDS = {"wan": "Wan", "cogvideox": "CogVideoX", "ttt": "CogVideoX", "ursa": "URSA"}
TTT_FPS, TTT_TOKENS = 16, 512


def target_of(
    family: Family,
    model: str | None = None,
    fps: int | None = None,
    compute: str | None = None,
    unconditional: str | None = None,
) -> Target:
    """What data of a family is made with: the frozen networks of `model`, by default of the published one."""
    model = model or MODELS[family]
    spec, pipeline = describe(model)
    if not any(kind.__name__ == KINDS[family] for kind in type(spec).__mro__):
        raise UsageError(f"{model} is a {type(spec).__name__}, which --for {family} is not; give a {KINDS[family]}")
    codec: Any = pipeline.codec
    text: Any = pipeline.text
    if family == "ttt":
        text = T5(text.path, TTT_TOKENS, unconditional="", dtype=text.dtype)
        codec = replace(codec, multiple=1)
    if compute is not None:
        codec = replace(codec, compute=compute)
    if unconditional is not None:
        text = replace(text, unconditional=unconditional)
    size: Any = spec.dimensions
    native = TTT_FPS if family == "ttt" else pipeline.fps
    frames = PIECE * TTT_FPS + 1 if family == "ttt" else pipeline.frames
    return Target(
        family=family,
        model=model,
        codec=codec,
        text=text,
        frames=frames,
        height=pipeline.height,
        width=pipeline.width,
        fps=fps or native,
        image=family == "cogvideox" and bool(size.image_channels),
        revision=revision_of(model),
    )


def cut_of(
    target: Target,
    frames: str | None = None,
    seconds: str | None = None,
    size: str | None = None,
    aspects: str | None = None,
    segment: float | None = None,
    crop: str = "centre",
    upscale: float = 1.0,
) -> Cut:
    """How videos are cut for a target, from what a command line says; lists have commas between their items."""
    height, width = _sides(size) if size else (target.height, target.width)
    lengths = [_whole(word, "--frames") for word in frames.split(",")] if frames else []
    if seconds:
        lengths += [_frames_of(float(word), target) for word in seconds.split(",")]
    lengths = lengths or [target.frames]
    if target.family == "ttt":
        step = PIECE * target.fps
        if segment is not None or any((n - 1) % step for n in lengths):
            raise UsageError(f"windows for ttt are whole pieces of {PIECE} s; give --seconds, a multiple of {PIECE}")
        lengths = [step * pieces + 1 for pieces in range(1, (max(lengths) - 1) // step + 1)]
    return Cut(
        buckets(lengths, height, width, _aspects(aspects), target.unit(), target.valid),
        segment,
        "random" if crop == "random" else "centre",
        upscale,
    )


def converted(
    source: Path,
    origin: str,
    family: Family | None,
    model: str | None,
    times: str | None,
    out: Path,
    device: torch.device,
    progress: Progress,
) -> str:
    """Self-Forcing's LMDB of trajectories (with `times`) or latents, or TTT-Video's list, as kinema's data."""
    if origin == "ttt_video":
        return told(ttt_video(source, target_of("ttt", model), out, device, progress), out)
    text = target_of(family or "wan", model).text
    known = tuple(float(word) for word in times.split(",")) if times else ()
    conversion = ConvertLMDB(str(source), text, "ode_pairs" if known else "latents", known)
    with progress("items", conversion.header()["items"]) as each:
        shards.prepare(conversion, out, device, each=each)
    return f"{conversion.header()['items']} {conversion.kind} in {out}"


def checked(out: Path, progress: Progress) -> str:
    """What `--verify` says; UserError with what is wrong."""
    wrong = verify(out, progress)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{'; '.join(wrong[:5])}{more}")
    return f"{out} is whole"


def told(report: Report, out: Path) -> str:
    """What a person is told of a call."""
    lines = [f"{name}: {why}; left out" for name, why in [*report.left_out.items()][:20]]
    if len(report.left_out) > 20:
        lines.append(f"and {len(report.left_out) - 20} more left out, all in {out / 'skipped.jsonl'}")
    if report.missing:
        lines.append(f"{report.missing} samples and texts are for other parts to make; then run it without --part")
    lines.append(f"{report.samples} samples in {out}, {report.made} of them new")
    return "\n".join(lines)


def _aspects(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    if text == "all":
        return ASPECTS
    found = []
    for word in text.split(","):
        width, colon, height = word.partition(":")
        try:
            found.append(float(width) / float(height) if colon else float(width))
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"--aspects {word} is no aspect; give for example 16:9,1:1,9:16, or all") from None
    return tuple(found)


def _sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not height.isdecimal() or not width.isdecimal():
        raise UsageError(f"--size {text} is not HEIGHTxWIDTH; give for example 480x832")
    return int(height), int(width)


def _whole(word: str, option: str) -> int:
    if not word.strip().isdecimal():
        raise UsageError(f"{option} {word} is no number; give for example 49 or 17,33,49")
    return int(word)


def _frames_of(seconds: float, target: Target) -> int:
    """The most frames that the codec takes of so many seconds and the frame at their end."""
    most = int(seconds * target.fps + 1e-6) + 1
    for frames in range(most, 0, -1):
        try:
            target.valid(frames, target.height, target.width)
            return frames
        except UsageError:
            continue
    raise UsageError(f"{seconds:g} s at {target.fps} frames a second are too few")
