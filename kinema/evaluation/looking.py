"""The oracle over many videos, shared among processes: it is a processor's work, and a video does not need another."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinema.evaluation import oracle
from kinema.evaluation.oracle import Reading

PART = 32  # videos that a process is given at once


def look(videos: Tensor, jobs: int = 1) -> tuple[list[Reading], Tensor]:
    """What `oracle.read` and `oracle.features` say of `[B, T, 3, H, W]`, worked out by `jobs` processes."""
    parts = videos.cpu().split(PART)
    if jobs == 1 or len(parts) == 1:
        seen = [oracle.look(part) for part in parts]
    else:
        made = _pool(jobs).map(_look, (part.numpy() for part in parts))
        seen = [([_with(r, torch.from_numpy) for r in readings], torch.from_numpy(x)) for readings, x in made]
    return [reading for readings, _ in seen for reading in readings], torch.cat([features for _, features in seen])


@cache
def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def _look(part: np.ndarray) -> tuple[list[Reading], np.ndarray]:
    """As arrays: tensors are sent through shared memory, of which containers have little."""
    readings, features = oracle.look(torch.from_numpy(part))
    return [_with(reading, Tensor.numpy) for reading in readings], features.numpy()


def _with(reading: Reading, kind: Callable[[Any], Any]) -> Reading:
    """The reading with its tensors in another kind of array."""
    names = ("track", "area", "mask")
    seen = (replace(one, **{name: kind(getattr(one, name)) for name in names}) for one in reading.objects)
    return replace(reading, objects=tuple(seen))
