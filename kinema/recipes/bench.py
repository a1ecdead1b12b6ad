"""Runs at real size on random weights and random data: for plans and measurements of speed and memory."""

from dataclasses import replace
from typing import Literal

from kinema.data.batch import Data
from kinema.data.noise import Noise, NoiseCodes
from kinema.diffusion.times import Shifted, Stratified
from kinema.errors import UsageError
from kinema.models.cogvideox.spec import CogVideoX, native
from kinema.models.cogvideox.theirs import ADAPTED, DiffusersCogVideoX
from kinema.models.lora import LoRA
from kinema.models.ttt.edit import KINDS, TTT
from kinema.models.ursa.spec import URSA, Metric
from kinema.models.ursa.transformer import URSASize
from kinema.models.wan.spec import Wan, WanCausal
from kinema.models.wan.transformer import SIZES, WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.dimo import Dimo
from kinema.objectives.dmd import DMD
from kinema.objectives.objective import Objective, Role
from kinema.optim import Ema, Optim
from kinema.recipes.self_forcing import EMA, SLOW
from kinema.recipes.ttt_video import BACKBONE, DECAYS, STAGES, mixer_optim, plan
from kinema.recipes.ursa_dimo import BODY
from kinema.run import Plan, Run

PLAN = Plan(compute="bfloat16", recompute="block")


