"""Prepared samples on disk: LMDB shards whose values are safetensors, and a manifest that says what made them.

A sample is written in one transaction under a key that is a hash of all that decides its value. So whoever prepares can
be killed at any time: a sample is there, whole, or not. Several processes write at once, each into shards of its own,
and what is read does not depend on who wrote what: samples are in the order of their keys.

    DATA/manifest.json          models and their hashes, scaling, frame rate, buckets, and, once all is there, counts
    DATA/shards/PART-NNNN/      LMDB: `KEY` → safetensors, `r:KEY` → JSON of what the sample is
    DATA/texts/PART-NNNN/       the same for texts, whose keys are hashes of their words; `UNCONDITIONAL` is one of them
    DATA/index.safetensors      keys in order, with the shard and bucket of each, written when all is there
    DATA/samples.jsonl          a line for each sample; skipped.jsonl: what was left out, and why
"""

import fcntl
import json
import resource
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from kinema.errors import UserError

FORMAT = 1
MANIFEST, INDEX, SAMPLES, SKIPPED = "manifest.json", "index.safetensors", "samples.jsonl", "skipped.jsonl"
UNCONDITIONAL = "unconditional"  # key of the text that stands for no text
RECORD = b"r:"
SHARD = 1 << 32  # bytes after which a shard is full
MAP = 1 << 30  # what a shard's map grows by
COMMIT = 1.0  # seconds, and
PENDING = 1 << 26  # bytes, of finished samples that a kill may cost at most
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


class Writer:
    """Appends samples to the shards `part-NNNN` of one folder; the only process that does, as a lock sees to."""

    def __init__(self, folder: Path, part: str, shard: int = SHARD):
        self.folder, self.part, self.shard = folder, part, shard
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / f".{part}.lock", "w")  # noqa: SIM115 - held until the writer is closed
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        there = sorted(folder.glob(f"{part}-*"))
        self._number = max(0, len(there) - 1)
        self._environment = _writable(self._path)
        self._pending: list[tuple[bytes, bytes]] = []
        self._size, self._since = 0, time.monotonic()

    def put(self, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Adds a sample. It is on disk at the latest after the next second's `put`, or `close`."""
        value = save_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        said = json.dumps({**record, "crc": zlib.crc32(value)}, ensure_ascii=False, sort_keys=True).encode()
        self._pending += [(key.encode(), value), (RECORD + key.encode(), said)]
        self._size += len(value)
        if self._size >= PENDING or time.monotonic() - self._since >= COMMIT:
            self.commit()

    def commit(self) -> None:
        """Puts what was added onto the disk, all of it or, if this is where one is killed, nothing."""
        if self._pending and _used(self._path) >= self.shard:
            self._environment.close()
            self._number += 1
            self._environment = _writable(self._path)
        while self._pending:
            try:
                with self._environment.begin(write=True) as writing:
                    for key, value in self._pending:
                        writing.put(key, value)
                break
            except _lmdb().MapFullError:
                self._environment.set_mapsize(self._environment.info()["map_size"] + MAP + 2 * self._size)
        self._pending, self._size, self._since = [], 0, time.monotonic()

    def close(self) -> None:
        self.commit()
        self._environment.close()
        self._lock.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.part}-{self._number:04d}"


