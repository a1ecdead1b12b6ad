"""What a Wan network is, as values: its size, where its weights are, and what they were trained to predict."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.schedule import RectifiedFlow
from kinema.diffusion.times import shifted
from kinema.errors import UsageError
from kinema.models import edits, lora
from kinema.models.protocols import Edit, TensorPlan
from kinema.models.wan import layouts
from kinema.models.wan.transformer import SIZES, WanSize, WanTransformer, initial_weights, tensor_plan
from kinema.models.weights import Weights, load_into, open_weights, save, write_json, writing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wan:
    """Bidirectional Wan 2.1.

    size     "1.3B", "14B" or dimensions; None reads it from the weights
    weights  folder or file in any of the `layouts`; None starts from `seed`
    part     which network of a torch file with several: "generator_ema", "generator", "critic"; None: the first there
    shift    warps times towards noise, t = s·u / (1 + (s - 1) u): the one owner of that number
    edits    changes of architecture on top of the weights, such as LoRA
    """

    size: WanSize | Literal["1.3B", "14B"] | None = None
    weights: str | None = None
    part: str | None = None
    shift: float = 5.0
    edits: tuple[Edit, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.size is None and self.weights is None:
            raise UsageError("Wan needs a size to start from nothing, or weights to read it from; give one of them")
        if isinstance(self.size, str) and self.size not in SIZES:
            raise UsageError(f"there is no Wan of size {self.size!r}; use {', '.join(SIZES)} or a WanSize")

    @classmethod
    def from_pretrained(cls, path: str, part: str | None = None) -> "Wan":
        """The spec of weights on disk with what they say about themselves written out: size, and shift if saved."""
        said = open_weights(path, part=part).kinema
        size = cls(weights=path, part=part).dimensions
        return cls(size=size, weights=path, part=part, shift=float(said.get("shift", cls.shift)))

    @property
    def dimensions(self) -> WanSize:
        """The size as numbers. Opens the weights' headers if `size` is None."""
        if isinstance(self.size, WanSize):
            return self.size
        if self.size is not None:
            return SIZES[self.size]
        opened, layout = self._open()
        return layouts.size_of(opened.shapes, layout, {**opened.config, **opened.kinema.get("size", {})})

    def build(self) -> WanTransformer:
        with torch.device("meta"):
            module = WanTransformer(self.dimensions)
            edits.apply(self.edits, module)
        return module

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """Fills a built module with the weights, or with those `seed` makes. UserError if they do not fit."""
        if self.weights is None:
            named, source = initial_weights(replace(self, edits=()).build(), self.seed), "weights made from the seed"
        else:
            opened, layout = self._open()
            if opened.part:
                log.info("%s: took %s", opened.path, opened.part)
            named, source = layouts.to_kinema(opened, layout), f"{opened.path}, read as layout {layout}"
        named = edits.completed(named, self.edits, module, layouts.diffusers_name)
        return load_into(module, named, device, source=source)

    def read(self, module: nn.Module) -> LatentDenoiser:
        return LatentDenoiser(module, GaussianPath(RectifiedFlow()), Flow())

    def tensor_plan(self) -> TensorPlan:
        return tensor_plan(self.dimensions)

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps` times from 1 downwards, even before the shift; 0, the end of the last step, is not listed."""
        return shifted(steps, self.shift)

    def export(
        self,
        module: nn.Module | Mapping[str, Tensor],
        folder: str | Path,
        layout: Literal["kinema", "wan", "diffusers", "self_forcing"] = "kinema",
    ) -> Path:
        """Writes a network of this spec (or its state dict) into `folder`, complete or not at all, and returns it.

        Layouts: "kinema" and "wan" have the original names, "diffusers" is what `WanTransformer3DModel.from_pretrained`
        loads, "self_forcing" a torch file with the network under `generator`. A kinema.json keeps what the others'
        configurations have no place for. Adapters of a module are folded into its weights. Raises UserError if the
        folder holds other things or the disk is full.
        """
        state = lora.folded(module) if isinstance(module, nn.Module) else module
        size = self.dimensions
        files = {"kinema.json": {"model": "Wan", "size": asdict(size), "shift": self.shift}}
        if layout == "kinema":
            return save(folder, state.items(), files)
        if layout == "diffusers":
            files["config.json"] = layouts.diffusers_config(size)
        else:
            files["config.json"] = layouts.wan_config(size)
        named = ((layouts.from_kinema(name, layout), tensor) for name, tensor in state.items())
        if layout == "self_forcing":
            with writing(folder) as draft:
                torch.save({"generator": {name: tensor.detach().cpu() for name, tensor in named}}, draft / "model.pt")
                write_json(draft, files)
            return Path(folder)
        return save(folder, named, files, stem="diffusion_pytorch_model")

    def _open(self) -> tuple[Weights, layouts.Layout]:
        assert self.weights is not None
        opened = open_weights(self.weights, part=self.part)
        return opened, layouts.recognise(opened.shapes)
