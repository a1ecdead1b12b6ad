"""Reconstruction through codes: a video tokenizer learns to give back what it was shown (FSQ, arXiv 2309.15505)."""

from dataclasses import dataclass

from torch import Tensor

from kinema.data.batch import Batch
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing


@dataclass(frozen=True)
class CodeReconstruction(Objective):
    """loss = mean |x̂ − x| + square · mean (x̂ − x)², x̂ decoded from rounded numbers. A quantiser of fixed levels
    needs no loss of its own.
    """

    student: Role
    square: float = 2.0

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        codec = cast["student"]
        values = codec.rounded(codec.latents(batch.video))
        error = codec.reconstruct(values).float() - batch.video
        mse = error.square().mean()
        spread = values.detach().float().flatten(0, -2).std(0).mean()
        return error.abs().mean() + self.square * mse, {"psnr": 10 * (4 / mse.detach()).log10(), "value_spread": spread}