class Reader:
    """The shards of a folder, by memory map. Threads may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = (
            sorted(path.name for path in folder.iterdir() if (path / "data.mdb").exists()) if folder.is_dir() else []
        )
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._release = weakref.finalize(self, _release, self._opened)
        _allow_files(len(self.names))

    def records(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(key, shard, record) of all samples."""
        for name in self.names:
            with self._environment(name).begin() as reading, reading.cursor() as cursor:
                if not cursor.set_range(RECORD):
                    continue
                for key, value in cursor:
                    if not key.startswith(RECORD):
                        break
                    yield key[len(RECORD) :].decode(), name, json.loads(value)

    def keys(self) -> dict[str, str]:
        """The shard of each key."""
        found = {}
        for name in self.names:
            with self._environment(name).begin() as reading, reading.cursor() as cursor:
                if cursor.set_range(RECORD):
                    for key in cursor.iternext(keys=True, values=False):
                        if not key.startswith(RECORD):
                            break
                        found[key[len(RECORD) :].decode()] = name
        return found

    def record(self, shard: str, key: str) -> dict[str, Any]:
        return json.loads(self._bytes(shard, RECORD + key.encode()))

    def tensors(self, shard: str, key: str, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A sample's tensors, or those with the given names, copied once from the map."""
        with self._reading(shard, key, names) as views:
            return {name: view.clone() for name, view in views.items()}

    def into(self, shard: str, key: str, out: Mapping[str, Tensor]) -> None:
        """Copies a sample's tensors from the map to where they are wanted, in `out`'s dtypes."""
        with self._reading(shard, key, tuple(out)) as views:
            for name, view in views.items():
                out[name].copy_(view[: len(out[name])])

    def shapes(self, shard: str, key: str, names: Sequence[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of a sample's tensors."""
        with self._reading(shard, key, names) as views:
            return {name: (tuple(view.shape), view.dtype) for name, view in views.items()}

    def value(self, shard: str, key: str) -> bytes:
        return self._bytes(shard, key.encode())

    def close(self) -> None:
        self._release()

    @contextmanager
    def _reading(self, shard: str, key: str, names: Sequence[str] | None) -> Iterator[dict[str, Tensor]]:
        """A sample's tensors in the map, as long as the block lasts."""
        with self._environment(shard).begin(buffers=True) as reading:
            value = reading.get(key.encode())
            if value is None:
                raise UserError(f"{self.folder / shard} has no {key}; run kinema prepare --verify")
            try:
                views = _views(value, names)
            except (ValueError, KeyError, RuntimeError, struct.error) as error:
                raise UserError(
                    f"{self.folder / shard}: {key} is damaged ({error}); run kinema prepare --verify"
                ) from error
            yield views

    def _bytes(self, shard: str, key: bytes) -> bytes:
        with self._environment(shard).begin() as reading:
            value = reading.get(key)
        if value is None:
            raise UserError(f"{self.folder / shard} has no {key.decode()}; run kinema prepare --verify")
        return value

    def _environment(self, name: str) -> Any:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = _acquired(self.folder / name)
            return self._opened[name][1]


_OPEN: dict[str, tuple[Any, int]] = {}  # LMDB opens an environment once in a process: path → it, and who needs it
_OPENING = threading.Lock()


def _acquired(path: Path) -> tuple[str, Any]:
    lmdb, name = _lmdb(), str(path.resolve())
    with _OPENING:
        environment, users = _OPEN.get(name, (None, 0))
        if environment is None:
            try:
                environment = lmdb.open(name, readonly=True, lock=False, readahead=False, create=False)
            except lmdb.Error as error:
                raise UserError(f"cannot read {path} ({error}); copy it again, or delete it and prepare") from error
        _OPEN[name] = environment, users + 1
    return name, environment


def _release(opened: dict[str, tuple[str, Any]]) -> None:
    """Closes what no other reader needs."""
    with _OPENING:
        for name, environment in opened.values():
            _, users = _OPEN[name]
            if users > 1:
                _OPEN[name] = environment, users - 1
            else:
                del _OPEN[name]
                environment.close()
        opened.clear()


def _views(value: Any, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The tensors of a safetensors buffer, in place."""
    buffer = memoryview(value)
    (length,) = struct.unpack("<Q", buffer[:8])
    header = json.loads(bytes(buffer[8 : 8 + length]))
    header.pop("__metadata__", None)
    views = {}
    for name in header if names is None else names:
        said = header[name]
        begin, end = (8 + length + offset for offset in said["data_offsets"])
        dtype, shape = DTYPES[said["dtype"]], said["shape"]
        if begin == end:
            views[name] = torch.empty(shape, dtype=dtype)
            continue
        if end > len(buffer):
            raise ValueError("it is cut off")
        views[name] = _frombuffer(buffer[begin:end], dtype).reshape(shape)
    return views


def _frombuffer(part: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor over memory that must not be written, whatever its alignment."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that cannot be written; it is only read
        return torch.frombuffer(part, dtype=dtype)


def verified(value: bytes) -> dict[str, Tensor]:
    """The tensors of a value as the safetensors library itself reads them."""
    return load_bytes(value)


def drop(path: Path, key: str) -> None:
    """Takes a sample out of a shard."""
    environment = _writable(path)
    with environment, environment.begin(write=True) as writing:
        writing.delete(key.encode())
        writing.delete(RECORD + key.encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """UserError if there is none, or it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"there is no prepared data in {folder}; make it with kinema prepare")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); make the data again with kinema prepare") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this machine prepares a folder at a time; another one says so."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {folder}; wait for it, or end it") from None
        yield


def _writable(path: Path) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    return _lmdb().open(str(path), map_size=max(MAP, 2 * _used(path)), metasync=True, readahead=False)


def _used(path: Path) -> int:
    file = path / "data.mdb"
    return file.stat().st_size if file.exists() else 0


def _allow_files(count: int) -> None:
    """A map needs an open file, of which a process may have a thousand unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 512:
        limit = count + 512 if hard == resource.RLIM_INFINITY else min(hard, count + 512)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _lmdb() -> Any:
    import lmdb

    return lmdb
