"""Text without videos: what distillation learns from. Its batches have conditions and captions, and no video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from kinema.data.batch import Batch, Source
from kinema.data.pool import Pool, clip_of
from kinema.data.shards import Item, Make, Shards, pad_rows, rows_of
from kinema.data.sprites import World
from kinema.data.tables import TEXT, Lines, captions_of
from kinema.errors import UsageError, UserError
from kinema.models.protocols import TextSpec
from kinema.seeds import Keys

KIND = "prompts"
BLOCK = 64  # prompts embedded together where they stay on the device


class PromptSet(Protocol):
    """A finite list of prompts that can be told from its description."""

    def prompts(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class PromptFile:
    """A UTF-8 text file with one prompt per line, in the order of the file, read when asked for.

    extended  another file whose lines are longer versions of these, to be embedded in their place
    limit     only the first `limit` prompts; 0 takes all
    """

    path: str
    extended: str | None = None
    limit: int = 0

    def prompts(self) -> Sequence[str]:
        """The texts to be embedded, read when asked for. UserError for files that are missing, empty or of unequal
        length."""
        lines = _lines(self.path)
        if self.extended is not None:
            longer = _lines(self.extended)
            if len(longer) != len(lines):
                raise UserError(
                    f"{self.extended} has {len(longer)} lines and {self.path} has {len(lines)}; line n of one must be "
                    f"the longer version of line n of the other"
                )
            lines = longer
        return _First(lines, self.limit)


@dataclass(frozen=True)
class PromptTable:
    """A column of a JSONL, CSV or Parquet file, or of all such files of a folder; rows are read when asked for.

    column  its name; None takes the only one of caption, text, prompt. Rows without a text are left out
    limit   only the first `limit` prompts; 0 takes all
    """

    path: str
    column: str | None = None
    limit: int = 0

    def prompts(self) -> Sequence[str]:
        return _First(captions_of(Path(self.path), self.column), self.limit)


@dataclass(frozen=True)
class SpritePrompts:
    """The captions of `clips` clips of the sprites worlds, which take turns."""

    worlds: tuple[World, ...]
    clips: int = 4096

    def __post_init__(self):
        if self.clips < 1:
            raise UsageError(f"clips is {self.clips}; it must be 1 or more")

    def prompts(self) -> Sequence[str]:
        k = len(self.worlds)
        told = [world.captions(range(-(-self.clips // k))) for world in self.worlds]
        return [told[n % k][n // k] for n in range(self.clips)]


@dataclass(frozen=True)
class Prompts:
    """Batches of prompts alone, embedded when they are met.

    rows      the length embeddings are padded to; 0: the longest of the batch
    resident  keep all embeddings on the device once they are made; needs `rows`
    """

    source: PromptSet
    text: TextSpec
    rows: int = 0
    resident: bool = False

    def __post_init__(self):
        _check_rows(self.rows, self.resident)

    def open(self, seed: int, device: torch.device) -> Source:
        prompts, text = self.source.prompts(), self.text.load(device)
        nothing = text.embed(text.unconditional)
        block = math.gcd(len(prompts), BLOCK)
        pool = Pool(len(prompts), block, lambda span: {"text": text.encode([prompts[n] for n in span], self.rows)})

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            numbers = [clip_of(seed, n, len(prompts), 1) for n in samples]
            captions = tuple(prompts[n] for n in numbers)
            rows = pool(numbers)["text"] if self.resident else [text.embed(prompt) for prompt in captions]
            return prompted(keys, rows, nothing, self.rows, captions)

        return source


@dataclass(frozen=True)
class EmbeddedPrompts:
    """Batches of prompts from a folder that `EmbedPrompts` made; `rows` and `resident` as in `Prompts`."""

    path: str
    rows: int = 0
    resident: bool = False

    def __post_init__(self):
        _check_rows(self.rows, self.resident)

    def open(self, seed: int, device: torch.device) -> Source:
        shards = Shards(Path(self.path), KIND)
        nothing = shards.unconditional()
        read = Rows(shards, ("text",), self.rows, self.resident, device)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            numbers = [clip_of(seed, n, len(shards), 1) for n in samples]
            captions = tuple(shards.prompt(number) for number in numbers)
            return prompted(keys, read(numbers)["text"], nothing, self.rows, captions)

        return source


@dataclass(frozen=True)
class EmbedPrompts:
    """Embeds prompts once: a preparation. Items: `text` `[n, D]` at the prompt's own length."""

    source: PromptSet
    text: TextSpec
    per_shard: int = 1024
    dtype: str = "bfloat16"

    def header(self) -> dict[str, Any]:
        prompts = self.source.prompts()
        return {
            "kind": KIND,
            "items": len(prompts),
            "encoder": self.text.path,
            "unconditional": self.text.unconditional,
        }

    def open(self, device: torch.device) -> tuple[Make, Tensor]:
        prompts, text, dtype = self.source.prompts(), self.text.load(device), getattr(torch, self.dtype)

        def make(numbers: range) -> list[Item]:
            return [Item(prompts[n], {"text": text.embed(prompts[n]).to(dtype)}) for n in numbers]

        return make, text.embed(text.unconditional).to(dtype)


