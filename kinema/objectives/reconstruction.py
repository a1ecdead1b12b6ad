"""Reconstruction: a video autoencoder learns to give back what it was shown (arXiv 1312.6114); no discriminator."""

from dataclasses import dataclass

from torch import Tensor

from kinema.data.batch import Batch
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn, nothing


@dataclass(frozen=True)
class Reconstruction(Objective):
    """loss = mean |x̂ − x| + square · mean (x̂ − x)² + kl · KL(posterior ‖ N(0, 1)) per latent number.

    `kl` only keeps latents from drifting: diffusion wants them smooth and bounded, not gaussian.

    noise   each clip's latents also get gaussian noise of up to this many of their channel's deviations, which no
            encoder can escape by making them louder (as the fixed variance of arXiv 2412.08635): what can be heard in
            few latents, such as an outline, must become loud, and what all of them say, such as a background, quiet
    """

    student: Role
    square: float = 2.0
    kl: float = 1e-4
    noise: float = 0.0

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("student", self.loss, decides=nothing),)

    def loss(self, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        codec, draw = cast["student"], batch.keys.fold("student")
        codec.latent_shape(batch.video.shape[1], *batch.video.shape[3:])  # says which sizes it can give back, and how
        mean, logvar = (moment.float() for moment in codec.posterior(batch.video))
        z = mean + (0.5 * logvar).exp() * draw.fold("posterior").normal(*mean.shape[1:])
        if self.noise:
            deviation = mean.std((0, 1, 3, 4), keepdim=True)
            strength = self.noise * draw.fold("strength").uniform(1, 1, 1, 1)
            z = z + strength * deviation * draw.fold("noise").normal(*mean.shape[1:])
        error = codec.reconstruct(z).float() - batch.video
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = error.square().mean()
        loss = error.abs().mean() + self.square * mse + self.kl * divergence
        return loss, {"psnr": 10 * (4 / mse.detach()).log10(), "kl": divergence.detach()}
