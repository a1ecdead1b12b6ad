"""Low-rank adaptation (arXiv 2106.09685) as an edit: named linear layers become linear layers with a low-rank term.

The backbone's forward code does not know. Files are those of diffusers and PEFT, with the scale in their header.

y = W x + b + (alpha / r) · B A x,  A [r, in], B [out, r]; B starts at zero, so at first nothing changes.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kinema import seeds
from kinema.errors import UsageError, UserError
from kinema.models.weights import Weights, open_weights, whole, writing

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"  # the entry of a file's header that PEFT and diffusers read
BASE = "kinema_base"  # the entry that says which weights it was trained on
PREFIX = "transformer."  # of the network's layers in a file of a pipeline's adapters

Rename = Callable[[str], str]  # a layer's name → what diffusers calls it


@dataclass(frozen=True)
class LoRA:
    """Adapters on the linear layers that `targets` (a regular expression) finds by name; only they learn.

    alpha    the term's weight is alpha / rank
    weights  file or folder to start from, by `LoRA.of_file`; None starts from nothing
    base     dtype in which all that does not learn is kept, None: the network's own
    """

    rank: int = 128
    alpha: float = 64.0
    targets: str = r"attn\.(q|k|v|out|o)$"
    weights: str | None = None
    base: Literal["float32", "bfloat16"] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} is not a rank; use 1 or more")

    @classmethod
    def of_file(cls, path: str, alpha: float | None = None, **others: Any) -> "LoRA":
        """The edit that a file of adapters asks for. Raises UserError if neither it nor `alpha` says its scale."""
        opened = open_weights(path)
        ranks = {shape[0] for name, shape in opened.shapes.items() if ".lora_A." in name}
        if len(ranks) != 1:
            raise UserError(f"{opened.path} holds no adapters of one rank ({len(ranks)} ranks); give a LoRA file")
        stored = _stored_alpha(opened)
        if stored is None and alpha is None:
            raise UserError(f"{opened.path} does not say the alpha it was trained with; give it as alpha")
        return cls(ranks.pop(), stored if alpha is None else alpha, weights=path, **others)  # type: ignore[arg-type]

    def apply(self, module: nn.Module) -> None:
        found = [name for name, _ in module.named_modules() if re.search(self.targets, name)]
        if not found:
            raise UserError(f"no layer's name matches {self.targets!r}; the LoRA would change nothing")
        module.requires_grad_(False)
        if self.base is not None:
            for part in module.modules():
                for key, p in list(part.named_parameters(recurse=False)):
                    kept = p.detach().to(getattr(torch, self.base))
                    part.register_parameter(key, nn.Parameter(kept, requires_grad=False))
        for name in found:
            layer = module.get_submodule(name)
            if type(layer) is not nn.Linear:
                raise UserError(f"{self.targets!r} matches {name}, which is no plain linear layer; narrow it")
            module.set_submodule(name, AdaptedLinear(layer, self.rank, self.alpha / self.rank))

    def init(self, module: nn.Module, rename: Rename) -> Iterator[tuple[str, Tensor]]:
        if self.weights is not None:
            yield from self._read(self.weights, module, rename)
            return
        for name, layer in adapted(module):
            generator = torch.Generator().manual_seed(seeds.key_of(self.seed, "lora", name))
            bound = layer.in_features**-0.5  # Kaiming's uniform law with a = √5
            a = torch.empty(self.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            yield f"{name}.lora_A", a
            yield f"{name}.lora_B", torch.zeros(layer.out_features, self.rank)

    def _read(self, path: str, module: nn.Module, rename: Rename) -> Iterator[tuple[str, Tensor]]:
        opened = open_weights(path)
        stored = _stored_alpha(opened)
        if stored is not None and not math.isclose(stored, self.alpha):
            raise UserError(f"{opened.path} was trained with alpha {stored:g}, not {self.alpha:g}; use LoRA.of_file")
        layers = {name: rename(name) for name, _ in adapted(module)}
        theirs = {f"{PREFIX}{name}.lora_{m}.weight": f"{ours}.lora_{m}" for ours, name in layers.items() for m in "AB"}
        unknown, missing = sorted(set(opened.shapes) - set(theirs)), sorted(set(theirs) - set(opened.shapes))
        if unknown or missing:
            what = f"{unknown[0]}, which is not among" if unknown else f"no {missing[0]}, which is among"
            raise UserError(f"{opened.path} has {what} the layers of {self.targets!r}; set the targets it was made for")
        if opened.header.get(BASE, fingerprint(module)) != fingerprint(module):
            raise UserError(f"{opened.path} was trained on other weights than these; load the base it belongs to")
        for name, tensor in opened:
            if ".lora_A." in name and len(tensor) != self.rank:
                raise UserError(f"{opened.path} is of rank {len(tensor)}, not {self.rank}; use LoRA.of_file")
            yield theirs[name], tensor


class AdaptedLinear(nn.Linear):
    """A linear layer with its weight where it was, and two more matrices, which are float32."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, scale
        self.weight, self.bias = layer.weight, layer.bias
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, device=device))
        self.before: Tensor | None = None  # the weight as it was, while the term is folded into it

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        if self.before is not None:
            return y
        a, b = self.lora_A.to(input.dtype), self.lora_B.to(input.dtype)
        return y + self.scale * F.linear(F.linear(input, a), b)

    def term(self) -> Tensor:
        """(alpha / r) B A, in at least float32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def folded(self) -> Tensor:
        """W + (alpha / r) B A in the dtype of W."""
        if self.before is not None:
            return self.weight.detach()
        return (self.weight.detach() + self.term().detach()).to(self.weight.dtype)


def adapted(module: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """The layers with adapters, by name."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, AdaptedLinear)]


