"""Videos as tokens, with prompts as token ids: what URSA learns from, and prompts alone, which is all Di[M]O needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.data.pool import Pool, clip_of
from kinema.data.prompts import PromptSet
from kinema.data.sprites import World
from kinema.data.sprites_data import clips_of
from kinema.data.tables import captions_of, scored_captions_of
from kinema.models.ursa.codec import URSACodec, latent_shape
from kinema.models.ursa.text import QwenText
from kinema.seeds import Keys


@dataclass(frozen=True)
class SpriteCodes:
    """Codes of `clips` clips, equally many of each world, with their captions.

    A caption is replaced by the unconditional text with probability `dropout`; `block` clips are encoded together.
    """

    worlds: tuple[World, ...]
    codec: URSACodec
    text: QwenText
    clips: int = 32768
    dropout: float = 0.1
    block: int = 16

    def open(self, seed: int, device: torch.device) -> Source:
        codec, text = self.codec.load(device), self.text.load(device)
        nothing = text.ids([text.unconditional])

        def make(numbers: range) -> dict[str, Tensor]:
            pixels, captions = clips_of(self.worlds, numbers, device)
            return {"codes": codec.encode(pixels).int(), "text": text(captions)["text"]}

        pool = Pool(self.clips, self.block, make)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = pool([clip_of(seed, n, pool.clips, pool.block) for n in samples])
            return conditioned(rows["codes"].long(), rows["text"], nothing, keys, self.dropout)

        return source


@dataclass(frozen=True)
class CaptionFiles:
    """Captions of a file, or of all files of a folder: csv, jsonl, parquet (needs pyarrow), txt with one a line.

    They may say how much their videos move.

    column   their name; None takes the only one of caption, text, prompt
    motion   name of the column of motion scores, if there is one
    """

    path: str
    column: str | None = None
    motion: str | None = None

    def prompts(self) -> Sequence[str]:
        return captions_of(Path(self.path), self.column)

    def read(self) -> Sequence[tuple[str, float | None]]:
        """Captions and their motion scores, None where there is none, read when asked for.

        UserError for files that are missing or have no captions, or where it is unclear which column has them.
        """
        return scored_captions_of(Path(self.path), self.column, self.motion)


@dataclass(frozen=True)
class CodePrompts:
    """Batches of prompts without videos: `video` is zeros of the shape of the codes.

    frames, height, width   size of the videos in pixels
    dropout                 how often a prompt is the unconditional text
    motion_told             how often a prompt with a known motion score says it, as in training
    """

    source: PromptSet
    codec: URSACodec
    text: QwenText
    frames: int
    height: int
    width: int
    dropout: float = 0.0
    motion_told: float = 0.6

    def open(self, seed: int, device: torch.device) -> Source:
        prompts, text = _scored(self.source), self.text.load(device)
        shape = latent_shape(self.codec.size, self.frames, self.height, self.width)
        nothing = text.ids([text.unconditional])

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            chosen = [prompts[clip_of(seed, n, len(prompts), 1)] for n in samples]
            tells = [_share(seed, n) < self.motion_told for n in samples]
            captions = tuple(told(*prompt, tell) for prompt, tell in zip(chosen, tells, strict=True))
            video = torch.zeros(1, *shape, dtype=torch.int64, device=device).expand(len(keys), -1, -1, -1)
            before = text.truncated
            made = conditioned(video, text.ids(captions), nothing, keys, self.dropout, captions)
            return replace(made, told={"truncated": (text.truncated - before) / len(captions)})

        return source


def _scored(source: PromptSet) -> Sequence[tuple[str, float | None]]:
    return source.read() if isinstance(source, CaptionFiles) else [(prompt, None) for prompt in source.prompts()]


def told(caption: str, motion: float | None, tell: bool) -> str:
    """The caption, with its motion score before it as URSA was trained to read it."""
    return f"motion={motion:.1f}, {caption}" if tell and motion is not None else caption


def conditioned(
    video: Tensor,
    text: Tensor,
    nothing: Tensor,
    keys: Keys,
    dropout: float,
    captions: tuple[str, ...] = (),
) -> Batch:
    """A batch whose texts `[B, L]` are replaced by `nothing` `[1, L]` with probability `dropout`."""
    dropped = keys.fold("text_drop").uniform(1) < dropout
    empty = nothing.expand_as(text)
    return Batch(video, keys, {"text": torch.where(dropped, empty, text)}, {"text": empty}, captions)


def _share(seed: int, sample: int) -> float:
    return seeds.shared(1 << 24, seed, "motion", sample) / (1 << 24)