def wan_sft(
    size: Literal["1.3B", "14B"] = "1.3B",
    frames: int = 21,
    height: int = 480,
    width: int = 832,
    batch_size: int = 1,
    steps: int = 20,
) -> Run:
    """Fine-tune all of Wan 2.1 at its own resolution; `frames` are latent ones (21 are 81 pixel frames)."""
    return _timed(
        Denoising(Role(Wan(size=size), Optim(lr=1e-5), Ema()), times=Shifted(5.0)),
        Noise((frames, 16, height // 8, width // 8)),
        steps,
        batch_size,
    )


def wan_dmd(
    size: Literal["1.3B", "14B"] = "1.3B",
    frames: int = 21,
    height: int = 480,
    width: int = 832,
    batched: bool = False,
    share_rollout: bool = False,
    graded_at_once: int = 21,
    steps: int = 20,
) -> Run:
    """Distil Wan into a causal four-step student by DMD, three networks of one size; `frames` are latent ones.

    `batched`: the teacher's two passes in one batch. `share_rollout`: the critic takes the student's where both learn.
    `graded_at_once`: the objective's.
    """
    return dmd_of(SIZES[size], frames, height, width, batched, share_rollout, graded_at_once, steps)


def dmd_of(
    size: WanSize,
    frames: int,
    height: int,
    width: int,
    batched: bool,
    share_rollout: bool = False,
    graded_at_once: int = 0,
    steps: int = 20,
) -> Run:
    """`wan_dmd` of networks of any size."""
    objective = DMD(
        student=Role(WanCausal(size=size), Optim(lr=2e-6, **SLOW), EMA),
        critic=Role(Wan(size=size), Optim(lr=4e-7, **SLOW)),
        teacher=Role(Wan(size=size), weights="bfloat16"),
        guidance=4.0,
        shape=(size.in_channels, height // 8, width // 8),
        frames=(frames, frames),
        scored=frames,
        batched=batched,
        share_rollout=share_rollout,
        graded_at_once=graded_at_once,
    )
    return _timed(
        objective,
        Noise((0, size.in_channels, height // 8, width // 8), rows=size.text_len, width=size.text_dim),
        steps,
        batch_size=1,
    )


def cogvideox_sft(
    size: Literal["2B", "5B", "1.5-5B"] = "5B",
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    batch_size: int = 1,
    steps: int = 20,
    network: Literal["kinema", "diffusers"] = "kinema",
) -> Run:
    """Fine-tune all of CogVideoX at its own resolution; `frames` are latent ones (13 are 49 pixel frames).

    `network` puts diffusers' own network in the place of kinema's, in the same loop.
    """
    spec = CogVideoX.published(size)
    role = Role(spec if network == "kinema" else DiffusersCogVideoX(spec), Optim(lr=1e-5))
    return _cogvideox(role, spec, frames, height, width, batch_size, steps)


def cogvideox_lora(
    size: Literal["2B", "5B", "1.5-5B"] = "5B",
    rank: int = 64,
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    batch_size: int = 1,
    steps: int = 20,
    network: Literal["kinema", "diffusers"] = "kinema",
) -> Run:
    """Train low-rank adapters of CogVideoX at its own resolution, on a frozen base in bfloat16."""
    edit = LoRA(rank=rank, alpha=rank / 2, base="bfloat16")
    spec = CogVideoX.published(size, edits=(edit,))
    theirs = DiffusersCogVideoX(CogVideoX.published(size), edits=(replace(edit, targets=ADAPTED),))
    role = Role(spec if network == "kinema" else theirs, Optim(lr=1e-4))
    return _cogvideox(role, spec, frames, height, width, batch_size, steps)


def ttt_video(
    seconds: int = 63,
    mixer: Literal["lact", "ttt_mlp", "ttt_linear", "gated_deltanet", "none", "attention"] = "lact",
    processes: int = 8,
    steps: int = 20,
) -> Run:
    """Train CogVideoX-5B with mixers on long videos, laid out as the curriculum lays out its stage of that length."""
    stage = next((stage for stage in STAGES if stage.seconds == seconds), None)
    if stage is None:
        raise UsageError(f"there is no stage of {seconds} s; use {', '.join(str(s.seconds) for s in STAGES)}")
    spec = CogVideoX.published("5B", edits=(TTT(KINDS[mixer]()),))
    optim = mixer_optim(stage, BACKBONE, DECAYS["new"])
    data = Noise((12 * stage.segments + 1, 16, 60, 90), rows=226, segments=stage.segments)
    return _timed(
        Denoising(Role(spec, optim), times=Stratified()),
        data,
        steps,
        batch_size=processes,
        layout=plan(stage, processes),
    )


def _cogvideox(role: Role, spec: CogVideoX, frames: int, height: int, width: int, batch_size: int, steps: int) -> Run:
    size = spec.dimensions
    pixels, own_height, own_width, _ = native(size)
    latent = (pixels - 1) // 4 + 1
    shape = (
        frames or latent + -latent % size.patch[0],
        size.in_channels,
        (height or own_height) // 8,
        (width or own_width) // 8,
    )
    return _timed(
        Denoising(role, times=Stratified()),
        Noise(shape, rows=size.text_tokens, width=size.text_dim),
        steps,
        batch_size,
    )


def ursa_dimo(
    size: URSASize | Literal["1.7B", "0.6B"] = "1.7B",
    frames: int = 5,
    height: int = 256,
    width: int = 256,
    batch_size: int = 1,
    steps: int = 20,
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
) -> Run:
    """Distil URSA by Di[M]O, three networks; `frames` are latent ones (5 are 17 pixel frames, 13 are 49)."""
    specs = [URSA(Metric(levels, alpha=0.8, c=1.8), size, seed=seed) for seed in range(3)]
    dims = specs[0].dimensions
    optim = Optim(lr=1e-6, weight_decay=0.0, train=BODY)
    return _timed(
        Dimo(
            student=Role(specs[0], optim, Ema(decay=0.9999)),
            teacher=Role(specs[1], weights="bfloat16"),
            critic=Role(specs[2], optim),
            critic_first=0,
        ),
        NoiseCodes((frames, height // 8, width // 8), dims.codes, dims.words, dims.text_len or 320),
        steps,
        batch_size,
    )


def _timed(objective: Objective, data: Data, steps: int, batch_size: int, layout: Plan = PLAN) -> Run:
    """A run that is there to be measured: it logs often and saves nothing before its end."""
    return Run(objective, data, steps, batch_size, 1, plan=layout, log_every=5, save_every=10**9)
