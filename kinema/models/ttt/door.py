"""The one door to the scans of fast weights: which path runs is decided here, by device and sizes, and nowhere else.

The PyTorch path is the reference and runs everywhere.
"""

import torch
from torch import Tensor

from kinema.models.ttt import scan
from kinema.models.ttt.replay import State


def scan_fast_weights(
    q: Tensor, k: Tensor, target: Tensor, eta: Tensor, state: State, norm: tuple[Tensor, Tensor], mini_batch: int
) -> tuple[Tensor, State]:
    """`scan.scan`, by the fastest path there is."""
    with torch.autocast(q.device.type, enabled=False):
        return scan.scan(q, k, target, eta, state, norm, mini_batch)
