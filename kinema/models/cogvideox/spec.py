"""What a CogVideoX network is, as values: its size, where its weights are, and what they were trained to predict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import V
from kinema.diffusion.schedule import ZeroSNR
from kinema.diffusion.times import trailing
from kinema.errors import UsageError, UserError
from kinema.models import edits, lora
from kinema.models.cogvideox import layouts
from kinema.models.cogvideox.transformer import (
    SIZES,
    CogVideoXSize,
    CogVideoXTransformer,
    initial_weights,
    tensor_plan,
)
from kinema.models.protocols import Edit, TensorPlan
from kinema.models.ttt import edit as ttt
from kinema.models.ttt.edit import TTT
from kinema.models.weights import Weights, load_into, open_weights, owned, read_json, save, write_json, writing

# latent (frames, rows, columns) → the clips of the published models: frames, height, width, frames a second
CLIPS = {(13, 60, 90): (49, 480, 720, 8), (21, 300, 300): (81, 768, 1360, 16)}
SHIFTS = {"sincos": 3.0, "crop": 1.0, "slice": 1.0}  # of the published networks, which differ in their positions


@dataclass(frozen=True)
class CogVideoX:
    """A CogVideoX network: text-to-video, or image-to-video where its size has channels for an image.

    size      one of the published "2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V", or dimensions; None reads it from the
              weights
    weights   folder or file in any of the `layouts`; None starts from `seed`
    schedule  the one owner of the noise levels that training, guidance and sampling see
    edits     changes of architecture on top of the weights: LoRA, TTT layers
    """

    size: CogVideoXSize | Literal["2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V"] | None = None
    weights: str | None = None
    schedule: ZeroSNR = field(default_factory=ZeroSNR)
    edits: tuple[Edit, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.size is None and self.weights is None:
            raise UsageError("CogVideoX needs a size to start from nothing, or weights to read it from; give one")
        if isinstance(self.size, str) and self.size not in SIZES:
            raise UsageError(f"there is no CogVideoX of size {self.size!r}; use {', '.join(SIZES)} or a CogVideoXSize")

    @classmethod
    def published(cls, name: str, weights: str | None = None, edits: tuple[Edit, ...] = ()) -> "CogVideoX":
        """The spec of a published network by the name of its size; `weights` None starts it from nothing."""
        spec = cls(size=name, weights=weights, edits=edits)  # type: ignore[arg-type]
        return cls(spec.size, weights, ZeroSNR(SHIFTS[spec.dimensions.positions]), edits)

    @classmethod
    def from_pretrained(cls, path: str, edits: tuple[Edit, ...] = ()) -> "CogVideoX":
        """The spec of weights on disk with what they say about themselves written out: size, and SNR shift.

        The shift is that of kinema.json or of the pipeline's scheduler beside the weights, else the published one.
        Mixers that kinema.json speaks of become an edit, unless `edits` has one.
        """
        opened = open_weights(path)
        size = cls(weights=path).dimensions
        beside = read_json(opened.path.parent / "scheduler" / "scheduler_config.json")
        shift = opened.kinema.get("shift", beside.get("snr_shift_scale", SHIFTS[size.positions]))
        if "mixer" in opened.kinema and not any(isinstance(edit, TTT) for edit in edits):
            apart = opened.path.parent if opened.path.is_file() else opened.path
            weights = str(apart) if (apart / ttt.FILE).exists() else None
            edits = (*edits, TTT(ttt.of_description(opened.kinema["mixer"]), weights))
        return cls(size, path, ZeroSNR(float(shift)), edits)

    @property
    def long(self) -> TTT | None:
        """The edit that makes it take long videos."""
        return next((edit for edit in self.edits if isinstance(edit, TTT)), None)

    @property
    def dimensions(self) -> CogVideoXSize:
        """The size as numbers. Opens the weights' headers if `size` is None."""
        if isinstance(self.size, CogVideoXSize):
            return self.size
        if self.size is not None:
            return SIZES[self.size]
        opened, layout = self._open()
        return layouts.size_of(opened.shapes, layout, {**opened.config, **opened.kinema.get("size", {})})

    def build(self) -> CogVideoXTransformer:
        with torch.device("meta"):
            module = CogVideoXTransformer(self.dimensions)
            edits.apply(self.edits, module)
        return module

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """Fills a built module with the weights, or with those `seed` makes. UserError if they do not fit."""
        if self.weights is None:
            named, source = initial_weights(replace(self, edits=()).build(), self.seed), "weights made from the seed"
        else:
            opened, layout = self._open()
            named = layouts.to_kinema(opened, layout, self.dimensions.table)
            source = f"{opened.path}, read as layout {layout}"
            if self.long is not None:
                ttt.check_kind(self.long.mixer, opened.kinema.get("mixer", {}), str(opened.path))
        named = edits.completed(named, self.edits, module, layouts.diffusers_name)
        return load_into(module, named, device, source=source)

    def read(self, module: nn.Module) -> LatentDenoiser:
        return LatentDenoiser(module, GaussianPath(self.schedule), V())

    def tensor_plan(self) -> TensorPlan | None:
        return None if self.long is not None else tensor_plan(self.dimensions)

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps` times from 1 downwards, evenly; 0, the end of the last step, is not listed."""
        return trailing(steps)

    @staticmethod
    def diffusers_name(name: str) -> str:
        """diffusers' name of a layer, for files of adapters."""
        return layouts.diffusers_name(name)

    def export(
        self,
        module: nn.Module | Mapping[str, Tensor],
        folder: str | Path,
        layout: layouts.Layout = "kinema",
    ) -> Path:
        """Writes a network of this spec (or its state dict) into `folder`, complete or not at all, and returns it.

        Layouts: "kinema", "diffusers" (what `CogVideoXTransformer3DModel.from_pretrained` loads), "sat", a torch file
        with the network under `module`, and "ttt_video", a torch file as the public code for TTT layers has it. A
        kinema.json keeps what the others' configurations have no place for. Adapters of a module are folded into its
        weights; mixers are a file of their own beside the tensors of diffusers. Raises UserError if the folder holds
        other things, the disk is full, or the layout has no place for mixers.
        """
        state = lora.folded(module) if isinstance(module, nn.Module) else dict(module)
        size, stem = self.dimensions, "model"
        files = {"kinema.json": {"model": "CogVideoX", "size": asdict(size), "shift": self.schedule.shift}}
        mixers: dict[str, Tensor] = {}
        if self.long is not None:
            files["kinema.json"]["mixer"] = ttt.described(self.long.mixer)
            if layout in ("diffusers", "sat"):
                mixers = {name: tensor for name, tensor in state.items() if ttt.PART in name}
                state = {name: tensor for name, tensor in state.items() if name not in mixers}
        if layout == "sat" and mixers:
            raise UserError("layout sat has no place for mixers; use kinema, diffusers or ttt_video")
        named = layouts.from_kinema(state.items(), layout, size)
        if layout in ("sat", "ttt_video"):
            with writing(folder) as draft:
                tensors = {name: owned(tensor) for name, tensor in named}
                content, file = (
                    ({"module": tensors}, "mp_rank_00_model_states.pt") if layout == "sat" else (tensors, "model.pt")
                )
                torch.save(content, draft / file)
                write_json(draft, files)
            return Path(folder)
        if layout == "diffusers":
            files["config.json"], stem = layouts.diffusers_config(size), "diffusion_pytorch_model"
        if not mixers:
            return save(folder, named, files, stem=stem)
        assert self.long is not None
        with writing(folder) as draft:
            save(draft, named, files, stem=stem)
            ttt.write(mixers, self.long.mixer, draft / ttt.FILE)
        return Path(folder)

    def _open(self) -> tuple[Weights, layouts.Layout]:
        assert self.weights is not None
        opened = open_weights(self.weights)
        return opened, layouts.recognise(opened.shapes)


def native(size: CogVideoXSize) -> tuple[int, int, int, int]:
    """(frames, height, width, frames a second) of the clips that a network was trained on."""
    frames, rows, columns = size.grid
    return CLIPS.get(size.grid, (4 * (frames - 1) + 1, 8 * rows, 8 * columns, 8))
