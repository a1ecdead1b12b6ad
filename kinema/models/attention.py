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
