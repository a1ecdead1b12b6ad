"""What a Wan network is, as values: its size, where its weights are, and what they were trained to predict."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.schedule import RectifiedFlow
from kinema.diffusion.times import shifted, warped
from kinema.errors import UsageError
from kinema.models import edits, lora
from kinema.models.causality import Window
from kinema.models.protocols import Edit, TensorPlan
from kinema.models.wan import layouts
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.transformer import (
    SIZES,
    FusedSelfAttention,
    WanSize,
    WanTransformer,
    initial_weights,
    tensor_plan,
)
from kinema.models.weights import Weights, load_into, open_weights, owned, save, write_json, writing

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

    SAID: ClassVar = ("shift",)  # what an export says of itself besides its size

    def __post_init__(self):
        if self.size is None and self.weights is None:
            raise UsageError(
                f"{type(self).__name__} needs a size to start from nothing or weights to read it from; give one of them"
            )
        if isinstance(self.size, str) and self.size not in SIZES:
            raise UsageError(f"there is no Wan of size {self.size!r}; use {', '.join(SIZES)} or a WanSize")

    @classmethod
    def from_pretrained(cls, path: str, part: str | None = None) -> Self:
        """The spec of weights on disk with what they say about themselves written out: the size, and what was saved."""
        said = open_weights(path, part=part).kinema
        size = cls(weights=path, part=part).dimensions
        return cls(
            size=size, weights=path, part=part, **{name: _value(said[name]) for name in cls.SAID if name in said}
        )

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
            module = self.network()
            edits.apply(self.edits, module)
        return module

    def network(self) -> WanTransformer:
        """The network without edits, to be made on the meta device."""
        return WanTransformer(self.dimensions)

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """Fills a built module with the weights, or with those `seed` makes. UserError if they do not fit."""
        named, source = self.named()
        named = edits.completed(named, self.edits, module, layouts.diffusers_name)
        return load_into(module, named, device, source=source)

    def read(self, module: nn.Module) -> LatentDenoiser:
        return LatentDenoiser(module, GaussianPath(RectifiedFlow()), Flow())

    def tensor_plan(self) -> TensorPlan | None:
        return tensor_plan(self.dimensions)

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps` times from 1 downwards, even before the shift; 0, the end of the last step, is not listed."""
        return shifted(steps, self.shift)

    @staticmethod
    def diffusers_name(name: str) -> str:
        """diffusers' name of a layer, for files of adapters."""
        return layouts.diffusers_name(name)

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
        state = dict(layouts.to_kinema(state.items(), "wan"))  # whole files have no fused tensors
        size = self.dimensions
        said = {name: getattr(self, name) for name in self.SAID}
        files = {"kinema.json": {"model": type(self).__name__, "size": asdict(size), **said}}
        if layout == "kinema":
            return save(folder, state.items(), files)
        if layout == "diffusers":
            files["config.json"] = layouts.diffusers_config(size)
        else:
            files["config.json"] = layouts.wan_config(size)
        named = ((layouts.from_kinema(name, layout), tensor) for name, tensor in state.items())
        if layout == "self_forcing":
            with writing(folder) as draft:
                torch.save({"generator": {name: owned(tensor) for name, tensor in named}}, draft / "model.pt")
                write_json(draft, files)
            return Path(folder)
        return save(folder, named, files, stem="diffusion_pytorch_model")

    def named(self) -> tuple[Iterable[tuple[str, Tensor]], str]:
        """The weights without what edits add to them, as a stream, and where they come from."""
        if self.weights is None:
            network = replace(self, edits=()).build()
            return initial_weights(network, self.seed), f"initial weights of seed {self.seed}"
        opened, layout = self._open()
        if opened.part:
            log.info("%s: took %s", opened.path, opened.part)
        return layouts.to_kinema(opened, layout), f"{opened.path}, read as layout {layout}"

    def _open(self) -> tuple[Weights, layouts.Layout]:
        assert self.weights is not None
        opened = open_weights(self.weights, part=self.part)
        return opened, layouts.recognise(opened.shapes)


