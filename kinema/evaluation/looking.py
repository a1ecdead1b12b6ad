"""The oracle over many videos, shared among processes: it is a processor's work, and a video does not need another."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache

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
        seen = [pickle.loads(made) for made in _pool(jobs).map(_look, map(pickle.dumps, parts))]
    return [reading for readings, _ in seen for reading in readings], torch.cat([features for _, features in seen])


@cache
def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def _look(part: bytes) -> bytes:
    """As bytes, because tensors are sent through shared memory, of which containers have little."""
    return pickle.dumps(oracle.look(pickle.loads(part)))
