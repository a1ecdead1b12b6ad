"""Self Forcing on Wan 2.1 (arXiv 2506.08009): from a bidirectional video model to one that streams in four steps.

`prompts` (prepare) → `ode_pairs` (prepare) → `ode_init` → `dmd` | `sid` | `gan`; or first `causal_sft`, on latents.
Values are the published ones, as far as there are any: those marked k are kinema's. Learning rates are constant.
Folders are the releases' own: the Wan2.1-T2V-1.3B and -14B of the Hub, in the original or in diffusers' layout.
"""

from dataclasses import fields, replace
from typing import Any, Literal

from kinema.data.latents import Latents
from kinema.data.ode_pairs import MakeOdePairs, OdePairs
from kinema.data.prompts import EmbeddedPrompts, EmbedPrompts, PromptFile, Prompts, SpritePrompts
from kinema.data.shards import Preparation
from kinema.data.sprites import World
from kinema.diffusion.rollout import Recompute
from kinema.diffusion.times import Below, PerChunk, Shifted, warped
from kinema.diffusion.weighting import Bell
from kinema.errors import UsageError
from kinema.models.discriminator import ClassifierBranch, Discriminator
from kinema.models.text import NEGATIVE, UMT5
from kinema.models.wan.spec import Wan, WanCausal
from kinema.models.wan.transformer import WanSize
from kinema.models.wan.vae import WanVAE
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.objective import Role
from kinema.objectives.ode_regression import OdeRegression
from kinema.objectives.sid import SiD
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run
from kinema.sampling import Pipeline

SMALL, LARGE = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
STEPS_AT = warped((1, 0.75, 0.5, 0.25), shift=5.0)
SHAPE = (16, 60, 104)  # of a latent frame at 480 x 832
FRAMES = 21  # 81 pixel frames
GAME = {
    "shape": SHAPE,
    "frames": (FRAMES, FRAMES),
    "scored": FRAMES,
    "student_every": 5,
    "graded_at_once": FRAMES,  # on a GPU quicker than chunk by chunk, and in less memory
}
PLAN = Plan(compute="bfloat16", recompute="block")
SLOW = {"betas": (0.0, 0.999), "clip": 10.0}
EMA = Ema(decay=0.99, start=40)  # from step 200 on: the student learns at every fifth


def prompts(file: str, extended: str | None = None, wan: str = SMALL) -> Preparation:
    """Embed the prompts of a text file, one a line, once; `extended` has longer versions of them to train on."""
    return EmbedPrompts(PromptFile(file, extended), _text(wan))


def ode_pairs(file: str, extended: str | None = None, wan: str = SMALL, teacher: str | None = None) -> Preparation:
    """Make the teacher's trajectories for the prompts of a text file; the teacher is `wan` or another folder."""
    spec = Wan(weights=teacher or wan)
    return MakeOdePairs(PromptFile(file, extended), _text(wan), spec, (FRAMES, *SHAPE), 48, 4, guidance=6.0)


def causal_sft(
    data: str = "runs/latents", wan: str = SMALL, forcing: Literal["teacher", "diffusion"] = "teacher"
) -> Run:
    """Make Wan causal on prepared latents: earlier chunks are seen clean, or with `diffusion` as noisy as they are."""
    objective = Denoising(
        Role(_causal(wan), Optim(lr=1e-5), Ema(decay=0.999)),  # k
        times=PerChunk(Shifted(5.0), chunk=3),
        weighting=Bell(5.0),
        context=Below(0.0) if forcing == "teacher" else None,
    )
    sampling = replace(_sampling(wan), steps=50, guidance=6.0)
    return Run(objective, Latents(data), steps=5000, batch_size=64, micro_batch=1, plan=PLAN, pipeline=sampling)  # k


def diffusion_forcing(data: str = "runs/latents", wan: str = SMALL) -> Run:
    """Make Wan causal on prepared latents whose chunks see the earlier ones as noisy as they are."""
    return causal_sft(data, wan, "diffusion")


def ode_init(pairs: str = "runs/self_forcing-ode_pairs", wan: str = SMALL) -> Run:
    """Teach a causal student to jump to the end of the teacher's trajectories."""
    student = Role(_causal(wan), Optim(lr=5e-6, clip=10.0), Ema(decay=0.99))  # k
    data = OdePairs(pairs, STEPS_AT)
    return Run(OdeRegression(student=student), data, 3000, 64, 1, plan=PLAN, pipeline=_sampling(wan))  # k


def dmd(
    data: str = "runs/self_forcing-prompts",
    start: str | None = "runs/self_forcing-ode_init",
    wan: str = SMALL,
    teacher: str = LARGE,
) -> Run:
    """Match the distribution of the 14B model; `--teacher` the folder of the 1.3B model runs on one 80 GB GPU."""
    objective = DMD(
        student=Role(_causal(wan), Optim(lr=2e-6, **SLOW), EMA),
        critic=Role(Wan(weights=wan), Optim(lr=4e-7, **SLOW)),
        teacher=Role(Wan(weights=teacher), weights="bfloat16"),
        guidance=4.0,  # written 3.0 where guidance is cond + g·(cond - uncond)
        **GAME,
    )
    return Run(objective, EmbeddedPrompts(data), 600, 64, 1, _sampling(wan), PLAN, init_from=start)


