"""Edits of a network (LoRA, TTT layers) between its building and its loading, the same way for every spec."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from kinema.errors import UserError
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

    `rename` gives the name that a layer has in diffusers, which adapter files use. Raises UserError if some of the
    tensors of an edit were there and others were not.
    """
    seen = set()
    for name, tensor in named:
        seen.add(name)
        yield name, tensor
    for edit in edits:
        there, made = None, None
        for name, tensor in edit.init(module, rename):
            if name in seen:
                there = name
            else:
                made = name
                yield name, tensor
        if there and made:
            raise UserError(
                f"the weights have {there} but not {made}; give all that {type(edit).__name__} adds, or none"
            )


def frozen(module: nn.Module) -> set[str]:
    """The parameters of a module fresh from its spec that edits have frozen: they are what the spec loads, always."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
