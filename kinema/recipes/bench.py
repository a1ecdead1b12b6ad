"""Runs at real size on random weights and random data: for plans and measurements of speed and memory."""

from typing import Literal

from kinema.data.noise import Noise
from kinema.diffusion.times import Shifted
from kinema.models.wan.spec import Wan
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run


def wan_sft(
    size: Literal["1.3B", "14B"] = "1.3B",
    frames: int = 21,
    height: int = 480,
    width: int = 832,
    batch_size: int = 1,
    steps: int = 20,
) -> Run:
    """Fine-tune all of Wan 2.1 at its own resolution; `frames` are latent ones (21 are 81 pixel frames)."""
    return Run(
        objective=Denoising(Role(Wan(size=size), Optim(lr=1e-5), Ema()), times=Shifted(5.0)),
        data=Noise((frames, 16, height // 8, width // 8)),
        steps=steps,
        batch_size=batch_size,
        micro_batch=1,
        plan=Plan(compute="bfloat16", recompute="block"),
        log_every=5,
        save_every=10**9,
    )
