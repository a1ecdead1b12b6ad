"""Small tensors that are made once for each device: a CUDA graph cannot be recorded while host memory is copied."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])
_KEPT: list[Any] = []


def constant(function: F) -> F:
    """Keeps what the function of hashable arguments gives. It is made outside of inference mode: a tensor first asked
    for there would be unusable in training."""
    kept: Any = lru_cache(maxsize=256)(torch.inference_mode(False)(function))
    _KEPT.append(kept)
    return kept


def forget() -> None:
    """Drops all constants: those of one kind of tensor (without memory, say) are of no use to another."""
    for kept in _KEPT:
        kept.cache_clear()
