"""Prepared data on disk: a folder of numbered safetensors shards with a header that says what made them.

A shard is complete or not there, and each is a function of the header and its number alone. So whoever makes them can
be killed at any time and goes on with those that are missing, and several processes can share them out.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinema.errors import UserError
from kinema.files import write_text

HEADER = "header.json"
UNCONDITIONAL = "unconditional.safetensors"  # the text that stands for no text, embedded once


@dataclass(frozen=True, eq=False)
class Item:
    """One row of a dataset: its prompt and its tensors, of any shapes."""

    prompt: str
    tensors: dict[str, Tensor]


Make = Callable[[range], list[Item]]


class Preparation(Protocol):
    """What a recipe returns that makes data instead of training: a frozen dataclass."""

    @property
    def per_shard(self) -> int: ...
    def header(self) -> dict[str, Any]:
        """All that decides the values, as JSON. "kind" and "items" must be there."""
        ...

    def open(self, device: torch.device) -> tuple[Make, Tensor | None]:
        """What makes the items with the given numbers, and the embedding `[n, D]` of the unconditional text."""
        ...


def prepare(
    preparation: Preparation,
    folder: Path,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    each: Callable[[int], None] = lambda done: None,
) -> None:
    """Makes the shards that `folder` lacks; of several processes, `part` (i, n) makes every n-th from the i-th on.

    `each(done)` is told how many items of this part are there. UserError if the folder holds other data.
    """
    header = {**preparation.header(), "per_shard": preparation.per_shard}
    _claim(folder, header)
    spans = _spans(header["items"], header["per_shard"])
    ours = [number for number in range(len(spans)) if number % part[1] == part[0]]
    missing = [number for number in ours if not _path(folder, number).exists()]
    done = sum(len(spans[number]) for number in ours if number not in missing)
    each(done)
    if not missing:
        return
    make, unconditional = preparation.open(device)
    if unconditional is not None and not (folder / UNCONDITIONAL).exists():
        _write(folder / UNCONDITIONAL, {"text": unconditional}, {}, part[0])
    for number in missing:
        items = make(spans[number])
        tensors = {f"{i}.{name}": tensor for i, item in enumerate(items) for name, tensor in item.tensors.items()}
        _write(_path(folder, number), tensors, {"prompts": json.dumps([item.prompt for item in items])}, part[0])
        done += len(items)
        each(done)


@dataclass(frozen=True)
class Shards:
    """A finished folder, read at random by memory map. UserError if it is unfinished, or of another kind."""

    folder: Path
    kind: str
    header: dict[str, Any] = field(init=False, compare=False)

    def __post_init__(self):
        path = self.folder / HEADER
        if not path.exists():
            raise UserError(f"there is no prepared data in {self.folder}; make it with kinema prepare")
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); make the data again with kinema prepare") from error
        if header.get("kind") != self.kind:
            raise UserError(f"{self.folder} holds {header.get('kind')}, not {self.kind}; give the folder of those")
        spans = _spans(header["items"], header["per_shard"])
        there = sum(_path(self.folder, number).exists() for number in range(len(spans)))
        if there < len(spans):
            raise UserError(
                f"{self.folder} has {there} of {len(spans)} shards; the command that made them goes on where it stopped"
            )
        object.__setattr__(self, "header", header)

    def __len__(self) -> int:
        return self.header["items"]

    def prompt(self, index: int) -> str:
        number, place = divmod(index, self.header["per_shard"])
        return _prompts(_path(self.folder, number))[place]

    def tensor(self, index: int, name: str) -> Tensor:
        number, place = divmod(index, self.header["per_shard"])
        return _opened(_path(self.folder, number)).get_tensor(f"{place}.{name}")

    def unconditional(self) -> Tensor:
        """`[n, D]`."""
        return _opened(self.folder / UNCONDITIONAL).get_tensor("text")


def rows_of(texts: Sequence[Tensor]) -> list[int]:
    """The tokens of each text, rounded up to multiples of 8."""
    return [-(-len(text) // 8) * 8 for text in texts]


def pad_rows(texts: Sequence[Tensor], rows: int) -> Tensor:
    """Embeddings `[n, D]` of different lengths as one float32 tensor `[B, rows, D]`, zero beyond each."""
    longest = max(len(text) for text in texts)
    if longest > rows:
        raise UserError(f"a prompt has {longest} tokens, more than the {rows} rows of the data; raise run.data.rows")
    return torch.stack([F.pad(text.float(), (0, 0, 0, rows - len(text))) for text in texts])


def _spans(items: int, per_shard: int) -> list[range]:
    return [range(start, min(start + per_shard, items)) for start in range(0, items, per_shard)]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _claim(folder: Path, header: dict[str, Any]) -> None:
    path, plain = folder / HEADER, json.loads(json.dumps(header))
    if header["items"] < 1:
        raise UserError("there is nothing to prepare; give at least one prompt or video")
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for key in {**plain, **there}:
            if there.get(key) != plain.get(key):
                raise UserError(
                    f"{folder} holds data with {key} {there.get(key)}, not {plain.get(key)}; choose another folder "
                    f"with --out, or delete it"
                )
        return
    if folder.exists() and any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds shards without a header; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain, indent=1))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], part: int) -> None:
    draft = path.with_name(f".{path.stem}.{part}.writing")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata)
    draft.replace(path)


@lru_cache(maxsize=4096)
def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run kinema prepare again") from error


@lru_cache(maxsize=4096)
def _prompts(path: Path) -> list[str]:
    return json.loads(_opened(path).metadata()["prompts"])
