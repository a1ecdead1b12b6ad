"""Long videos with a prompt for each segment: stories of the sprites world, and the public code's files. (Those that
`kinema prepare` made are `PreparedStories`.)

Segments of a fixed number of latent frames share their first frame with the one before; so C segments have
C · stride + 1. A causal autoencoder makes the first frames the same whatever follows, so the latents of the longest
video of a story serve shorter ones too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.pool import Pool, clip_of
from kinema.data.prepared_videos import padded
from kinema.data.scenes import Story
from kinema.data.sprites import World, render_story
from kinema.errors import UsageError, UserError
from kinema.files import whole
from kinema.models.hub import located
from kinema.models.protocols import CodecSpec, TextSpec
from kinema.seeds import Keys, key_of


@dataclass(frozen=True)
class SpriteStories:
    """Latents of `clips` stories of `segments` scenes, with the embedding of each scene's caption.

    recall   who comes again is only called "the first one": what it looks like has to be remembered
    dropout  with this probability all captions of a story become the unconditional text
    rows     the length of every caption's embedding
    block    how many stories are rendered and encoded together
    kept     a folder whose files keep what was encoded, for other runs on the same stories; "": nothing is kept
    """

    world: World
    codec: CodecSpec
    text: TextSpec
    segments: int
    clips: int = 2048
    recall: bool = True
    dropout: float = 0.1
    rows: int = 40
    block: int = 4
    kept: str = ""

    def __post_init__(self):
        _check(self.segments, self.dropout)
        if self.clips < 1 or self.rows < 1 or self.block < 1:
            raise UsageError(f"clips {self.clips}, rows {self.rows} and block {self.block} must be 1 or more")

    def open(self, seed: int, device: torch.device) -> Source:
        pool, nothing = self._pool(device)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = pool([clip_of(seed, n, pool.clips, pool.block) for n in samples])
            empty = nothing.expand_as(rows["text"])
            dropped = keys.fold("text_drop").uniform(1, 1, 1) < self.dropout
            return Batch(rows["latents"], keys, {"text": torch.where(dropped, empty, rows["text"])}, {"text": empty})

        return source

    def _pool(self, device: torch.device) -> tuple[Pool, Tensor]:
        """The stories, and the embedding `[S, D]` of the unconditional text."""
        file = Path(self.kept) / f"{self.segments}-scenes-{self._key()}.safetensors" if self.kept else None
        if file is not None and file.exists():
            rows = load_file(file, device=str(device))
            nothing = rows.pop("nothing")
            return Pool.of(rows, self.block), nothing
        codec, text = self.codec.load(device), self.text.load(device)
        nothing = text.encode([text.unconditional], self.rows)[0]

        def make(numbers: range) -> dict[str, Tensor]:
            pixels, _, captions = stories_of(self.world, numbers, self.segments, self.recall, device)
            rows = text.encode([caption for told in captions for caption in told], self.rows)
            return {"latents": codec.encode(pixels), "text": rows.unflatten(0, (-1, self.segments))}

        pool = Pool(self.clips, self.block, make)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            all_rows = {**pool(range(pool.clips)), "nothing": nothing}
            with whole(file) as draft:
                save_file({name: tensor.cpu().contiguous() for name, tensor in all_rows.items()}, draft)
        return pool, nothing

    def _key(self) -> str:
        """Of all that decides the stories: these fields, and the files of the networks that encode them."""
        parts = (located(self.codec.path, "vae") / "vae", located(self.text.path, "text_encoder") / "text_encoder")
        files = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
        made_by = [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files]
        return f"{key_of(repr(replace(self, kept='', dropout=0.0)), *made_by) % (1 << 64):016x}"


def stories_of(
    world: World, numbers: Sequence[int], scenes: int, recall: bool = True, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[Story], list[list[str]]]:
    """Pixels, stories and their captions. Scenes after the first leave out a frame, which they share with the one
    before: `[B, 1 + scenes · (frames - 1), 3, size, size]`."""
    stories, captions = told_of(world, numbers, scenes, recall)
    whole = render_story(world, numbers, scenes, device).unflatten(1, (scenes, world.frames))
    return torch.cat([whole[:, 0, :1], whole[:, :, 1:].flatten(1, 2)], dim=1), stories, captions


def told_of(
    world: World, numbers: Sequence[int], scenes: int, recall: bool = True
) -> tuple[list[Story], list[list[str]]]:
    """Stories and their captions."""
    stories = [world.story(n, scenes) for n in numbers]
    return stories, [world.story_captions(story, n, recall) for story, n in zip(stories, numbers, strict=True)]


@dataclass(frozen=True)
class PublicSegments:
    """Encoded long videos from the files of the public code for arXiv 2504.05298: a JSON line for each, with `vid_emb`,
    a torch file `[T, 2C, h, w]`, mean and logarithm of the variance, unscaled, and `text_chunk_emb`, one torch file
    `[S, D]` for each segment, padded already.

    index  the JSON lines; their paths are absolute or relative to `root`, "" being the folder of the index
    uncond  a torch file with the embedding of the unconditional text; None: zeros
    scale  by which latents are multiplied; the public code uses 1
    """

    index: str
    segments: int
    root: str = ""
    uncond: str | None = None
    scale: float = 1.0
    stride: int = 12
    dropout: float = 0.1

    def __post_init__(self):
        _check(self.segments, self.dropout)

    def open(self, seed: int, device: torch.device) -> Source:
        index = Path(self.index)
        root = Path(self.root) if self.root else index.parent
        entries = _entries(index)
        nothing = None if self.uncond is None else _tensor(Path(self.uncond), self.index)

        def read(number: int) -> tuple[Tensor, list[Tensor]]:
            entry, where = entries[number], f"line {number + 1} of {self.index}"
            texts = entry["text_chunk_emb"]
            moments = _tensor(root / entry["vid_emb"], where)
            wanted = self.segments * self.stride + 1
            if len(texts) != self.segments or len(moments) != wanted:
                raise UserError(
                    f"{where} has {len(texts)} texts and {len(moments)} latent frames, not {self.segments} and "
                    f"{wanted}; give the list made for this length"
                )
            return moments, [_tensor(root / path, where) for path in texts]

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            made = [read(clip_of(seed, n, len(entries), 1)) for n in samples]
            rows = max(len(text) for _, texts in made for text in texts)
            empty = torch.zeros_like(made[0][1][0]) if nothing is None else nothing
            return _batch(made, empty, self.scale, max(rows, len(empty)), self.dropout, keys, device)

        return source


def _batch(
    made: Sequence[tuple[Tensor, list[Tensor]]],
    nothing: Tensor,
    scale: float,
    rows: int,
    dropout: float,
    keys: Keys,
    device: torch.device,
) -> Batch:
    moments = torch.stack([moments for moments, _ in made]).to(device, torch.float32, non_blocking=True)
    mean, logvar = moments.chunk(2, dim=2)
    video = scale * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * keys.fold("posterior").normal(*mean.shape[1:]))
    text, valid = (part.to(device, non_blocking=True) for part in padded([texts for _, texts in made], rows))
    empty, known = (part.to(device) for part in padded([[nothing]], rows))
    empty, known = empty.expand_as(text), known.expand_as(valid)
    dropped = keys.fold("text_drop").uniform(1, 1) < dropout
    cond = {
        "text": torch.where(dropped[..., None], empty, text),
        "valid": torch.where(dropped, known, valid),
    }
    if all(len(text) == rows for text in (nothing, *(text for _, texts in made for text in texts))):  # no padding
        return Batch(video, keys, {"text": cond["text"]}, {"text": empty})
    return Batch(video, keys, cond, {"text": empty, "valid": known})


def _entries(index: Path) -> list[dict[str, Any]]:
    try:
        lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"cannot read {index}: {error.strerror}; give a list of videos, one JSON object a line"
        ) from error
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["vid_emb"], str) or not isinstance(entry["text_chunk_emb"], list):
                raise KeyError("vid_emb")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'line {number} of {index} is not {{"vid_emb": path, "text_chunk_emb": [path, …]}}; correct it'
            ) from error
        entries.append(entry)
    if not entries:
        raise UserError(f"{index} lists no videos; give a list of them, one JSON object a line")
    return entries


def _tensor(path: Path, where: str) -> Tensor:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no tensor makes of torch
        raise UserError(f"{where}: cannot read {path} ({str(error).splitlines()[0]}); make it again") from error
    if not isinstance(tensor, Tensor):
        raise UserError(f"{where}: {path} holds no tensor; make it again")
    return tensor


def _check(segments: int, dropout: float) -> None:
    if segments < 1:
        raise UsageError(f"segments is {segments}; a video has 1 or more")
    if not 0 <= dropout <= 1:
        raise UsageError(f"dropout is {dropout}; it is a probability, from 0 to 1")