class Rows:
    """Reads rows of finished shards: a list of tensors per field from memory map, or, `resident`, one on the device."""

    def __init__(self, shards: Shards, fields: Sequence[str], rows: int, resident: bool, device: torch.device):
        self._shards, self._fields, self._rows, self._device = shards, fields, rows, device
        self._pool = Pool(len(shards), math.gcd(len(shards), BLOCK), self._make) if resident else None

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor | list[Tensor]]:
        if self._pool is not None:
            return dict(self._pool(numbers))
        return {name: [self._shards.tensor(number, name) for number in numbers] for name in self._fields}

    def _make(self, span: range) -> dict[str, Tensor]:
        made = {}
        for name in self._fields:
            tensors = [self._shards.tensor(number, name) for number in span]
            made[name] = pad_rows(tensors, self._rows) if name == "text" else torch.stack(tensors)
        return {name: tensor.to(self._device) for name, tensor in made.items()}


def prompted(
    keys: Keys,
    texts: Tensor | Sequence[Tensor],
    nothing: Tensor,
    rows: int,
    captions: tuple[str, ...],
    dropout: float = 0.0,
) -> Batch:
    """A batch without videos: texts, as rows of different lengths or padded, beside the unconditional one `[n, D]`.

    That one also takes the place of a text with probability `dropout`.
    """
    device = keys.key.device
    if not isinstance(texts, Tensor):
        rows = rows or max(rows_of([*texts, nothing]))
        texts = pad_rows(texts, rows)
    texts = texts.to(device, torch.float32, non_blocking=True)
    empty = pad_rows([nothing], texts.shape[1]).to(device, non_blocking=True).expand_as(texts)
    if dropout:
        texts = torch.where(keys.fold("text_drop").uniform(1, 1) < dropout, empty, texts)
    none = torch.zeros(len(keys), 0, device=device)
    return Batch(none, keys, {"text": texts}, {"text": empty}, captions)


def _check_rows(rows: int, resident: bool) -> None:
    if resident and not rows:
        raise UsageError("texts that stay on the device need one length; set rows to the most tokens of any prompt")


class _First(Sequence):
    """The first `limit` of some texts; 0: all of them."""

    def __init__(self, texts: Sequence[str], limit: int):
        self._texts, self._count = texts, min(limit or len(texts), len(texts))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._texts[n] for n in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._texts[index % self._count]


class _Stripped(Sequence):
    """The lines of a UTF-8 text file without white space at their ends; blank ones but the last are empty prompts."""

    def __init__(self, path: str):
        self._rows = Lines(Path(path), ".txt")
        self._count = len(self._rows)
        while self._count and not self._text(self._count - 1):
            self._count -= 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._text(index)

    def _text(self, number: int) -> str:
        return self._rows[number][TEXT].rstrip()


def _lines(path: str) -> Sequence[str]:
    try:
        lines = _Stripped(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path} ({error}); give a UTF-8 text file, one a line") from error
    if not lines:
        raise UserError(f"{path} has no prompts; write one per line")
    return lines