@dataclass(frozen=True)
class WanCausal(Wan):
    """Causal Wan 2.1, which makes a video chunk by chunk. Its weights have Wan's names and may start from Wan's.

    chunk              how many latent frames are made together
    first_frame_alone  the first frame is a chunk of its own, so that an image may take its place
    window             the most frames a chunk sees, sink and itself included; None: everything before
    sink               the first frames of a video, which never leave the window; `reanchor` keeps them right before it
    steps_at           the times at which the few-step student evaluates each chunk, the final 0 not listed
    fuse_qkv           one matrix product for the queries, keys and values of self-attention
    """

    chunk: int = 3
    first_frame_alone: bool = False
    window: int | None = None
    sink: int = 0
    reanchor: bool = True
    fuse_qkv: bool = False
    steps_at: tuple[float, ...] = warped((1, 0.75, 0.5, 0.25), shift=5.0)

    SAID: ClassVar = ("shift", "chunk", "first_frame_alone", "window", "sink", "reanchor", "steps_at")

    def __post_init__(self):
        super().__post_init__()
        if self.fuse_qkv and self.edits:
            raise UsageError("edits change q, k and v one by one, which fuse_qkv makes one layer; set fuse_qkv False")
        if self.chunk < 1 or self.sink < 0:
            raise UsageError(f"chunk is {self.chunk} and sink {self.sink}; a chunk has at least 1 frame, a sink 0")
        if self.sink and self.window is None:
            raise UsageError(
                f"a sink of {self.sink} frames needs a window; give window, of {self.sink + self.chunk} or more"
            )
        if self.window is not None and self.window < self.sink + self.chunk:
            raise UsageError(
                f"a window of {self.window} frames does not hold a sink of {self.sink} and a chunk of {self.chunk}; "
                f"use {self.sink + self.chunk} or more"
            )
        if self.steps_at and self.steps_at[-1] == 0:
            log.warning("steps_at %s: the 0 at its end is implied and left out", self.steps_at)
            object.__setattr__(self, "steps_at", self.steps_at[:-1])
        if not self.steps_at or list(self.steps_at) != sorted({t for t in self.steps_at if 0 < t <= 1}, reverse=True):
            raise UsageError(f"steps_at must decrease within (0, 1], without the final 0; got {self.steps_at}")

    @property
    def chunks(self) -> Chunks:
        return Chunks(self.chunk, self.first_frame_alone)

    def network(self) -> WanCausalTransformer:
        module = WanCausalTransformer(self.dimensions, self.chunks, Window(self.window, self.sink, self.reanchor))
        for block in module.blocks if self.fuse_qkv else ():
            block.self_attn = FusedSelfAttention(module.size)
        return module

    def few_step(self, steps: int) -> bool:
        """Whether so many steps are those of the few-step student: an estimate at each of `steps_at`, noised again."""
        return steps == len(self.steps_at)

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps_at` for as many steps, else what the bidirectional Wan has."""
        return self.steps_at if self.few_step(steps) else super().times(steps)

    def tensor_plan(self) -> TensorPlan | None:
        """None where q, k and v are fused: their rows lie such that no cut through them gives whole heads."""
        return None if self.fuse_qkv else super().tensor_plan()

    def named(self) -> tuple[Iterable[tuple[str, Tensor]], str]:
        if not self.fuse_qkv:
            return super().named()
        named, source = replace(self, fuse_qkv=False).named()
        return layouts.fused(named), source


def described(path: str, part: str | None = None) -> Wan:
    """The spec of weights on disk, of the class they say they are; those that say nothing are bidirectional."""
    causal = open_weights(path, part=part).kinema.get("model") == WanCausal.__name__
    return (WanCausal if causal else Wan).from_pretrained(path, part)


def _value(said: Any) -> Any:
    """A field's value as JSON gives it back."""
    return tuple(said) if isinstance(said, list) else said
