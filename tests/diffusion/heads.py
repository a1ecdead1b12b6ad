"""Heads for tests, and a watcher of the tensors an operation makes."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.diffusion.logits import Logits


class Plain(nn.Module):
    """Its logits are its hidden rows."""

    def forward(self, hidden: Tensor, loop):
        return loop(hidden, torch.eye(hidden.shape[-1], dtype=hidden.dtype))


class Linear(nn.Module):
    """A head with a weight that learns."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor, loop):
        return loop(hidden, self.weight)


PLAIN = Plain()


def plain(z: Tensor) -> Logits:
    return Logits(z, PLAIN, z.dtype)


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made inside the block has."""

    def __init__(self):
        super().__init__()
        self.elements, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().nbytes() // tensor.element_size() > self.elements
            ):
                self.elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.by = str(func)
        return made
