"""diffusers' CogVideoX network in the place of kinema's: same weights, same loop, to compare numbers and speed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.errors import UsageError
from kinema.models import edits
from kinema.models.cogvideox import layouts, positions
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize, initial_weights, patch_counts, patch_grid
from kinema.models.layers import compute_dtype
from kinema.models.protocols import Edit
from kinema.models.weights import load_into

ADAPTED = r"attn1\.to_(q|k|v|out\.0)$"  # what diffusers calls the layers that LoRA adapts by default


@dataclass(frozen=True)
class DiffusersCogVideoX:
    """A text-to-video `like` with diffusers' own forward pass and weights from `like.seed`. Of edits only `edits`,
    which name its layers, count."""

    like: CogVideoX
    edits: tuple[Edit, ...] = ()

    def __post_init__(self):
        size = self.like.dimensions
        if size.image_channels or size.positions == "sincos" or self.like.weights is not None:
            raise UsageError(
                "diffusers' network is compared as 5B or 1.5-5B, for text, from nothing; take one of these"
            )

    def build(self) -> nn.Module:
        with torch.device("meta"):
            module = Theirs(self.like.dimensions)
            edits.apply(self.edits, module)
        return module

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        like = CogVideoX(self.like.dimensions, seed=self.like.seed)
        ours = initial_weights(like.build(), like.seed)
        named = ((f"network.{name}", t) for name, t in layouts.from_kinema(ours, "diffusers", like.dimensions))
        completed = edits.completed(named, self.edits, module, lambda name: name)
        return load_into(module, completed, device, source="weights made from the seed")

    def read(self, module: nn.Module) -> LatentDenoiser:
        return self.like.read(module)

    def tensor_plan(self) -> None:
        return None


class Theirs(nn.Module):
    """diffusers' network with the signature of `CogVideoXTransformer`; `blocks` are its own, under a second name."""

    def __init__(self, size: CogVideoXSize):
        super().__init__()
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

        config = {name: v for name, v in layouts.diffusers_config(size).items() if not name.startswith("_")}
        self.size, self.network = size, CogVideoXTransformer3DModel(**config)
        self.blocks = self.network.transformer_blocks

    def forward(self, x: Tensor, timestep: Tensor, *, text: Tensor) -> Tensor:
        dtype = compute_dtype(self.network.proj_out.weight)  # the latents' dtype is what diffusers embeds times in
        size = self.size
        _, rows, columns = patch_counts(size.grid, size.patch)
        base = (rows, columns) if size.positions == "crop" else None
        parts = positions.rope(patch_grid(x, size.patch), size.head_dim, base, x.device)
        turn = tuple(part.repeat_interleave(2, dim=-1) for part in parts)
        return self.network(x.to(dtype), text.to(dtype), timestep[:, 0], image_rotary_emb=turn, return_dict=False)[0]
