"""What every objective is made of: a cast of roles and the turns in which they learn; each has a file beside this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from kinema.data.batch import Batch
from kinema.models.protocols import Spec
from kinema.optim import Ema, Optim

Cast = Mapping[str, Any]  # role → how its spec reads the network: a denoiser, a codec, …
Metrics = dict[str, Tensor]  # name → scalar on the device; NaN where a batch says nothing about it


@dataclass(frozen=True)
class Role:
    """One network of the cast. Without `optim` it is frozen."""

    spec: Spec
    optim: Optim | None = None
    ema: Ema | None = None


@dataclass(frozen=True)
class Turn:
    """One role learns once from `loss(cast, batch, step)`, at every `every`-th step."""

    role: str
    loss: Callable[[Cast, Batch, int], tuple[Tensor, Metrics]]
    every: int = 1

    def due(self, step: int) -> bool:
        return step % self.every == 0


class Objective:
    """A frozen dataclass whose fields of type `Role` are the cast; `turns` says who learns, on what and how often."""

    def turns(self) -> tuple[Turn, ...]:
        raise NotImplementedError

    def roles(self) -> dict[str, Role]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Role)}
