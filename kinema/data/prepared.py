"""Reads what `kinema prepare` made of videos: sample n of a run is a function of (seed, n) over buckets and shards.

Values are memory-mapped and copied once, into the batch; threads read ahead. There is nothing to save: a resumed run,
on any number of ranks, meets the same samples.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kinema.data import store
from kinema.data.buckets import Order
from kinema.data.prefetch import Ahead
from kinema.errors import UserError


@dataclass(frozen=True, eq=False)
class Rows:
    """Some samples of one bucket: their numbers in the folder, one tensor for each field, and their texts."""

    numbers: tuple[int, ...]
    tensors: dict[str, Tensor]
    texts: list[list[Tensor]]
    words: list[list[dict[str, Any]]]


class Prepared:
    """A finished folder. UserError if it is unfinished, damaged, or not of one of `families`."""

    def __init__(self, folder: Path, families: Sequence[str] = ()):
        self.folder, self.manifest = folder, store.read_manifest(folder)
        if families and self.manifest.get("family") not in families:
            raise UserError(
                f"{folder} was prepared for {self.manifest.get('family')}, not for {' or '.join(families)}; prepare "
                f"the videos again with --for {families[0]}"
            )
        if not self.manifest.get("complete"):
            raise UserError(f"{folder} is not finished; the command that made it goes on where it stopped")
        try:
            self._index = load_file(folder / store.INDEX)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / store.INDEX} ({error}); run kinema prepare again") from error
        self._shards, self._texts = store.Reader(folder / "shards"), store.Reader(folder / "texts")
        self._ends, bucket = self._index["text_end"], self._index["bucket"]
        self.buckets = [(bucket == b).nonzero()[:, 0] for b in range(int(bucket.max()) + 1)]  # numbers of samples

    def __len__(self) -> int:
        return len(self._index["key"])

    def at_least(self, pieces: int, path: str) -> "Prepared":
        """The same folder with its samples of so many texts or more, all as one bucket."""
        lengths = torch.diff(self._ends, prepend=torch.zeros(1, dtype=torch.int64))
        enough = (lengths >= pieces).nonzero()[:, 0]
        sizes = {bucket.split("x", 1)[1] for bucket in self.manifest["buckets"]}
        if not len(enough) or len(sizes) > 1:
            what = f"windows of {len(sizes)} sizes" if len(sizes) > 1 else f"no window of {pieces} pieces"
            raise UserError(f"{path} has {what}; prepare it with --seconds {3 * pieces} or more, and one size")
        chosen = copy.copy(self)
        chosen.buckets = [enough]
        return chosen

    def key(self, number: int) -> str:
        return bytes(self._index["key"][number].tolist()).hex()

    def tensors(self, number: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        return self._shards.tensors(self._shard(number), self.key(number), names)

    def record(self, number: int) -> dict[str, Any]:
        return self._shards.record(self._shard(number), self.key(number))

    def read(
        self,
        numbers: Sequence[int],
        names: Sequence[str],
        texts: bool = True,
        pinned: bool = False,
        frames: int | None = None,
    ) -> Rows:
        """Samples of one bucket, or their first `frames` frames."""
        likes = self._shards.shapes(self._shard(numbers[0]), self.key(numbers[0]), names)
        out = {
            name: torch.empty((len(numbers), *_cut(shape, frames)), dtype=dtype, pin_memory=pinned)
            for name, (shape, dtype) in likes.items()
        }
        for place, number in enumerate(numbers):
            self._shards.into(self._shard(number), self.key(number), {name: rows[place] for name, rows in out.items()})
        told = [self._told(number) for number in numbers]
        kept = [[self._texts.tensors(shard, key).get("text") for shard, key in one] if texts else [] for one in told]
        words = [[self._texts.record(shard, key) for shard, key in one] for one in told]
        return Rows(tuple(numbers), out, kept, words)  # type: ignore[arg-type]

    def unconditional(self) -> Tensor:
        """`[n, D]`."""
        shard = self._texts.keys()[store.UNCONDITIONAL]
        return self._texts.tensors(shard, store.UNCONDITIONAL)["text"]

    def damage(self) -> list[str]:
        """What is wrong with the index: samples or texts that are not where it says, or not of their bucket."""
        wrong = []
        for number in range(len(self)):
            try:
                rows, record = self.tensors(number), self.record(number)
                frames = next(iter(rows.values())).shape[0]
                if frames > record["bucket"]["frames"] or any(not _finite(tensor) for tensor in rows.values()):
                    wrong.append(f"sample {self.key(number)} is not what its record says")
                for shard, key in self._told(number):
                    self._texts.tensors(shard, key)
            except UserError as error:
                wrong.append(str(error))
        return wrong

    def close(self) -> None:
        """Gives back the shards, which a process has open once and cannot write to meanwhile."""
        self._shards.close()
        self._texts.close()

    def _shard(self, number: int) -> str:
        return self.manifest["shards"][int(self._index["shard"][number])]

    def _told(self, number: int) -> list[tuple[str, str]]:
        """(shard, key) of a sample's texts."""
        start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        keys, shards = self._index["text"][start:end].tolist(), self._index["text_shard"][start:end].tolist()
        return [(self.manifest["text_shards"][s], bytes(key).hex()) for s, key in zip(shards, keys, strict=True)]


class Visits:
    """The samples that a run's numbers stand for, read ahead.

    `mix` buckets share an optimizer step; every rank's passes must be of one bucket, so a step is divided into so many
    parts. UserError if that cannot be.
    """

    def __init__(
        self,
        data: Prepared,
        seed: int,
        names: Sequence[str],
        mix: int = 1,
        texts: bool = True,
        pinned: bool = False,
        frames: int | None = None,
    ):
        self.data, self.seed, self.mix = data, seed, mix
        self._read = lambda rows: data.read(rows, names, texts, pinned, frames)
        self._ahead: dict[int, Ahead[Rows]] = {}

    def __call__(self, samples: Sequence[int], step: int) -> Rows:
        """The rows of these numbers; `step` is how many samples an optimizer step has."""
        if step % self.mix or step // self.mix % len(samples):
            raise UserError(
                f"a step of {step} samples is not {self.mix} parts of whole passes of {len(samples)}; change "
                "run.data.mix, run.batch_size or run.micro_batch"
            )
        if step not in self._ahead:
            order = Order(self.seed, tuple(len(b) for b in self.data.buckets), step // self.mix)
            self._ahead[step] = Ahead(lambda numbers: self._read(self._numbers(order, numbers)))
        return self._ahead[step](samples)

    def _numbers(self, order: Order, samples: Sequence[int]) -> list[int]:
        return [int(self.data.buckets[bucket][place]) for bucket, place in map(order, samples)]


def _cut(shape: Sequence[int], frames: int | None) -> tuple[int, ...]:
    return tuple(shape) if frames is None else (frames, *shape[1:])


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