def sid(
    data: str = "runs/self_forcing-prompts", start: str | None = "runs/self_forcing-ode_init", wan: str = SMALL
) -> Run:
    """Score identity distillation of the 1.3B model."""
    optim = Optim(lr=2e-6, weight_decay=0.0, **SLOW)
    objective = SiD(
        student=Role(_causal(wan), optim, EMA),
        critic=Role(Wan(weights=wan), optim),
        teacher=Role(Wan(weights=wan), weights="bfloat16"),
        guidance=4.0,
        sid_alpha=1.0,
        **GAME,
    )
    return Run(objective, EmbeddedPrompts(data), 600, 64, 1, _sampling(wan), PLAN, init_from=start)


def gan(
    data: str = "runs/latents", start: str | None = "runs/self_forcing-ode_init", wan: str = SMALL, warmup: int = 0
) -> Run:
    """An adversarial game with real or teacher-made latents; `warmup` steps train the new branch alone first."""
    optim = Optim(lr=2e-6, weight_decay=0.0, **SLOW)
    objective = GAN(
        student=Role(_causal(wan), optim, EMA),
        critic=Role(Discriminator(Wan(weights=wan), ClassifierBranch((13, 21, 29))), optim),
        g_weight=0.01,
        d_weight=0.01,
        branch_warmup=warmup,
        critic_shift=5.0,
        **GAME,
    )
    return Run(objective, Latents(data, dropout=0.0), 600, 64, 1, _sampling(wan), PLAN, init_from=start)


def frame_wise(start: str | None = "runs/self_forcing-ode_init", wan: str = SMALL, teacher: str = LARGE) -> Run:
    """DMD of a student that makes frame after frame."""
    return _with_student(dmd(start=start, wan=wan, teacher=teacher), chunk=1)


def image(start: str | None = "runs/self_forcing-ode_init", wan: str = SMALL, teacher: str = LARGE) -> Run:
    """DMD of a student whose first frame is a chunk of its own, so that it may be an image."""
    return _with_student(dmd(start=start, wan=wan, teacher=teacher), chunk=4, first_frame_alone=True)


def long(start: str | None = "runs/self_forcing-ode_init", wan: str = SMALL, teacher: str = LARGE) -> Run:
    """DMD on rollouts of 21 to 63 frames with a rolling window and a sink; the last 21 frames are scored."""
    run = _with_student(dmd(start=start, wan=wan, teacher=teacher), window=21, sink=3)
    return replace(run, objective=replace(run.objective, frames=(FRAMES, 63), codec=WanVAE(wan)))  # type: ignore[call-arg]


def realtime(start: str | None = None, wan: str = LARGE) -> Run:
    """DMD of a 14B student that makes the context of each chunk anew."""
    run = _with_student(dmd(start=start, wan=wan, teacher=wan), steps_at=(1.0, 0.937, 0.833, 0.625))
    objective = replace(run.objective, context=Recompute(3), graded_at_once=0)  # type: ignore[call-arg]
    return replace(run, objective=objective)


def smoke(of: Literal["dmd", "sid", "gan", "causal_sft", "ode_init"] = "dmd", data: str | None = None) -> Run:
    """Three steps of a recipe with two-layer networks on the captions of sprites, on a CPU in seconds.

    `data` is a folder of prepared latents (gan, causal_sft) or trajectories (ode_init) of 6 frames.
    """
    run = {"dmd": dmd, "sid": sid, "gan": gan, "causal_sft": causal_sft, "ode_init": ode_init}[of]()
    objective, text = run.objective, UMT5("sprites-wan")
    changes: dict[str, Any] = {name: replace(role, spec=_tiny(role.spec)) for name, role in objective.roles().items()}
    names = {f.name for f in fields(objective)}  # type: ignore[arg-type]
    changes |= {"shape": (16, 8, 8), "frames": (6, 6), "scored": 6, "student_every": 1} if "shape" in names else {}
    source: Any = Prompts(SpritePrompts((World(),), 16), text) if of in ("dmd", "sid") else run.data
    if of not in ("dmd", "sid"):
        if data is None:
            raise UsageError(f"the smoke test of {of} needs prepared data; give its folder as --data DIR")
        source = replace(source, path=data)
    small = {"steps": 3, "batch_size": 2, "pipeline": None, "log_every": 1, "init_from": None}
    return replace(run, objective=replace(objective, **changes), data=source, plan=Plan(), **small)  # type: ignore[type-var]


def _causal(wan: str) -> WanCausal:
    return WanCausal(weights=wan, steps_at=STEPS_AT)


def _text(wan: str) -> UMT5:
    return UMT5(wan, unconditional=NEGATIVE)


def _sampling(wan: str) -> Pipeline:
    return Pipeline(_text(wan), WanVAE(wan), steps=len(STEPS_AT), guidance=1.0)


def _with_student(run: Run, **options: Any) -> Run:
    """The run with other options of its student's spec."""
    objective: Any = run.objective
    student = replace(objective.student, spec=replace(objective.student.spec, **options))
    return replace(run, objective=replace(objective, student=student))


def _tiny(spec: Any) -> Any:
    if isinstance(spec, Discriminator):
        return replace(spec, trunk=_tiny(spec.trunk), branch=replace(spec.branch, blocks=(0, 1), ffn_dim=32))
    size = WanSize(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=64, freq_dim=16)
    return replace(spec, size=size, weights=None)