def merge(module: nn.Module) -> None:
    """Folds the adapters into the weights, so that they cost nothing. The old weights are kept for `unmerge`."""
    for _, layer in adapted(module):
        if layer.before is None:
            folded = layer.folded()
            layer.before, layer.weight.data = layer.weight.data, folded


def unmerge(module: nn.Module) -> None:
    """Takes the adapters out of the weights again: bitwise what was there before `merge`."""
    for _, layer in adapted(module):
        if layer.before is not None:
            layer.weight.data, layer.before = layer.before, None


def folded(module: nn.Module) -> dict[str, Tensor]:
    """The state of the network without adapters that computes the same; `module` is left as it is."""
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    for name, layer in adapted(module):
        del state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        state[f"{name}.weight"] = layer.folded()
    return state


def export(module: nn.Module, folder: str | Path, rename: Rename, bake: bool = False) -> Path:
    """Writes the adapters of a module into `folder`, where diffusers' `load_lora_weights` finds them.

    `rename` is the spec's name of a layer in diffusers. `bake` multiplies B by the scale and writes alpha = rank, for
    readers that do not look at the header.
    """
    layers = adapted(module)
    if not layers:
        raise UserError("this network has no adapters to export; give its spec a LoRA among its edits")
    tensors, rank, scale = {}, len(layers[0][1].lora_A), layers[0][1].scale
    for name, layer in layers:
        b = layer.lora_B * layer.scale if bake else layer.lora_B
        tensors |= {f"{PREFIX}{rename(name)}.lora_A.weight": layer.lora_A, f"{PREFIX}{rename(name)}.lora_B.weight": b}
    names = [rename(name) for name, _ in layers]
    return _write(folder, tensors, rank, rank if bake else scale * rank, names, {BASE: fingerprint(module)})


def stack(files: Sequence[tuple[str, float]], folder: str | Path) -> Path:
    """Writes one file whose term is the sum of those of several `(file, weight)`; its rank is the sum of the ranks."""
    edits = [(LoRA.of_file(path), weight) for path, weight in files]
    parts: dict[str, list[Tensor]] = {}
    for edit, weight in edits:
        assert edit.weights is not None
        for name, tensor in open_weights(edit.weights):
            scaled = tensor.float() * (weight * edit.alpha / edit.rank) if ".lora_B." in name else tensor.float()
            parts.setdefault(name, []).append(scaled)
    if other := next((name for name, tensors in parts.items() if len(tensors) != len(edits)), None):
        raise UserError(f"not all of these files adapt {other}; stack files with the same targets")
    tensors = {name: torch.cat(given, dim=int(".lora_B." in name)) for name, given in parts.items()}
    rank = sum(edit.rank for edit, _ in edits)
    names = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    return _write(folder, tensors, rank, rank, names, {})


def fingerprint(module: nn.Module) -> str:
    """What tells the base of an adapter from others: a hash of one row of each adapted weight, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, layer in adapted(module):
        row = (layer.weight if layer.before is None else layer.before).detach()[0]
        digest.update(name.encode())
        digest.update(whole(row).cpu().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stamp(module: nn.Module) -> Tensor | None:
    """The fingerprint as 32 bytes, for checkpoints, which hold adapters without their base; None without adapters."""
    return torch.tensor(list(bytes.fromhex(fingerprint(module))), dtype=torch.uint8) if adapted(module) else None


def _write(
    folder: str | Path,
    tensors: dict[str, Tensor],
    rank: int,
    alpha: float,
    names: list[str],
    header: dict[str, str],
) -> Path:
    said = {"r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "target_modules": names}
    text = json.dumps({f"{PREFIX}{key}": value for key, value in said.items()})
    owned = {name: tensor.detach().cpu().float().clone().contiguous() for name, tensor in tensors.items()}
    with writing(folder) as draft:
        save_file(owned, draft / FILE, metadata={"format": "pt", HEADER: text, **header})
    return Path(folder)


def _stored_alpha(opened: Weights) -> float | None:
    if HEADER not in opened.header:
        return None
    try:
        alpha = json.loads(opened.header[HEADER]).get(f"{PREFIX}lora_alpha")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{opened.path} has a damaged header ({error}); export the LoRA again") from error
    return None if alpha is None else float(alpha)
