"""Videos become windows: each the frames of one sample, in a bucket, under the hash of all that makes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kinema import seeds
from kinema.data.buckets import Bucket, fitting
from kinema.data.clips import SLOWEST
from kinema.data.decode import Scanned
from kinema.data.listing import Footage, footage
from kinema.data.scanning import Notes, Progress, scans
from kinema.data.targets import PIECE, Target, sample_key, text_key
from kinema.errors import UserError


@dataclass(frozen=True)
class Cut:
    """How videos become samples.

    segment  seconds of the pieces that a video is cut into; None takes one window from its start
    crop     what is kept of a frame that is wider or higher than its bucket: the middle, or a place of each file's own
    upscale  the most that a video may be enlarged to fill a bucket
    """

    buckets: tuple[Bucket, ...]
    segment: float | None = None
    crop: Literal["centre", "random"] = "centre"
    upscale: float = 1.0


@dataclass(frozen=True)
class Window:
    """What becomes one sample: `bucket.frames` frames of a file from `start` seconds on."""

    key: str
    video: Path
    source: str
    start: float
    bucket: Bucket
    place: tuple[float, float]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """All samples of a folder, all their texts by key, and what was left out, by name, with the reason."""

    windows: list[Window]
    texts: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def plan(
    videos: Path,
    captions: Path | None,
    target: Target,
    cut: Cut,
    facts: dict[str, Any],
    notes: Notes,
    progress: Progress,
) -> Planned:
    """Scans what was not scanned before, and cuts every video into windows."""
    found, left_out = footage(videos, captions)
    known = scans([*dict.fromkeys(one.video for one in found)], notes, progress)
    windows, texts, seen = [], {}, {}
    for one in found:
        scanned = known[one.video]
        if isinstance(scanned, str):
            left_out[str(one.video)] = scanned
            continue
        try:
            cuts = cut_up(one, scanned, target, cut)
        except UserError as error:
            left_out[str(one.video)] = str(error)
            continue
        for start, bucket, told in cuts:
            said = {text_key(facts, text): text for text in target.texts(told, one.motion)}
            place = (0.5, 0.5) if cut.crop == "centre" else _place(scanned.digest)
            key = sample_key(facts, scanned.digest, start, bucket, place)
            if key in seen:
                left_out[f"{one.video} at {start:g} s"] = f"is the same as {seen[key]}"
                continue
            seen[key] = one.video
            texts |= said
            keys = tuple(text_key(facts, text) for text in target.texts(told, one.motion))
            windows.append(Window(key, one.video, scanned.digest, start, bucket, place, keys))
    if not windows:
        raise UserError(f"none of {len(found)} videos can be prepared: {first_of(left_out)}")
    return Planned(windows, texts, left_out)


def cut_up(one: Footage, scanned: Scanned, target: Target, cut: Cut) -> list[tuple[float, Bucket, tuple]]:
    """(start, bucket, texts) of the windows of a video. UserError, without its name, if there are none."""
    if scanned.rate < SLOWEST * target.fps:
        raise UserError(
            f"has {scanned.rate:g} frames a second: of {target.fps}, some would be shown twice; lower --fps"
        )
    fits = fitting(cut.buckets, scanned.height, scanned.width, cut.upscale)
    if not fits:
        smallest = min(cut.buckets, key=lambda b: b.height * b.width)
        raise UserError(
            f"is {scanned.height}x{scanned.width}, too small for {smallest.height}x{smallest.width}; allow --upscale"
        )
    shortest = fits[-1].frames

    def count(start: float) -> int:
        until = None if one.end is None else int((one.end - start) * target.fps + 1e-6) + 1
        there = scanned.frames_at(target.fps, start)
        return there if until is None else min(there, until)

    def longest(frames: int) -> Bucket | None:
        return next((bucket for bucket in fits if bucket.frames <= frames), None)

    if target.family == "ttt":
        made = _long_windows(one, count(one.start), fits, target.fps)
    elif cut.segment is not None:
        made, number = [], 0
        most = int(cut.segment * target.fps + 1e-6) + 1
        while len(one.told) == 1 or number < len(one.told):
            start = one.start + number * cut.segment
            bucket = longest(min(count(start), most))
            if bucket is None:
                break
            made.append((start, bucket, (one.told[number if len(one.told) > 1 else 0],)))
            number += 1
    elif len(one.told) > 1:
        raise UserError(f"has {len(one.told)} captions; cut it into pieces of --segment seconds")
    else:
        bucket = longest(count(one.start))
        made = [(one.start, bucket, one.told)] if bucket else []
    if not made:
        there = count(one.start)
        raise UserError(f"has {there} frames at {target.fps} a second from {one.start:g} s on, fewer than {shortest}")
    return made


def _long_windows(one: Footage, frames: int, fits: list[Bucket], fps: int) -> list[tuple[float, Bucket, tuple]]:
    """Windows of whole pieces, each with its text, one after the other; a single text is that of every piece."""
    step = PIECE * fps
    pieces = max(0, frames - 1) // step
    told = one.told * pieces if len(one.told) == 1 else one.told[:pieces]
    made, at = [], 0
    while bucket := next((b for b in fits if (b.frames - 1) // step <= len(told) - at), None):
        taken = (bucket.frames - 1) // step
        made.append((one.start + at * PIECE, bucket, told[at : at + taken]))
        at += taken
        if at >= len(told):
            break
    return made


def first_of(left_out: dict[str, str], count: int = 3) -> str:
    said = [f"{name}: {why}" for name, why in left_out.items()]
    return "; ".join(said[:count]) + (f" and {len(said) - count} more" if len(said) > count else "")


def _place(source: str) -> tuple[float, float]:
    """Where a file's frames are cropped, at random but always alike."""
    draw = seeds.keys(seeds.key_of("crop", source), "crop", [0]).uniform(2)[0].tolist()
    return draw[0], draw[1]
