"""The sprites world as training data: pixels for a codec, captions for an encoder, latents and both for a generator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.pool import Pool, clip_of
from kinema.data.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SHAPES, SIZES, Scene
from kinema.data.sprites import World, render
from kinema.data.tokenizer import tokenizer
from kinema.errors import UsageError
from kinema.models.text import UMT5
from kinema.models.wan.vae import WanVAE
from kinema.seeds import Keys

BLOCK = 16  # clips rendered together


@dataclass(frozen=True)
class SpriteVideos:
    """Random windows of `frames` frames of the pixels of `clips` clips."""

    world: World = field(default_factory=World)
    frames: int = 13
    clips: int = 4096

    def __post_init__(self):
        _at_least_one(frames=self.frames, clips=self.clips)
        if self.frames > self.world.frames:
            raise UsageError(f"frames is {self.frames}, but a clip of this world has {self.world.frames}; use fewer")

    def open(self, seed: int, device: torch.device) -> Source:
        def make(numbers: range) -> dict[str, Tensor]:
            return {"pixels": ((render(self.world, list(numbers), device) + 1) * 127.5).round().byte()}

        pool = Pool(self.clips, BLOCK, make)
        windows = self.world.frames - self.frames + 1

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            pixels = pool([clip_of(seed, n, pool.clips, pool.block) for n in samples])["pixels"]
            start = keys.fold("window").integers(windows)
            index = start[:, None] + torch.arange(self.frames, device=start.device)
            window = pixels[torch.arange(len(pixels), device=start.device)[:, None], index]
            return Batch(window.float() / 127.5 - 1, keys)

        return source


@dataclass(frozen=True)
class SpriteLatents:
    """Latents of `clips` clips, equally many of each world, with their captions' embeddings.

    A caption is replaced by the encoder's unconditional text with probability `dropout`. `rows` is the length that
    embeddings are padded to, more than the tokens of any caption; `block` is how many clips are rendered and encoded
    together.
    """

    worlds: tuple[World, ...]
    codec: WanVAE
    text: UMT5
    clips: int = 32768
    dropout: float = 0.1
    rows: int = 40
    block: int = 16

    def __post_init__(self):
        _at_least_one(worlds=len(self.worlds), clips=self.clips, rows=self.rows, block=self.block)
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"dropout is {self.dropout}; it is a probability, from 0 to 1")

    def open(self, seed: int, device: torch.device) -> Source:
        codec, text = self.codec.load(device), self.text.load(device)
        nothing = text.encode([text.unconditional], self.rows)

        def make(numbers: range) -> dict[str, Tensor]:
            pixels, captions = clips_of(self.worlds, numbers, device)
            return {"latents": codec.encode(pixels), "text": text.encode(captions, self.rows)}

        pool = Pool(self.clips, self.block, make)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = pool([clip_of(seed, n, pool.clips, pool.block) for n in samples])
            dropped = keys.fold("text_drop").uniform(1, 1) < self.dropout
            empty = nothing.expand_as(rows["text"])
            return Batch(rows["latents"], keys, {"text": torch.where(dropped, empty, rows["text"])}, {"text": empty})

        return source


@dataclass(frozen=True)
class SpriteCaptions:
    """Captions with what they state, for a text encoder to learn to read."""

    world: World = field(default_factory=World)
    clips: int = 65536
    rows: int = 40

    def __post_init__(self):
        _at_least_one(clips=self.clips, rows=self.rows)

    def open(self, seed: int, device: torch.device) -> Source:
        words = tokenizer()
        words.enable_padding(length=self.rows)

        def make(numbers: range) -> dict[str, Tensor]:
            ids = [encoding.ids for encoding in words.encode_batch(self.world.captions(numbers))]
            labels = [attributes(scene) for scene in self.world.scenes(numbers)]
            return {"ids": torch.tensor(ids, device=device), "labels": torch.tensor(labels, device=device)}

        pool = Pool(self.clips, BLOCK, make)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = pool([clip_of(seed, n, pool.clips, pool.block) for n in samples])
            return Batch(rows["labels"], keys, {"ids": rows["ids"], "mask": rows["ids"] != 0})

        return source


def clips_of(worlds: Sequence[World], numbers: Sequence[int], device: torch.device) -> tuple[Tensor, list[str]]:
    """Pixels and captions of the clips with these numbers. The worlds take turns: n is of world n mod their number."""
    k = len(worlds)
    pixels: list[Tensor] = [torch.empty(0)] * len(numbers)
    captions = [""] * len(numbers)
    for w, world in enumerate(worlds):
        places = [place for place, n in enumerate(numbers) if n % k == w]
        indices = [numbers[place] // k for place in places]
        if indices:
            made = zip(places, render(world, indices, device), world.captions(indices), strict=True)
            for place, video, caption in made:
                pixels[place], captions[place] = video, caption
    return torch.stack(pixels), captions


def classes() -> tuple[int, ...]:
    """How many values each attribute of `attributes` has."""
    one = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(MOTIONS) + 1)
    return (len(KINDS), len(BACKGROUNDS), *one, *one)


def attributes(scene: Scene) -> list[int]:
    """A scene as class numbers; what a scene without a second object lacks has the last class."""
    numbers = [KINDS.index(scene.kind), list(BACKGROUNDS).index(scene.background)]
    for place in range(2):
        if place < len(scene.sprites):
            s = scene.sprites[place]
            said = ((SHAPES, s.shape), (COLOURS, s.colour), (SIZES, s.size), (MOTIONS, s.motion))
            numbers += [list(names).index(name) for names, name in said]
        else:
            numbers += [len(SHAPES), len(COLOURS), len(SIZES), len(MOTIONS)]
    return numbers


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be 1 or more")
