"""The LMDB layout of the public Self-Forcing and CausVid releases: trajectories or latents with their prompts.

An environment has `latents_shape` and `prompts_shape` (numbers in ASCII with spaces between), `latents_{i}_data` (a row
in float16) and `prompts_{i}_data` (UTF-8). A folder of such environments is one dataset, in the order of their names.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.data import ode_pairs
from kinema.data.shards import Item, Make
from kinema.errors import UserError
from kinema.models.text import UMT5

MAP = 1 << 40  # bytes an environment may grow to; address space, not disk


class PublicLMDB:
    """A dataset of one environment or a folder of them; `limit` caps the number of its rows, 0 does not."""

    def __init__(self, path: Path, limit: int = 0):
        folders = [path] if (path / "data.mdb").exists() else sorted(p.parent for p in path.glob("*/data.mdb"))
        if not folders:
            raise UserError(
                f"{path} is neither an LMDB environment nor a folder of them; give the folder with data.mdb"
            )
        self._shards = []
        for folder in folders:
            environment = _opened(folder.resolve())
            with environment.begin() as reading:
                shape = _numbers(reading.get(b"latents_shape"), folder)
            self._shards.append((environment, shape, folder))
        self._ends = list(accumulate(shape[0] for _, shape, _ in self._shards))
        self._count = min(limit or self._ends[-1], self._ends[-1])

    def __len__(self) -> int:
        return self._count

    def prompt(self, index: int) -> str:
        return self._get(index, "prompts").decode()

    def states(self, index: int) -> Tensor:
        """`[K + 1, T, C, h, w]` float16, from noise to data; rows of four dimensions are one state."""
        shape = self._shards[self._place(index)[0]][1][1:]
        data = self._get(index, "latents")
        if len(data) != 2 * math.prod(shape):
            raise UserError(f"row {index} has {len(data) // 2} numbers, not those of {shape}; the file is damaged")
        row = torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shape)
        return row[None] if row.ndim == 4 else row

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = next(i for i, end in enumerate(self._ends) if index < end)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _get(self, index: int, what: str) -> bytes:
        shard, local = self._place(index)
        environment, _, folder = self._shards[shard]
        with environment.begin() as reading:
            data = reading.get(f"{what}_{local}_data".encode())
        if data is None:
            raise UserError(f"{folder} has no {what}_{local}_data although its header counts it; copy it again")
        return data


def write(folder: Path, rows: Iterable[tuple[str, Tensor]]) -> int:
    """Writes (prompt, latents) rows as one environment and returns how many.

    A prompt that was there before is left out; all rows have the shape of the first, or it is a UserError. The headers
    are written last, from what was counted, so that an environment that was cut off has none.
    """
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    shape: tuple[int, ...] = ()
    environment = lmdb.open(str(folder), map_size=MAP)
    with environment:
        for prompt, row in rows:
            if prompt in seen:
                continue
            shape = shape or tuple(row.shape)
            if tuple(row.shape) != shape:
                raise UserError(f"the latents of {prompt[:60]!r} are {list(row.shape)}, not {list(shape)} as the first")
            with environment.begin(write=True) as writing:
                number = len(seen)
                writing.put(f"latents_{number}_data".encode(), row.detach().cpu().half().contiguous().numpy().tobytes())
                writing.put(f"prompts_{number}_data".encode(), prompt.encode())
            seen.add(prompt)
        if not seen:
            raise UserError(f"there are no rows to write to {folder}; give at least one")
        with environment.begin(write=True) as writing:
            writing.put(b"latents_shape", " ".join(map(str, (len(seen), *shape))).encode())
            writing.put(b"prompts_shape", str(len(seen)).encode())
    return len(seen)


def dictionaries(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The rows of torch files that each hold a {prompt: latents} dictionary, as the public scripts leave them.

    A leading dimension of 1, as those scripts have, is dropped.
    """
    for path in paths:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no dictionary of prompts and latents; give the files of the generation")
        for prompt, row in content.items():
            yield prompt, row[0] if row.shape[0] == 1 and row.ndim in (5, 6) else row


@dataclass(frozen=True)
class ConvertLMDB:
    """Turns a public dataset into kinema's shards with embedded prompts: a preparation.

    kind   "ode_pairs" keeps all states of a row, "latents" the last, which is clean
    times  of the states without the final 0, which the files do not say
    """

    path: str
    text: UMT5
    kind: Literal["ode_pairs", "latents"] = "ode_pairs"
    times: tuple[float, ...] = ()
    limit: int = 0
    per_shard: int = 64

    def header(self) -> dict[str, Any]:
        rows = PublicLMDB(Path(self.path), self.limit)
        states = len(rows.states(0))
        if self.kind == ode_pairs.KIND and states != len(self.times) + 1:
            raise UserError(
                f"the rows of {self.path} have {states} states, the last of them clean, but times lists "
                f"{len(self.times)}; list the other {states - 1}"
            )
        times = {"times": (*self.times, 0.0)} if self.kind == ode_pairs.KIND else {}
        return {
            "kind": self.kind,
            "items": len(rows),
            **times,
            "source": self.path,
            "encoder": self.text.path,
            "unconditional": self.text.unconditional,
        }

    def open(self, device: torch.device) -> tuple[Make, Tensor]:
        rows, text = PublicLMDB(Path(self.path), self.limit), self.text.load(device)

        def make(numbers: range) -> list[Item]:
            items = []
            for n in numbers:
                prompt, states = rows.prompt(n), rows.states(n)
                video = {"trajectory": states} if self.kind == ode_pairs.KIND else {"clean": states[-1]}
                items.append(Item(prompt, {**video, "text": text.embed(prompt).half()}))
            return items

        return make, text.embed(text.unconditional).half()


@lru_cache(maxsize=4096)  # LMDB opens an environment once in a process
def _opened(folder: Path) -> Any:
    import lmdb

    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"cannot read {folder} ({error}); copy it again") from error


def _numbers(header: bytes | None, folder: Path) -> tuple[int, ...]:
    if header is None:
        raise UserError(f"{folder} has no latents_shape; it was cut off while it was written, or is of another layout")
    return tuple(int(word) for word in header.decode().split())
