"""Edits of a network (LoRA, TTT layers) between its building and its loading, the same way for every spec."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from kinema.models.protocols import Edit
from kinema.models.weights import Named


def apply(edits: Sequence[Edit], module: nn.Module) -> None:
    """Changes a module on the meta device, one edit after the other."""
    for edit in edits:
        edit.apply(module)


def completed(
    named: Named, edits: Sequence[Edit], module: nn.Module, rename: Callable[[str], str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights on disk and then, of what edits added to `module`, those tensors that were not among them.

    `rename` gives the name that a layer has in diffusers, which adapter files use.
    """
    seen = set()
    for name, tensor in named:
        seen.add(name)
        yield name, tensor
    for edit in edits:
        for name, tensor in edit.init(module, rename):
            if name not in seen:
                yield name, tensor


def frozen(module: nn.Module) -> set[str]:
    """The parameters of a module fresh from its spec that edits have frozen: they are what the spec loads, always."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
