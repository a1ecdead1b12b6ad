"""A critic that also tells real from generated: a Wan trunk with a classifier branch (arXiv 2506.08009, appendix).

The branch reads the tokens after a few blocks of the trunk, which stops after the last of them. One network has both
faces, so that a critic may follow the student's distribution and judge its videos with the same weights.
Shapes: B batch, L tokens, D model dim, K branch points, C classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema import seeds
from kinema.diffusion.denoiser import Cond, LatentDenoiser
from kinema.errors import UsageError
from kinema.models.layers import LayerNorm, RMSNorm, wide
from kinema.models.protocols import TensorPlan
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import CrossAttention, WanSize, WanTransformer, initial_weights
from kinema.models.weights import load_into

BRANCH = r"^branch\."  # finds the names of the branch's parameters


@dataclass(frozen=True)
class ClassifierBranch:
    """What is added to a trunk.

    blocks     read after these blocks of the trunk, counted from 0; one register token each
    classes    logits of one video
    with_time  the time embedding is one more token of the classifier
    ffn_dim    width inside the readers
    seed       of its initial weights
    """

    blocks: tuple[int, ...] = (13, 21, 29)
    classes: int = 1
    with_time: bool = False
    ffn_dim: int = 8192
    seed: int = 0

    def __post_init__(self):
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise UsageError(f"a branch reads after blocks in increasing order, not {self.blocks}; list each once")


@dataclass(frozen=True)
class Discriminator:
    """The spec of a Wan trunk with a classifier branch. Weights without a branch get a new one from its seed."""

    trunk: Wan
    branch: ClassifierBranch = ClassifierBranch()

    @property
    def shift(self) -> float:
        return self.trunk.shift

    def build(self) -> "WanDiscriminator":
        """Raises UsageError if the branch reads after blocks that the trunk does not have."""
        size = self.trunk.dimensions
        if self.branch.blocks[-1] >= size.layers:
            raise UsageError(
                f"the branch reads after block {self.branch.blocks[-1]}, but the trunk's last is {size.layers - 1}; "
                f"choose blocks below {size.layers}"
            )
        with torch.device("meta"):
            return WanDiscriminator(size, self.branch)

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """Fills a built module with the trunk's weights. UserError if they do not fit."""
        fresh = dict(initial_branch(module, self.branch.seed))
        named, source = self.trunk.named(module)
        if self.trunk.weights is None:
            return load_into(module, {**dict(named), **fresh}.items(), device)
        return load_into(module, _completed(from_release(named), fresh), device, source=source)

    def read(self, module: nn.Module) -> "Judge":
        reading = self.trunk.read(module)
        return Judge(reading.backbone, reading.path, reading.predicts)

    def tensor_plan(self) -> TensorPlan | None:
        """The trunk's; every rank has the whole branch."""
        return self.trunk.tensor_plan()

    def times(self, steps: int) -> tuple[float, ...]:
        return self.trunk.times(steps)

    def export(self, module: nn.Module | Mapping[str, Tensor], folder: str | Path, **layout: Any) -> Path:
        """Writes the trunk as `Wan.export` does; a branch judges training only."""
        state = module.state_dict() if isinstance(module, nn.Module) else module
        return self.trunk.export({k: v for k, v in state.items() if not k.startswith("branch.")}, folder, **layout)


@dataclass(frozen=True, eq=False)
class Judge(LatentDenoiser):
    """A critic with a third face: how real it takes a video to be."""

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond, detach: bool = False) -> Tensor:
        """`[B, C]` float32 of noisy videos at times `[B, 1]`. With `detach` nothing flows back into the trunk."""
        return self.backbone(x_t.float(), self.path.schedule.timestep(t), **cond, judge=True, detach=detach).float()


