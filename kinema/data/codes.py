"""Videos as tokens, with prompts as token ids: what URSA learns from, and prompts alone, which is all Di[M]O needs."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.data.pool import Pool, clip_of
from kinema.data.prompts import PromptSet
from kinema.data.sprites import World
from kinema.data.sprites_data import clips_of
from kinema.errors import UserError
from kinema.models.ursa.codec import URSACodec, latent_shape
from kinema.models.ursa.text import QwenText
from kinema.seeds import Keys

COLUMNS = ("caption", "text", "prompt")


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
        return [caption for caption, _ in self.read()]

    def read(self) -> Sequence[tuple[str, float | None]]:
        """Captions and their motion scores, None where there is none.

        UserError for files that are missing or have no captions, or where it is unclear which column has them.
        """
        path = Path(self.path)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in READERS]
        if not files or not all(file.exists() for file in files):
            raise UserError(f"there are no captions at {path}; give a {', '.join(READERS)} file or a folder of them")
        found = [one for file in files for one in self._captions(file)]
        if not found:
            raise UserError(f"{path} has no captions; write at least one")
        return found

    def _captions(self, file: Path) -> Iterator[tuple[str, float | None]]:
        try:
            for row in READERS[file.suffix](file):
                if caption := str(row[self._column(file, row)] or "").strip():
                    score = row.get(self.motion) if self.motion else None
                    yield caption, None if score in (None, "") else float(score)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the captions in {file} ({error}); repair or remove it") from error

    def _column(self, file: Path, row: dict[str, Any]) -> str:
        fitting = [self.column] if self.column else [name for name in COLUMNS if name in row]
        if len(fitting) != 1 or fitting[0] not in row:
            raise UserError(f"which column of {file} holds the captions? it has {', '.join(row)}; name one as `column`")
        return fitting[0]  # type: ignore[return-value]


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


def _table(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        yield from csv.DictReader(opened)


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as opened:
        yield from (json.loads(line) for line in opened if line.strip())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    yield from ({"caption": line} for line in file.read_text(encoding="utf-8-sig").splitlines())


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    for part in ParquetFile(file).iter_batches():
        yield from part.to_pylist()


READERS = {".csv": _table, ".jsonl": _objects, ".parquet": _parquet, ".txt": _lines}
