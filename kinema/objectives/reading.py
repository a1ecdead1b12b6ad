"""Reading: a text encoder learns to say what a caption states. It gives tiny worlds a text encoder worth freezing."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kinema.data.batch import Batch
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing


@dataclass(frozen=True)
class Reading(Objective):
    """loss = mean cross-entropy of the attributes of `batch.video` `[B, A]` (class numbers) read from its captions."""

    student: Role

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        logits = [part.float() for part in cast["student"](**batch.cond)]
        truth = batch.video.unbind(1)
        losses = [F.cross_entropy(part, label) for part, label in zip(logits, truth, strict=True)]
        right = [(part.argmax(1) == label).float().mean() for part, label in zip(logits, truth, strict=True)]
        return sum(losses) / len(losses), {"right": sum(right) / len(right)}  # type: ignore[return-value]