class WanDiscriminator(WanTransformer):
    """Predicts the flow as its trunk does, or, with `judge`, the logits of its branch."""

    def __init__(self, size: WanSize, branch: ClassifierBranch):
        super().__init__(size)
        self.branch = Branch(size, branch)

    def forward(
        self, x: Tensor, timestep: Tensor, *, text: Tensor, judge: bool = False, detach: bool = False
    ) -> Tensor:
        if not judge:
            return super().forward(x, timestep, text=text)
        _, x_BLD, e_BKD, given = self.embed(x, timestep, text)
        seen = []
        for number in range(self.branch.points[-1] + 1):
            x_BLD = self.blocks[number](x_BLD, *given)
            if number in self.branch.points:
                seen.append(x_BLD.detach() if detach else x_BLD)
        return self.branch(seen, e_BKD.detach() if detach else e_BKD)


class Branch(nn.Module):
    """Register tokens read the trunk, each after its own block; a classifier reads the tokens."""

    def __init__(self, size: WanSize, branch: ClassifierBranch):
        super().__init__()
        self.points, self.with_time = branch.blocks, branch.with_time
        self.tokens = nn.Parameter(torch.empty(len(branch.blocks), size.dim))
        self.token_norm = RMSNorm(size.dim, size.eps)
        self.readers = nn.ModuleList(Reader(size, branch.ffn_dim) for _ in branch.blocks)
        width = size.dim * (len(branch.blocks) + branch.with_time)
        self.norm = LayerNorm(width, 1e-5)
        self.hidden, self.logits = nn.Linear(width, size.dim), nn.Linear(size.dim, branch.classes)

    def forward(self, seen: list[Tensor], e_BKD: Tensor) -> Tensor:
        tokens_KD = self.token_norm(self.tokens).to(seen[0].dtype)
        read = [
            reader(token.expand(len(x_BLD), 1, -1), x_BLD)
            for reader, token, x_BLD in zip(self.readers, tokens_KD, seen, strict=True)
        ]
        if self.with_time:
            if e_BKD.shape[1] != 1:
                raise ValueError("a branch with time judges videos that have one time, not one per frame")
            read.append(10 * e_BKD.to(read[0].dtype))
        return self.logits(F.silu(self.hidden(self.norm(torch.cat(read, dim=2)[:, 0]))))


class Reader(nn.Module):
    """token + CrossAttn(token, LN(x)), then + FFN(LN(token)), without modulation."""

    def __init__(self, size: WanSize, ffn_dim: int):
        super().__init__()
        self.eps = size.eps
        self.norm3 = LayerNorm(size.dim, size.eps)
        self.cross_attn = CrossAttention(size)
        self.ffn = nn.Sequential(
            nn.Linear(size.dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, size.dim)
        )

    def forward(self, token_B1D: Tensor, x_BLD: Tensor) -> Tensor:
        token = token_B1D + self.cross_attn(token_B1D, self.norm3(x_BLD))
        dtype = wide(token.dtype)
        return token + self.ffn(F.layer_norm(token.to(dtype), token.shape[-1:], eps=self.eps).to(token.dtype))


def initial_branch(module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A new branch's weights under the module's names; the register tokens are N(0, 0.02)."""
    for name, tensor in initial_weights(module.get_submodule("branch"), seed):
        if name == "tokens":
            generator = torch.Generator().manual_seed(seeds.key_of(seed, "init", name))
            tensor.normal_(0, 0.02, generator=generator)
        yield f"branch.{name}", tensor


def from_release(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames the branch of a released GAN critic to kinema's names; all else passes unchanged."""
    parts = {
        "_register_tokens.register_tokens": "branch.tokens",
        "_register_tokens.rms_norm": "branch.token_norm",
        "_gan_ca_blocks": "branch.readers",
        "_cls_pred_branch.0": "branch.norm",
        "_cls_pred_branch.1": "branch.hidden",
        "_cls_pred_branch.3": "branch.logits",
    }
    for name, tensor in named:
        old = next((part for part in parts if name.startswith(part)), None)
        yield (parts[old] + name.removeprefix(old), tensor) if old else (name, tensor)


def _completed(named: Iterable[tuple[str, Tensor]], fresh: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The stream, and what of `fresh` it did not have if it had none of it."""
    found = False
    for name, tensor in named:
        found |= name in fresh
        yield name, tensor
    if not found:
        yield from fresh.items()
