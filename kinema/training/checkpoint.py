"""Checkpoints: a folder per step, written by torch's distributed checkpoint in its safetensors format, and so
without pickle.

`checkpoints/step-00000040/` is complete if and only if it holds the marker, which is written last; everything before
that
happens under another name. `checkpoints/latest` is a link to the newest complete one.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from kinema.errors import UserError

MARKER = "complete.json"


def save(folder: Path, step: int, state: dict[str, Tensor], keep: int) -> Path:
    """Writes `state` as step `step` below `folder` and then deletes all but the newest `keep`.

    Raises UserError when the disk is full; what was there before stays as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, draft = _path(folder, step), folder / f"writing-{step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "assuming a single process": it is one
            plain = {name: tensor.contiguous() for name, tensor in state.items()}  # safetensors knows no memory formats
            writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
            state_dict_saver.save(plain, storage_writer=writer, no_dist=True)
        for file in draft.iterdir():
            _sync(file)
        (draft / MARKER).write_text(json.dumps({"step": step, "tensors": len(state)}))
        _sync(draft / MARKER)
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
        link = folder / "latest.new"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(folder / "latest")
    except (OSError, CheckpointException) as error:
        shutil.rmtree(draft, ignore_errors=True)
        kept = latest(folder)
        raise UserError(
            f"cannot write the checkpoint of step {step} below {folder}: {_reason(error)}; make room there and run the "
            f"same command again, it goes on from {kept.name if kept else 'the start'}"
        ) from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob("writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return path


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def latest(folder: Path) -> Path | None:
    return next(reversed(complete(folder)), None)


def step_of(path: Path) -> int:
    return int(json.loads((path / MARKER).read_text())["step"])


def names(path: Path) -> set[str]:
    """The names of the tensors in a checkpoint."""
    try:
        return set(_reader(path).read_metadata().state_dict_metadata)
    except Exception as error:  # whatever safetensors makes of a damaged file
        raise _damaged(path, error) from error


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Copies a checkpoint into the tensors of `state`, in place; every name of `state` must be there."""
    missing = sorted(set(state) - names(path))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} tensors of this run, the first being {missing[0]}; "
            f"it was written by another recipe, so choose another run folder with --out"
        )
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            state_dict_loader.load(state, storage_reader=_reader(path), no_dist=True)
    except Exception as error:  # torch wraps everything that can happen in a CheckpointException or a ValueError
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
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
