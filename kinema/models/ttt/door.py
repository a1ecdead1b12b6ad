"""The one door to the scans of fast weights: which path runs is decided here, by device and sizes, and nowhere else.

The PyTorch path is the reference and runs everywhere. On NVIDIA GPUs from Ampere on, where Triton is there, kernels
take what fits them; what does not is said once.
"""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kinema.models.ttt import large_chunk, scan
from kinema.models.ttt.replay import State

log = logging.getLogger(__name__)
_preferred = "auto"


def scan_fast_weights(
    q: Tensor, k: Tensor, target: Tensor, eta: Tensor, state: State, norm: tuple[Tensor, Tensor], mini_batch: int
) -> tuple[Tensor, State]:
    """`scan.scan`, by the fastest path there is."""
    with torch.autocast(q.device.type, enabled=False):
        if len(state) == 4 and _kernels(q):
            from kinema.models.ttt import kernels

            head_dim, hidden = state[0].shape[2:]
            if kernels.fits(mini_batch, head_dim, hidden):
                return kernels.scan(q, k, target, eta, state, norm, mini_batch)
            _say(f"mini-batches of {mini_batch} and heads of {head_dim} do not fit the kernel of ttt_mlp")
        return scan.scan(q, k, target, eta, state, norm, mini_batch)


def scan_large_chunks(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, state: State, lengths: tuple[Tensor, ...], groups: Sequence[int]
) -> tuple[Tensor, State]:
    """`large_chunk.scan`, by the fastest path there is."""
    fused = None
    if _kernels(q):
        from kinema.models.ttt import lact_kernels

        fused = lact_kernels.step, lact_kernels.read
    with torch.autocast(q.device.type, enabled=False):
        return large_chunk.scan(q, k, v, eta, state, lengths, groups, fused)


def prefer(path: str) -> None:
    """ "torch" takes the reference path in this process whatever there is; "auto" goes back to choosing."""
    global _preferred
    if path not in ("auto", "torch"):
        raise ValueError(f"unknown path {path!r} of scans; use auto or torch")
    _preferred = path


def _kernels(q: Tensor) -> bool:
    if not q.is_cuda or _preferred == "torch" or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.version.hip or torch.cuda.get_device_capability(q.device)[0] < 8:
        _say("this GPU is older than Ampere")
        return False
    if find_spec("triton") is None:
        _say("triton is not installed")
        return False
    return True


@cache
def _say(why: str) -> None:
    log.warning("%s: mixers run on their PyTorch path, which is slower", why)
