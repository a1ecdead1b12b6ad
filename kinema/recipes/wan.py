"""Fine-tuning of Wan 2.1 on your own videos: all weights, or low-rank adapters. It stays a bidirectional model.

`model` is a pipeline's folder in the original or in diffusers' layout, or its Hub id, and `data` the folder that
`kinema prepare --for wan` made with it. Learning rates are kinema's choice.
"""

from dataclasses import replace

from kinema.data.latents import Latents
from kinema.diffusion.times import Shifted
from kinema.errors import UserError
from kinema.models.lora import LoRA
from kinema.models.wan.spec import Wan, WanCausal
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.run import Plan, Run


def sft(model: str, data: str, steps: int = 1000, batch_size: int = 16, micro_batch: int = 1) -> Run:
    """Fine-tune all weights of a Wan on prepared videos."""
    optim = Optim(lr=1e-5, weight_decay=1e-4, clip=1.0, warmup=100)
    return _run(model, data, steps, batch_size, micro_batch, optim, Ema(decay=0.999))


def lora(model: str, data: str, steps: int = 1000, batch_size: int = 16, micro_batch: int = 1, rank: int = 64) -> Run:
    """Train low-rank adapters of a Wan on prepared videos; the model itself is frozen, in bfloat16."""
    optim = Optim(lr=1e-4, weight_decay=1e-4, clip=1.0, warmup=100)
    return _run(model, data, steps, batch_size, micro_batch, optim, None, (LoRA(rank, rank / 2, base="bfloat16"),))


def _run(
    model: str,
    data: str,
    steps: int,
    batch_size: int,
    micro_batch: int,
    optim: Optim,
    ema: Ema | None,
    edits: tuple[LoRA, ...] = (),
) -> Run:
    spec, pipeline = describe(model)
    if not isinstance(spec, Wan) or isinstance(spec, WanCausal):
        raise UserError(f"{model} is no bidirectional Wan; give the folder of one")
    return Run(
        objective=Denoising(Role(replace(spec, edits=edits), optim, ema), times=Shifted(spec.shift)),
        data=Latents(data),
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        pipeline=pipeline,
        plan=Plan(compute="bfloat16", recompute="block"),
        save_every=200,
        keep=10,
    )
