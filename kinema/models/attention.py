"""The one door to attention. Which kernel runs is decided here, by device and dtype, and nowhere else.

Shapes: B batch, N heads, L queries, S keys, D head dim.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_preferred = "auto"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D + bias) v; `q` `[B, N, L, D]`, `k`, `v` `[B, N, S, D]`, `bias` broadcastable to `[B, N, L, S]`.

    Keys and values may have fewer heads, a divisor of N: each then serves a group of N / heads consecutive queries.
    On CUDA the first kernel of the preferred order that can take the inputs runs: cuDNN before flash on Hopper-class
    devices (515-593 against 221-355 TFLOP/s at video lengths on an H200), flash before cuDNN elsewhere.
    """
    order = _order(_preferred, q.device) if q.is_cuda else ()
    with sdpa_kernel(list(order), set_priority=True) if order else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def attend_balanced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` without gradients, in a shape that leaves no processor idle.

    A kernel gives each processor 128 queries of a head at a time and takes as many rounds as there must be; a chunk of
    a few thousand queries can leave most processors idle in the last one. So the queries of that round are computed
    apart, in several parts of their keys, which are put together by their normalisers (as in arXiv 2205.14135, 3.1).
    """
    if not q.is_cuda or q.shape[1] != k.shape[1]:
        return attend(q, k, v)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tail, parts = rounds(len(q) * q.shape[1], q.shape[2], k.shape[2], processors)
    if parts == 1 or _order(_preferred, q.device)[0] != SDPBackend.CUDNN_ATTENTION:
        return attend(q, k, v)
    first = _kernel(q[:, :, :-tail], k, v, False)[0]
    return torch.cat([first, in_parts(q[:, :, -tail:], k, v, parts)], dim=2)


def in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Tensor:
    """Attention to `parts` equal parts of the keys at once, as a batch of so many, put together."""
    k, v = (x.unflatten(2, (parts, -1)).movedim(2, 0).flatten(0, 1) for x in (k, v))
    out, normaliser = _kernel(q.expand(parts, *q.shape).flatten(0, 1), k, v, True)
    out, normaliser = out.unflatten(0, (parts, -1)), normaliser.unflatten(0, (parts, -1))
    return (out * normaliser.reshape(*out.shape[:-1], 1).softmax(0)).sum(0).to(q.dtype)


def rounds(heads: int, queries: int, keys: int, processors: int, tile: int = 128) -> tuple[int, int]:
    """(how many of the last queries, in how many parts of their keys) take the least time; (0, 1): none apart.

    Time is counted in rounds of all keys. Parts cost a twentieth of a round each, and must gain that much again.
    """
    tiles = -(-queries // tile)
    best, choice = -(-heads * tiles // processors) - 0.05, (0, 1)
    for apart in range(1, tiles):
        for parts in (n for n in range(2, 9) if keys % n == 0):
            cost = -(-heads * (tiles - apart) // processors) + (-(-heads * apart * parts // processors) + 0.05) / parts
            if cost + 0.05 < best:
                best, choice = cost + 0.05, (queries - (tiles - apart) * tile, parts)
    return choice


def _kernel(q: Tensor, k: Tensor, v: Tensor, normaliser: bool) -> tuple[Tensor, Tensor]:
    """Attention and, if asked for, the logarithm of its normaliser `[B, N, L]`, in any shape of so many numbers."""
    if q.is_cuda:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, normaliser, 0.0, False, False)
    else:
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return made[0], made[1]


def prefer(name: str) -> None:
    """Puts one kernel ("cudnn", "flash", "efficient", "math") first for this process; "auto" goes back to choosing.

    The others remain behind it, for inputs it cannot take. Raises ValueError for an unknown name.
    """
    global _preferred
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}; use auto, {', '.join(KERNELS)}")
    _preferred = name


def backends(device: torch.device | None = None) -> dict[str, str]:
    """What `kinema doctor` prints: the kernel order of `device` (default: the first GPU, else the CPU)."""
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda":
        return {"device": str(device), "order": "torch's own choice", "preferred": _preferred}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})",
        "order": ", ".join(kernel.name.lower() for kernel in _order(_preferred, device)),
        "preferred": _preferred,
        "cudnn": str(torch.backends.cudnn.version()),
    }


@torch.compiler.assume_constant_result
def _order(preferred: str, device: torch.device) -> tuple[SDPBackend, ...]:
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    names = ["cudnn", "flash", "efficient", "math"] if hopper else ["flash", "cudnn", "efficient", "math"]
    return tuple(KERNELS[name] for name in sorted(names, key=lambda name: name != preferred))
