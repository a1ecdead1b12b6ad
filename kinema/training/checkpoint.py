"""Checkpoints: a folder per step, written by torch's distributed checkpoint in its safetensors format, and so without
pickle. Every rank writes its own parts while training goes on; any number of ranks reads them.

`checkpoints/step-00000040/` is complete if and only if it holds the marker, which is written last and knows every
file's size; everything before that happens under another name. `checkpoints/latest` links to the newest complete one.
"""

import json
import logging
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from kinema.errors import ElsewhereError, UserError
from kinema.training.world import World

MARKER = "complete.json"
PIN = "pinned"  # a file in a checkpoint that is kept however many newer ones there are
HEALTHY = "healthy"  # a file in a checkpoint that was written while no alarm rang
log = logging.getLogger(__name__)


class Writer:
    """Writes checkpoints below `folder`, one at a time, behind the training; keeps the newest `keep` and the pinned.

    What goes wrong while one is written is raised as UserError by the next `save` or `wait`.
    """

    def __init__(self, folder: Path, keep: int, world: World):
        self.folder, self.keep, self.world = folder, keep, world
        self._copies: dict[str, Tensor] = {}  # in host memory, reused from checkpoint to checkpoint
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future | None = None

    def save(self, step: int, state: dict[str, Tensor], healthy: bool = True) -> None:
        """Copies `state` into host memory and returns; the tensors may change from then on.

        The newest checkpoint that was saved as healthy is kept however many follow.
        """
        self.wait()
        staged = {name: self._copied(name, tensor) for name, tensor in state.items()}
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._written = self._thread.submit(self._write, step, staged, healthy)

    def wait(self) -> None:
        """Returns when everything that was saved is on the disk."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in host memory, contiguous, as safetensors wants it; of one in shards this rank's part."""
        part = tensor.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        copy = self._copies.get(name)
        if copy is None or copy.shape != part.shape:
            copy = self._copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        copy.copy_(part, non_blocking=True)
        # Not `from_local`, which would move it back to the device of the mesh.
        return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy

    def _write(self, step: int, state: dict[str, Tensor], healthy: bool) -> None:
        alone, first = self.world.mesh is None, self.world.rank == 0
        path, draft = _path(self.folder, step), self.folder / f"writing-{step:08d}"
        try:
            if first:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True, exist_ok=True)  # a quicker rank makes it, too, and writes later
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of being alone, where it is
                writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
                state_dict_saver.save(state, storage_writer=writer, no_dist=alone, process_group=self.world.files)
            if first:
                _complete(draft, path, step, len(state), healthy)
        except (OSError, CheckpointException) as error:
            if not first:
                raise ElsewhereError() from error
            shutil.rmtree(draft, ignore_errors=True)
            kept = latest(self.folder)
            raise UserError(
                f"cannot write the checkpoint of step {step} below {self.folder}: {_reason(error)}; make room there "
                f"and run the same command again, it goes on from {kept.name if kept else 'the start'}"
            ) from error
        if first:
            _tidy(self.folder, self.keep)


def pin(path: Path) -> None:
    """Keeps a checkpoint for good."""
    (path / PIN).touch()


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are all there, whole.

    A damaged one is passed over with a warning. UserError if that leaves none: nobody wants to start again unasked.
    """
    found = complete(folder)
    for path in reversed(found):
        if damaged := _damage(path):
            log.warning("%s is damaged (%s); taking the one before it", path, damaged)
        else:
            return path
    if found:
        raise UserError(f"all checkpoints in {folder} are damaged; restore one of them, or delete them to start again")
    return None


def step_of(path: Path) -> int:
    return int(json.loads((path / MARKER).read_text())["step"])


def names(path: Path) -> set[str]:
    """The names of the tensors in a checkpoint."""
    return set(_shapes(path))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        there = _reader(path).read_metadata().state_dict_metadata
        return {name: tuple(t.size) for name, t in there.items() if isinstance(t, TensorStorageMetadata)}
    except Exception as error:  # whatever safetensors makes of a damaged file
        raise _unreadable(path, error) from error


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Copies a checkpoint into the tensors of `state`, in place, each rank its parts; every name must be there."""
    there = _shapes(path)
    missing = sorted(set(state) - set(there))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} tensors of this run, the first being {missing[0]}; "
            f"it was written by another recipe, so choose another run folder with --out"
        )
    if other := [name for name, tensor in state.items() if tuple(tensor.shape) != there[name]]:
        size, shape = list(there[other[0]]), list(state[other[0]].shape)
        raise UserError(
            f"{path} has {other[0]} of size {size}, not {shape}; give a run of the same sizes, and, of adapters, "
            "of the same rank"
        )
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            state_dict_loader.load(state, storage_reader=_reader(path), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter, which torch wraps much in, is no Exception
        raise _unreadable(path, error) from error


def _complete(draft: Path, path: Path, step: int, tensors: int, healthy: bool) -> None:
    """Makes a written folder a checkpoint."""
    for file in draft.iterdir():
        _sync(file)
    files = {file.name: file.stat().st_size for file in draft.iterdir()}
    (draft / MARKER).write_text(json.dumps({"step": step, "tensors": tensors, "files": files}))
    _sync(draft / MARKER)
    if (path / PIN).exists():
        pin(draft)
    if healthy:
        (draft / HEALTHY).touch()
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)
    link = path.parent / "latest.new"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.parent / "latest")


def _tidy(folder: Path, keep: int) -> None:
    found = complete(folder)
    healthy = [path for path in found if (path / HEALTHY).exists()][-1:]
    for old in found[:-keep]:
        if not (old / PIN).exists() and old not in healthy:
            shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob("writing-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _damage(path: Path) -> str:
    """What is wrong with a complete checkpoint, or nothing."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        for name, size in files.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (there := (path / name).stat().st_size) != size:
                return f"{name} has {there} bytes of {size}"
    except (OSError, ValueError, KeyError) as error:
        return f"{MARKER}: {error}"
    return ""


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"cannot read {path}: {_reason(error)}; delete that folder to go on from the one before")


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _reader(path: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(path))


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _reason(error: BaseException) -> str:
    """The one line that says what happened: torch puts it last, under the traceback of the rank it happened on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
