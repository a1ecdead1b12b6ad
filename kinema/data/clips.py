"""A folder of video files as training data: every clip is decoded and encoded once, when first asked for, and kept.

Meant for the tens to hundreds of clips that teach a style or a concept: latents and texts are in the memory of each
process, about 10 MB for 49 frames of 480 x 720.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.decode import clip_at, scan
from kinema.data.first_frame import FirstFrame
from kinema.data.pool import Pool, clip_of
from kinema.errors import UserError
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import T5
from kinema.seeds import Keys

SLOWEST = 0.95  # of the rate that is asked for: a clip of 23.976 is one of 24 frames a second
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A video file, what it shows, and at which second it starts."""

    video: Path
    caption: str
    start: float = 0.0


@dataclass(frozen=True)
class VideoFiles:
    """Latents of the clips that `listed` finds at `path`, sampled anew at every visit, with their captions' embeddings.

    Each clip is `frames` frames at `fps`, the nearest in time, scaled to cover `height` x `width` and cropped around
    its centre; shorter clips are left out and counted, and slower ones, of fewer frames a second, are refused. With
    probability `dropout` a caption is replaced by the encoder's unconditional text. `image` makes the first frame a
    condition, for image-to-video.
    """

    path: str
    codec: CogVideoXVAE
    text: T5
    frames: int = 49
    height: int = 480
    width: int = 720
    fps: float = 8.0
    dropout: float = 0.1
    image: FirstFrame | None = None

    def open(self, seed: int, device: torch.device) -> Source:
        clips = self._long_enough(listed(Path(self.path)))
        codec = self.codec.load(device)
        codec.latent_shape(self.frames, self.height, self.width)  # says which sizes there are, before the long work
        encoder = self.text.load(device)
        captions = {clip.caption: encoder([clip.caption])["text"][0].cpu() for clip in clips}
        nothing = encoder([encoder.unconditional])["text"]
        del encoder  # the largest network there is, no longer needed

        def make(numbers: range) -> dict[str, Tensor]:
            (clip,) = (clips[n] for n in numbers)
            pixels = fitted(clip_frames(clip, self.frames, self.fps), self.height, self.width)[None].to(device)
            mean, logvar = codec.moments(pixels)
            first = ((pixels[:, 0] + 1) * 127.5).round().byte()
            rows = {"mean": mean, "logvar": logvar, "text": captions[clip.caption][None], "first": first}
            return {name: tensor.cpu() for name, tensor in rows.items()}

        pool = Pool(len(clips), 1, make)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = {k: v.to(device) for k, v in pool([clip_of(seed, n, pool.clips, 1) for n in samples]).items()}
            latents = codec.latents(rows["mean"], rows["logvar"], keys.fold("posterior"))
            dropped = keys.fold("text_drop").uniform(1, 1) < self.dropout
            empty = nothing.expand_as(rows["text"])
            cond, uncond = {"text": torch.where(dropped, empty, rows["text"])}, {"text": empty}
            if self.image is not None:
                image = self.image(codec, rows["first"].float() / 127.5 - 1, latents.shape[1], keys)
                cond, uncond = {**cond, "image": image}, {**uncond, "image": image}
            return Batch(latents, keys, cond, uncond)

        return source

    def _long_enough(self, clips: list[Clip]) -> list[Clip]:
        scans = {clip: scan(clip.video) for clip in clips}
        if slow := [clip for clip in clips if scans[clip].rate < SLOWEST * self.fps]:
            raise UserError(
                f"{len(slow)} of {len(clips)} clips have fewer than {self.fps:g} frames a second, the first being "
                f"{slow[0].video} with {scans[slow[0]].rate:g}: some would be shown twice; leave them out or lower fps"
            )
        kept = [clip for clip in clips if scans[clip].frames_at(self.fps, clip.start) >= self.frames]
        if not kept:
            raise UserError(
                f"none of the {len(clips)} clips of {self.path} has {self.frames} frames at {self.fps:g} a second; "
                "ask for fewer frames or give longer clips"
            )
        if len(kept) < len(clips):
            left_out = len(clips) - len(kept)
            log.warning("%d of %d clips are shorter than %d frames and left out", left_out, len(clips), self.frames)
        return kept


def listed(path: Path) -> list[Clip]:
    """The clips of a JSONL file with `video`, `caption` and perhaps `start` in each line, or of a folder: one with
    videos.txt and prompts.txt, line by line, or one with videos/ and labels/, files of the same name.

    Raises UserError with all that is wrong: counts that differ, files that are missing, captions that are empty, clips
    listed twice.
    """
    if path.is_file():
        clips = _of_lines(path)
    elif (path / "prompts.txt").exists() and (path / "videos.txt").exists():
        videos, prompts = (_lines(path / name) for name in ("videos.txt", "prompts.txt"))
        if len(videos) != len(prompts):
            raise UserError(
                f"{path} lists {len(videos)} videos but {len(prompts)} prompts; give each video its own line in both"
            )
        clips = [Clip(path / video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    elif (path / "videos").is_dir() and (path / "labels").is_dir():
        clips = [_labelled(video, path / "labels") for video in sorted((path / "videos").iterdir())]
    else:
        raise UserError(
            f"{path} is neither a JSONL file nor a folder with videos.txt and prompts.txt or with videos/ and labels/; "
            "give one of these"
        )
    wrong = [f"{clip.video} does not exist" for clip in clips if not clip.video.is_file()]
    wrong += [f"{clip.video} has no caption" for clip in clips if not clip.caption.strip()]
    twice = {(clip.video, clip.start) for i, clip in enumerate(clips) if clip in clips[:i]}
    wrong += [f"{video} is listed twice" for video, _ in sorted(twice)]
    if wrong or not clips:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path}: {'; '.join(wrong[:5]) or 'there are no clips'}{more}; correct the list")
    return clips


def clip_frames(clip: Clip, frames: int, fps: float) -> Tensor:
    """`[frames, 3, H, W]` float32 in [-1, 1] of a clip at `fps` frames a second: each the nearest in time."""
    return clip_at(clip.video, [clip.start + i / fps for i in range(frames)]).float() / 127.5 - 1


def fitted(video: Tensor, height: int, width: int) -> Tensor:
    """`[T, 3, H, W]` scaled to cover `height` x `width` with its aspect kept, and cropped around its centre."""
    scale = max(height / video.shape[2], width / video.shape[3])
    rows, columns = max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))
    if (rows, columns) != tuple(video.shape[2:]):
        video = F.interpolate(video, (rows, columns), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (rows - height) // 2, (columns - width) // 2
    return video[:, :, top : top + height, left : left + width]


def _of_lines(path: Path) -> list[Clip]:
    clips = []
    for number, line in enumerate(_lines(path), start=1):
        if not line:
            continue
        try:
            entry: dict[str, Any] = json.loads(line)
            start = float(entry.get("start", 0.0))
            clips.append(Clip(path.parent / str(entry["video"]), str(entry["caption"]), start))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: {error!r}; each line is a JSON object with video and caption"
            ) from None
    return clips


def _labelled(video: Path, labels: Path) -> Clip:
    label = labels / f"{video.stem}.txt"
    if not label.exists():
        raise UserError(f"{video} has no caption {label}; write one")
    return Clip(video, " ".join(_lines(label)))


def _lines(path: Path) -> list[str]:
    """The lines of a text file, blank ones at its end left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({error}); correct the file") from error
    return [line.strip() for line in text.rstrip().splitlines()]
