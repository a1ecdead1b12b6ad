"""What every objective is made of: a cast of roles and the turns in which they learn; each has a file beside this."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from kinema.data.batch import Batch
from kinema.errors import UsageError
from kinema.models.protocols import Spec
from kinema.optim import Ema, Optim

Cast = Mapping[str, Any]  # role → how its spec reads the network: a denoiser, a codec, …
Metrics = dict[str, Tensor]  # name → scalar on the device; NaN where a batch says nothing about it


@dataclass(frozen=True)
class Role:
    """One network of the cast. Without `optim` it is frozen.

    weights  dtype they are held in; learning ones are float32
    shards   what holds one copy of the network: the plan's shard axis, all data-parallel ranks, or every rank ("none")
    """

    spec: Spec
    optim: Optim | None = None
    ema: Ema | None = None
    weights: Literal["float32", "bfloat16"] = "float32"
    shards: Literal["plan", "all", "none"] = "plan"

    def __post_init__(self):
        if self.optim is None and self.ema is not None:
            raise UsageError("a role with an average must learn; give it an optim, or take its ema away")
        if self.optim is not None and (self.weights != "float32" or self.shards == "none"):
            raise UsageError(
                f"a role that learns has float32 weights in shards, not weights {self.weights} and shards "
                f"{self.shards}; only a frozen role (no optim) can have these"
            )


@dataclass(frozen=True)
class Turn:
    """One role learns once from `loss(cast, batch, step)`, at every `every`-th step from step `first` until `until`.

    While it does, its parameters alone require gradients: a loss may go through other networks without moving them.
    `betas` replace those of the role's optimizer; with `fresh` its moments start anew at step `first`.
    `decides(batch, step)` is all that the loss decides on the host, from the step, `batch.micro` and `keys.shared`:
    where it is equal, the same kernels run, and so the turn can be a CUDA graph. None: this is not known.
    """

    role: str
    loss: Callable[[Cast, Batch, int], tuple[Tensor, Metrics]]
    every: int = 1
    first: int = 0
    until: int | None = None
    betas: tuple[float, float] | None = None
    fresh: bool = False
    decides: Callable[[Batch, int], Hashable] | None = None

    def due(self, step: int) -> bool:
        return (
            self.first <= step < (step + 1 if self.until is None else self.until) and not self._since(step) % self.every
        )

    def number(self, step: int) -> int:
        """How many such turns came before that of step `step`."""
        return self._since(step) // self.every

    def _since(self, step: int) -> int:
        return step - self.first


def nothing(batch: Batch, step: int) -> Hashable:
    """What a loss decides on the host that always does the same."""
    return ()


class Objective:
    """A frozen dataclass whose fields of type `Role` are the cast; `turns` says who learns, on what and how often."""

    def turns(self) -> tuple[Turn, ...]:
        raise NotImplementedError

    def memory(self) -> dict[str, Tensor]:
        """Numbers `[]` that losses keep from one step to the next besides the networks, by name: they find them as
        `cast["memory"]`, change them in place, and checkpoints keep them. After a turn they are means over ranks."""
        return {}

    def watch(self, memory: Mapping[str, float], step: int, seed: int) -> None:
        """Raises UserError where the memory says that the run should not go on. Asked whenever something is logged."""

    def roles(self) -> dict[str, Role]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Role)}
