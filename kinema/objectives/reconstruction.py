"""Reconstruction: a video autoencoder learns to give back what it was shown (arXiv 1312.6114); no discriminator."""

from dataclasses import dataclass

from torch import Tensor

from kinema.data.batch import Batch
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing


@dataclass(frozen=True)
class Reconstruction(Objective):
    """loss = mean |x̂ − x| + square · mean (x̂ − x)² + kl · KL(posterior ‖ N(0, 1)) per latent number.

    `kl` only keeps latents from drifting: diffusion wants them smooth and bounded, not gaussian.
    """

    student: Role
    square: float = 2.0
    kl: float = 1e-4

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        codec, draw = cast["student"], batch.keys.fold("student")
        codec.latent_shape(batch.video.shape[1], *batch.video.shape[3:])  # says which sizes it can give back, and how
        mean, logvar = (moment.float() for moment in codec.posterior(batch.video))
        noise = draw.fold("posterior").normal(*mean.shape[1:])
        error = codec.reconstruct(mean + (0.5 * logvar).exp() * noise).float() - batch.video
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = error.square().mean()
        loss = error.abs().mean() + self.square * mse + self.kl * divergence
        return loss, {"psnr": 10 * (4 / mse.detach()).log10(), "kl": divergence.detach()}
