"""How a role learns: values only. The learning rate is a function of the step, so nothing of it is ever saved."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from kinema.errors import UsageError


@dataclass(frozen=True)
class Optim:
    """AdamW (arXiv 1711.05101) with float32 masters, clipped by the role's own global gradient norm.

    lr            learning rate after the warm-up
    warmup        steps over which it rises linearly to `lr`, from the role's first turn on
    anneal        step at which a half cosine has brought it down to `lr · floor`; 0 keeps it constant
    anneals       regular expression of the names whose rates follow `anneal`; others stay at theirs after the warm-up
    clip          greatest gradient norm of the role; 0 does not clip
    weight_decay  on what `decays` (a regular expression) finds by name; None: on matrices only, never on biases, norms
                  and other vectors
    groups        regular expression → learning rate, for parameters whose name it finds (the first that matches wins)
    train         regular expression of the names that learn; all others are frozen
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0
    anneal: int = 0
    floor: float = 0.0
    groups: dict[str, float] = field(default_factory=dict)
    train: str = ""
    anneals: str = ""
    decays: str | None = None

    def __post_init__(self):
        for name, lr in {"lr": self.lr, **{f"groups[{pattern!r}]": lr for pattern, lr in self.groups.items()}}.items():
            if not 0 <= lr < math.inf:
                raise UsageError(f"optim.{name} is {lr}; a learning rate is 0 or more")

    def scale_at(self, step: int, first: int = 0, anneals: bool = True) -> float:
        """The factor on learning rates, annealed or not, at step `step` of the run (0 is the first), of turns from
        `first` on."""
        start = first + self.warmup
        if step < start:
            return (step - first + 1) / (self.warmup + 1)
        if not self.anneal or not anneals:
            return 1.0
        done = min(1.0, (step - start) / max(1, self.anneal - start))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

    def lr_at(self, step: int, first: int = 0) -> float:
        return self.lr * self.scale_at(step, first)

    def trains(self, name: str) -> bool:
        return re.search(self.train, name) is not None

    def lr_of(self, name: str) -> float:
        """The unscaled learning rate of one parameter."""
        return next((lr for pattern, lr in self.groups.items() if re.search(pattern, name)), self.lr)

    def split(self, named: Iterable[tuple[str, Tensor]]) -> list[dict]:
        """AdamW's parameter groups: one for each (learning rate, weight decay, whether it anneals) that occurs, in
        order of first use."""
        groups: dict[tuple[float, float, bool], list[Tensor]] = {}
        for name, parameter in named:
            matrix = parameter.ndim > 1
            decay = self.weight_decay if (matrix if self.decays is None else re.search(self.decays, name)) else 0.0
            key = self.lr_of(name), decay, re.search(self.anneals, name) is not None
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": group, "lr": lr, "base_lr": lr, "weight_decay": wd, "anneals": anneals}
            for (lr, wd, anneals), group in groups.items()
        ]


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of a role's weights, in float32.

    It follows the weights exactly until `start` updates of the role are done; after that update n (counted from there)
    keeps `min(decay, (1 + n) / (10 + n))` of the old average, so that first weights do not dominate a short run.
    """

    decay: float = 0.999
    start: int = 0

    def keep_at(self, update: int) -> float:
        n = update - self.start
        return min(self.decay, (1 + n) / (10 + n)) if n >= 0 else 0.0
