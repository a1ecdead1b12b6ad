"""A run: everything that decides what is trained and how, as one tree of frozen dataclasses. Recipes return it."""

from dataclasses import dataclass, field
from typing import Literal

from kinema.data.batch import Data
from kinema.errors import UsageError
from kinema.objectives.objective import Objective
from kinema.sampling import Pipeline


@dataclass(frozen=True)
class Plan:
    """How the networks are computed.

    compute    dtype of matrix products and attention; weights, gradients of the loss and optimizer are float32
    recompute  "block" keeps only each block's input in the forward pass and computes the rest again in the backward
    pass
    compile    torch.compile each block
    """

    compute: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "block"] = "none"
    compile: bool = False


@dataclass(frozen=True)
class Preview:
    """Videos of fixed prompts and seeds from the averaged weights, every `every` steps (0: never)."""

    prompts: tuple[str, ...] = ()
    every: int = 0


@dataclass(frozen=True)
class Run:
    """One training run.

    steps        optimizer steps of the whole run; raising it later lets a finished run go on
    batch_size   samples of one optimizer step, over all ranks
    micro_batch  samples of one forward pass; batch_size / micro_batch passes are accumulated
    pipeline     what turns prompts into videos around the trained network: previews and `kinema sample` use it
    init_from    another run's folder or checkpoint whose roles this one starts from, where names agree
    save_every   steps between checkpoints; the newest `keep` stay
    max_skips    consecutive updates with a non-finite gradient after which the run stops
    """

    objective: Objective
    data: Data
    steps: int
    batch_size: int
    micro_batch: int = 0
    pipeline: Pipeline | None = None
    plan: Plan = field(default_factory=Plan)
    preview: Preview = field(default_factory=Preview)
    init_from: str | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    max_skips: int = 10

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "save_every", "keep", "max_skips"):
            if getattr(self, name) < 1:
                raise UsageError(f"run.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.batch_size % self.passes_of:
            raise UsageError(
                f"run.batch_size {self.batch_size} is not a multiple of run.micro_batch {self.micro_batch}; "
                f"use a micro_batch that divides it"
            )
        if self.preview.every and self.pipeline is None:
            raise UsageError("run.preview.every asks for videos, but the run has no pipeline; set run.pipeline")

    @property
    def passes_of(self) -> int:
        """Samples of one forward pass."""
        return self.micro_batch or self.batch_size
