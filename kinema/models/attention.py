"""The one door to attention. Which kernel runs is decided here, by device and dtype, and nowhere else.

Shapes: B batch, N heads, L queries, S keys, D head dim.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinema.models.layers import compute_dtype

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KEPT = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)  # whose backwards are called here
_preferred = "auto"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D + bias) v; `q` `[B, N, L, D]`, `k`, `v` `[B, N, S, D]`, `bias` broadcastable to `[B, N, L, S]`.

    Keys and values may have fewer heads, a divisor of N: each then serves a group of N / heads consecutive queries.
    On CUDA the first kernel of the preferred order that can take the inputs runs: cuDNN before flash on Hopper-class
    devices (515-593 against 221-355 TFLOP/s at video lengths on an H200), flash before cuDNN elsewhere.
    """
    order = _order(_preferred, q.device) if q.is_cuda else ()
    if _local.log is not None and bias is None and _keepable(q, k, order):
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))  # as autocast would
        return _Kept.apply(q, k, v, _local.log)
    with sdpa_kernel(list(order), set_priority=True) if order else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


# --- attention that leaves no processor idle --------------------------------------------------------------------------


def attend_balanced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run: Callable[..., Tensor] = lambda function, *args: function(*args),
    processors: int | None = None,
) -> Tensor:
    """`attend` without gradients, in a shape that leaves no processor idle.

    A kernel gives each processor 128 queries of a head at a time and takes as many rounds as there must be; a chunk of
    a few thousand queries can leave most processors idle in the last one. So the queries of that round are computed
    apart, in several parts of their keys, which are put together by their normalisers (as in arXiv 2205.14135, 3.1).
    `processors` are the device's, if it is one whose attention is cuDNN's; `run` calls what is elementwise.
    """
    if processors is None:
        cudnn = q.is_cuda and _order(_preferred, q.device)[0] == SDPBackend.CUDNN_ATTENTION
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if cudnn else 0
    if not processors or q.shape[1] != k.shape[1]:
        return attend(q, k, v)
    tail, parts = rounds(len(q) * q.shape[1], q.shape[2], k.shape[2], processors)
    if parts == 1:
        return attend(q, k, v)
    first = _kernel(q[:, :, :-tail], k, v, False)[0]
    return run(put_together, *in_parts(q[:, :, -tail:], k, v, parts), first)


def in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Attention to `parts` equal parts of the keys at once, as a batch of so many: the results `[parts, B, N, L, D]`
    and the logarithms of their normalisers `[parts, B, N, L]`."""
    k, v = (x.unflatten(2, (parts, -1)).movedim(2, 0).flatten(0, 1) for x in (k, v))
    out, normaliser = _kernel(q.expand(parts, *q.shape).flatten(0, 1), k, v, True)
    out = out.unflatten(0, (parts, -1))
    return out, normaliser.reshape(out.shape[:-1])


def put_together(out: Tensor, normaliser: Tensor, first: Tensor) -> Tensor:
    """Attention of the `first` queries, and of those after them, which is given in parts."""
    last = (out * normaliser.softmax(0).unsqueeze(-1)).sum(0).to(first.dtype)
    # Tokens before heads, as everything that reads it has them: then it is the next product's operand as it lies.
    return torch.cat([first.transpose(1, 2), last.transpose(1, 2)], dim=1).transpose(1, 2)


@lru_cache(maxsize=256)
def rounds(heads: int, queries: int, keys: int, processors: int, tile: int = 128) -> tuple[int, int]:
    """(how many of the last queries, in how many parts of their keys) take the least time; (0, 1): none apart.

    Time is counted in keys that a processor reads for a tile. Parts cost that of 2,800 more, whatever the keys (a
    second kernel and the putting together; on an H200 they took 0.03 to 0.045 ms, and 64 µs were a round of 4,680
    keys), and must gain a twentieth of a round.
    """
    tiles = -(-queries // tile)
    whole = -(-heads * tiles // processors) * keys
    best, choice = whole - 0.05 * keys, (0, 1)
    for apart in range(1, tiles):
        for parts in (n for n in range(2, 6) if keys % n == 0):
            last = -(-heads * apart * parts // processors) / parts
            cost = (-(-heads * (tiles - apart) // processors) + last) * keys + 2800
            if cost < best:
                best, choice = cost, (queries - (tiles - apart) * tile, parts)
    return choice


def _kernel(q: Tensor, k: Tensor, v: Tensor, normaliser: bool) -> tuple[Tensor, Tensor]:
    """Attention and, if asked for, the logarithm of its normaliser `[B, N, L]`, in any shape of so many numbers."""
    if q.is_cuda:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, normaliser, 0.0, False, False)
    else:
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return made[0], made[1]


# --- attention that is not computed twice -----------------------------------------------------------------------------


class _Local(threading.local):  # a backward recomputes in a thread of its own
    log: "_Log | None" = None


class _Log:
    """What the attention of a block gave, in the order of its calls."""

    def __init__(self):
        self.made: list[tuple[Any, ...]] = []
        self.next: int | None = None  # of those that a recomputation takes; None: they are being made


_local = _Local()


def kept() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of `torch.utils.checkpoint`: the recomputation takes what self-attention gave from the first pass.

    It keeps attention whose work grows with the square of the tokens: all but that to a text shorter than the queries.
    Biased and grouped attention is computed again. No operator passes through Python for this, as operators do under
    torch's selective checkpointing, where a block of a few thousand tokens takes longer to launch than to run.
    """
    log = _Log()

    @contextmanager
    def within(again: bool) -> Iterator[None]:
        outer, _local.log = _local.log, log
        log.next = 0 if again else None
        try:
            yield
        finally:
            _local.log = outer

    return within(False), within(True)


class _Kept(torch.autograd.Function):
    """Attention by the device's own kernel, or what it gave before; its backward is the kernel's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log: _Log) -> Tensor:
        if log.next is None:
            log.made.append(_attention(q, k, v))
            made = log.made[-1]
        else:
            made = log.made[log.next]
            log.next += 1
        out, *ctx.rest = made
        out = out.detach()
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        return *_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), None


def _keepable(q: Tensor, k: Tensor, order: tuple[SDPBackend, ...]) -> bool:
    if k.shape[2] < q.shape[2] or k.shape[1] != q.shape[1] or not torch.is_grad_enabled():
        return False
    if not q.is_cuda:
        return True
    return order[0] in KEPT and compute_dtype(q) == torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The result, the logarithm of its normaliser, and what else the kernel's backward asks for."""
    aten = torch.ops.aten
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if _order(_preferred, q.device)[0] == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[:8]
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[:8]


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normaliser: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    aten, given = torch.ops.aten, (grad, q, k, v, out, normaliser)
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)
    lengths, random = rest[:4], rest[4:6]  # of sequences of different lengths; of dropout
    if _order(_preferred, q.device)[0] == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention_backward(*given, *random, None, *lengths, 0.0, False)
    return aten._scaled_dot_product_flash_attention_backward(*given, *lengths, 0.0, False, *random)


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
