"""A run: everything that decides what is trained and how, as one tree of frozen dataclasses. Recipes return it."""

from dataclasses import dataclass, field
from typing import Literal

from kinema.data.batch import Data
from kinema.errors import UsageError
from kinema.objectives.objective import Objective
from kinema.sampling import Pipeline

AXES = ("replicate", "shard", "context", "tensor")  # of the mesh, the slowest links first


@dataclass(frozen=True)
class Plan:
    """How the networks are laid over the processes of a job, and computed.

    replicate  groups that each hold everything; their gradients are averaged (with shard: HSDP)
    shard      ranks that a group's weights, gradients, moments and averages are split over (FSDP); -1: the rest
    context    ranks that one video is split over
    tensor     ranks that each block's heads and matrices are split over
    reshard    give a block's gathered weights back after its forward pass (ZeRO-3) and not after its backward (ZeRO-2)
    compute    dtype of matrix products and attention; weights, gradients and optimizer are float32, and so is what is
               gathered and reduced: each number is rounded once, as on one device
    recompute  "block" keeps only each block's input in the forward pass and computes the rest again in the backward;
               "linear" also keeps what self-attention gave, so that only what is linear in the tokens is done again
    compile    torch.compile each block
    fuse       on CUDA, generate kernels for norms, modulation, gates and rotations, one by one: most of what `compile`
               gains, for seconds of compiling, whatever the shapes
    graph      record each turn as a CUDA graph and replay it, for networks so small that launching their kernels takes
               longer than running them; for one process
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1
    reshard: bool = True
    compute: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "block", "linear"] = "none"
    compile: bool = False
    fuse: bool = False
    graph: bool = False

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "shard" and size == -1):
                raise UsageError(f"run.plan.{name} is {size}; it must be 1 or more" + ", or -1" * (name == "shard"))

    def sizes(self, world: int) -> tuple[int, int, int, int]:
        """The lengths of `AXES` for `world` processes. UsageError if their product is not `world`."""
        others = self.replicate * self.context * self.tensor
        shard = self.shard if self.shard > 0 else max(1, world // others)
        if others * shard != world:
            product = f"replicate {self.replicate} × shard {shard} × context {self.context} × tensor {self.tensor}"
            fix = "start another number of them, or change run.plan"
            raise UsageError(f"{product} is {others * shard}, but the job has {world} processes; {fix}")
        return self.replicate, shard, self.context, self.tensor


@dataclass(frozen=True)
class Preview:
    """Videos of fixed prompts and seeds from the averaged weights, every `every` steps (0: never).

    `images` are files, of pictures or of videos, whose first frames image-to-video networks continue: one per prompt.
    """

    prompts: tuple[str, ...] = ()
    every: int = 0
    images: tuple[str, ...] = ()

    def __post_init__(self):
        if self.images and len(self.images) != len(self.prompts):
            raise UsageError(
                f"run.preview has {len(self.prompts)} prompts but {len(self.images)} images; give each prompt its image"
            )


@dataclass(frozen=True)
class Validation:
    """The denoising error of the student's average (or of itself, where there is none) on samples it does not learn
    from: the first `samples` of `data`, at each of `times`, always with the same noise, every `every` steps.
    """

    data: Data
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 8
    every: int = 500

    def __post_init__(self):
        if self.samples < 1 or self.every < 1 or not self.times or not all(0 < t <= 1 for t in self.times):
            raise UsageError("validation needs samples and every of 1 or more, and times above 0 and up to 1")


@dataclass(frozen=True)
class Run:
    """One training run.

    steps        optimizer steps of the whole run; raising it later lets a finished run go on, with what its schedules
                 have left of the learning rates: where these are annealed, a new run with `init_from` is better
    batch_size   samples of one optimizer step, over all ranks
    micro_batch  samples of one forward pass on one rank, 0: a rank's share of the batch; passes are accumulated
    pipeline     what turns prompts into videos around the trained network: previews and `kinema sample` use it
    init_from    another run's folder or checkpoint whose roles this one starts from, where names agree
    init_roles   role → the other run's role it starts from, where that is not its namesake
    init_average  take a role's average, where that run made one, rather than its weights
    init_finished  refuse a run that has not taken all of its steps
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
    validation: Validation | None = None
    init_from: str | None = None
    init_roles: dict[str, str] = field(default_factory=dict)
    init_average: bool = True
    init_finished: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    max_skips: int = 10

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "save_every", "keep", "max_skips"):
            if getattr(self, name) < 1:
                raise UsageError(f"run.{name} is {getattr(self, name)}; it must be 1 or more")
        self.passes(1)
        for turn in self.objective.turns():
            if self.objective.roles()[turn.role].optim is None:
                raise UsageError(
                    f"the {turn.role} is to learn but has no optimizer; set run.objective.{turn.role}.optim"
                )
        if self.preview.every and self.pipeline is None:
            raise UsageError("run.preview.every asks for videos, but the run has no pipeline; set run.pipeline")

    def passes(self, copies: int) -> tuple[int, int]:
        """(passes a step accumulates, samples of a pass) on each of `copies` data-parallel ranks; UsageError if the
        batch does not divide so."""
        samples = self.micro_batch or max(1, self.batch_size // copies)
        if self.batch_size % (copies * samples):
            ranks = f" on {copies} data-parallel ranks" if copies > 1 else ""
            raise UsageError(
                f"run.batch_size {self.batch_size} is not a multiple of {samples} samples a pass{ranks}; "
                f"change run.batch_size or run.micro_batch"
            )
        return self.batch_size // (copies * samples), samples
