"""Fine-tuning of the published CogVideoX models, text-to-video and image-to-video: all weights, or low-rank adapters.

`model` is a pipeline's folder in diffusers' layout (2B, 5B, 5B-I2V, 1.5-5B or 1.5-5B-I2V, which it says itself) and
`data` a list of clips (`kinema.data.clips`), or the folder that `kinema prepare --for cogvideox` made of them. Latents,
captions, schedule and scale are those of the weights, in training and in sampling alike.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kinema.data.batch import Data
from kinema.data.clips import VideoFiles
from kinema.data.first_frame import FirstFrame
from kinema.data.prepared_videos import PreparedVideos
from kinema.data.store import MANIFEST
from kinema.diffusion.times import Stratified
from kinema.errors import UserError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.lora import LoRA
from kinema.models.text import T5
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.run import Plan, Run
from kinema.sampling import Pipeline


def sft(model: str, data: str, steps: int = 1000, weights: str = "", micro_batch: int = 1) -> Run:
    """Fine-tune all weights of a CogVideoX on clips; --weights takes the transformer from elsewhere, such as SAT."""
    spec, _ = described(model, weights)
    optim = Optim(lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4, clip=0.1, warmup=100)
    return _run(model, data, steps, weights, Role(spec, optim, Ema(decay=0.9999)), Plan(**PLAN), micro_batch)


def lora(
    model: str,
    data: str,
    steps: int = 1000,
    weights: str = "",
    micro_batch: int = 1,
    rank: int = 0,
    alpha: float = 0.0,
    processes: int = 1,
) -> Run:
    """Train low-rank adapters of a CogVideoX on clips: rank 128, or 256 for image-to-video, and alpha half of it.

    Every one of `processes` holds the whole frozen model, in bfloat16; --run.plan.shard lays it over them instead.
    """
    spec, _ = described(model, weights)
    rank = rank or (256 if spec.dimensions.image_channels else 128)
    spec = replace(spec, edits=(LoRA(rank=rank, alpha=alpha or rank / 2, base="bfloat16"),))
    optim = Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, clip=1.0, warmup=100)
    plan = Plan(replicate=processes, shard=1, **PLAN)
    return _run(model, data, steps, weights, Role(spec, optim), plan, micro_batch)


PLAN: dict[str, Any] = {"compute": "bfloat16", "recompute": "block"}


def _run(model: str, data: str, steps: int, weights: str, role: Role, plan: Plan, micro_batch: int) -> Run:
    spec, p = described(model, weights)
    assert isinstance(p.codec, CogVideoXVAE) and isinstance(p.text, T5), "what `describe` makes for a CogVideoX"
    image = FirstFrame() if spec.dimensions.image_channels else None
    clips: Data = VideoFiles(data, p.codec, p.text, p.frames, p.height, p.width, p.fps, image=image)
    if (Path(data) / MANIFEST).exists():
        clips = PreparedVideos(data, p.codec, p.text, image=image)
    return Run(
        objective=Denoising(role, times=Stratified()),
        data=clips,
        steps=steps,
        batch_size=16,
        micro_batch=micro_batch,
        pipeline=p,
        plan=plan,
        save_every=200,
        keep=10,
    )


def described(model: str, weights: str) -> tuple[CogVideoX, Pipeline]:
    """The spec of a transformer and the pipeline around it."""
    spec, pipeline = describe(model)
    if not isinstance(spec, CogVideoX):
        raise UserError(f"{model} is no CogVideoX; give the folder of one in diffusers' layout")
    return CogVideoX.from_pretrained(weights) if weights else spec, pipeline
