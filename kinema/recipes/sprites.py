"""The embedded world: every method at a size that trains, samples and is judged on a laptop.

The shipped checkpoint `sprites-wan` is made by `text` and `vae`, joined by `kinema.shipping.base`, and then `wan`;
its card has the commands. `learn` is what `kinema demo` runs.

Streaming and few-step, each one command: `diffusion_forcing` or `teacher_forcing`; `ode_pairs` (kinema prepare) and
`ode_init`, or `consistency` from `teacher_forcing`; then `dmd`, `sid` or `gan`. A stage's `start`, or `teacher`, is a
run's folder or a model; by default the shipped model of the stage before it, where there is one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kinema.data.ode_pairs import MakeOdePairs, OdePairs
from kinema.data.prompts import Prompts, SpritePrompts
from kinema.data.scenes import NOVEL_SHAPES, SHAPES
from kinema.data.shards import Preparation
from kinema.data.sprites import World
from kinema.data.sprites_data import SpriteCaptions, SpriteLatents, SpriteVideos, classes
from kinema.data.tokenizer import vocabulary
from kinema.diffusion.times import Below, PerChunk, Shifted, Times, warped
from kinema.errors import UserError
from kinema.models.caption_reader import CaptionReader
from kinema.models.discriminator import ClassifierBranch, Discriminator
from kinema.models.hub import ASSETS, located
from kinema.models.text import UMT5
from kinema.models.wan.spec import Wan, WanCausal
from kinema.models.wan.transformer import WanSize
from kinema.models.wan.vae import WanVAE
from kinema.models.wan.vae_training import WanVAESize
from kinema.models.weights import open_weights
from kinema.objectives.consistency import ConsistencyDistillation
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.objective import Role
from kinema.objectives.ode_regression import OdeRegression
from kinema.objectives.reading import Reading
from kinema.objectives.reconstruction import Reconstruction
from kinema.objectives.sid import SiD
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.run import Preview, Run
from kinema.sampling import Pipeline
from kinema.training import checkpoint

# Codec and text encoder know the novel shape, as those of real models know more than the model was trained on.
EVERYTHING = World(shapes=SHAPES, one=0.6, two=0.25, behind=0.15)
TRAINED = World(one=0.75, two=0.15, behind=0.1)
SIZE = WanSize(dim=144, ffn_dim=432, heads=4, layers=6, text_dim=64, freq_dim=64)
LATENTS = (9, 16, 8, 8)  # of a clip of 33 frames of 64 x 64
BLOCK = 64  # clips rendered and encoded together: a GPU that makes few at a time waits for its launches
OF_RUNS = ("run.yaml", checkpoint.MARKER)  # what the folder of a run has, or of its checkpoint
ROWS = 40  # more tokens than any caption has
GAME = {
    "shape": LATENTS[1:],
    "frames": LATENTS[:1] * 2,
    "scored": LATENTS[0],
    "student_every": 2,
    "share_rollout": True,
}
CODEC = WanVAESize(base_dim=16, dim_mult=(1, 2, 2, 4), res_blocks=1)
PROMPTS = (
    "a big red circle moves left on a black background",
    "a small green star bounces on a navy background",
    "a big yellow cross orbits on a grey background",
    "a small blue square moves up on a brown background",
)


def text(steps: int = 3000, batch_size: int = 256) -> Run:
    """Teach a tiny UMT5 encoder to understand the captions of sprites."""
    return Run(
        objective=Reading(Role(CaptionReader(len(vocabulary()), classes()), Optim(lr=2e-3, warmup=50, anneal=steps))),
        data=SpriteCaptions(EVERYTHING),
        steps=steps,
        batch_size=batch_size,
    )


def vae(
    steps: int = 7500,
    batch_size: int = 32,
    frames: int = 9,
    clips: int = 4096,
    lr: float = 1e-3,
    start: str | None = None,
) -> Run:
    """Train a tiny Wan VAE on the pixels of sprites, from nothing or from the VAE in the folder `start`.

    Short windows are cheap and teach it to see, but only the frames they have: after 9-frame windows it gives 33 dB
    within the first 9 frames and 14 dB at the 33rd, where its causal convolutions meet a longer past than ever. After
    whole clips the same happens behind frame 48. So finish with --frames 33 --batch_size 8, then --frames 97
    --batch_size 4; more `frames` than a clip has are those of longer clips.
    """
    world = replace(EVERYTHING, frames=max(frames, EVERYTHING.frames))
    start = start_of_vae(start, "AutoencoderKLWan", "sprites-wan")
    optim = Optim(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup=30, anneal=steps, floor=0.01)
    return Run(
        objective=Reconstruction(Role(replace(CODEC, weights=start), optim, Ema(decay=0.998))),
        data=SpriteVideos(world, frames=frames, clips=clips),
        steps=steps,
        batch_size=batch_size,
    )


def wan(
    steps: int = 26000,
    batch_size: int = 64,
    clips: int = 40960,
    block: int = 256,
    lr: float = 1e-3,
    base: str = "sprites-wan",
) -> Run:
    """Train a tiny Wan text-to-video model on sprites from nothing, with the text encoder and VAE of `base`."""
    codec, encoder = WanVAE(path=base), UMT5(path=base)
    return Run(
        objective=Denoising(
            Role(
                Wan(size=SIZE, shift=3.0), Optim(lr=lr, betas=(0.9, 0.98), warmup=200, anneal=steps), Ema(decay=0.999)
            ),
            times=Shifted(3.0),
        ),
        data=SpriteLatents((TRAINED,), codec, encoder, clips=clips, block=block),
        steps=steps,
        batch_size=batch_size,
        pipeline=Pipeline(encoder, codec, frames=33, height=64, width=64, fps=8, guidance=3.0),
        preview=Preview(PROMPTS, every=0),
    )


def learn(steps: int = 400, lr: float = 5e-4, clips: int = 192, base: str = "sprites-wan") -> Run:
    """Teach the shipped model a shape it has never drawn, the heart, without forgetting the others.

    Only what reads the caption learns: training everything for as long draws no better hearts, and worse known shapes.
    """
    spec, pipeline, _ = _wan(base)
    return Run(
        objective=Denoising(
            Role(spec, Optim(lr=lr, warmup=20, anneal=steps, train="cross_attn|text_embedding"), Ema(decay=0.98)),
            times=Shifted(spec.shift),
        ),
        data=SpriteLatents((World(shapes=NOVEL_SHAPES), TRAINED), pipeline.codec, pipeline.text, clips=clips),
        steps=steps,
        batch_size=16,
        pipeline=pipeline,
        save_every=100,
    )


def diffusion_forcing(
    steps: int = 3000, batch_size: int = 64, lr: float = 5e-4, clips: int = 24576, base: str = "sprites-wan"
) -> Run:
    """Make the shipped model causal: chunks of unequal noise, each seeing the earlier ones as noisy as they are."""
    return _causal_tuning(None, steps, batch_size, lr, clips, base)


def teacher_forcing(
    steps: int = 3000, batch_size: int = 64, lr: float = 5e-4, clips: int = 24576, base: str = "sprites-wan"
) -> Run:
    """Make the shipped model causal: noisy chunks that see the earlier ones clean."""
    return _causal_tuning(Below(0.0), steps, batch_size, lr, clips, base)


def ode_pairs(clips: int = 4096, batch: int = 256, steps: int = 48, base: str = "sprites-wan") -> Preparation:
    """Make the shipped model's trajectories from noise to video for the captions of `clips` clips."""
    spec, pipeline, guidance = _wan(base)
    return MakeOdePairs(
        SpritePrompts((TRAINED,), clips), pipeline.text, spec, LATENTS, steps, 4, guidance, 0, batch, batch
    )


def ode_init(
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 5e-4,
    pairs: str = "runs/sprites-ode_pairs",
    start: str | None = "sprites-wan-causal",
    base: str = "sprites-wan",
) -> Run:
    """Teach a causal student to jump to the end of the teacher's trajectories from four places on them."""
    spec, pipeline, start = _start(start, base)
    student = Role(spec, Optim(lr=lr, warmup=50, anneal=steps), Ema(decay=0.99))
    data = OdePairs(pairs, spec.steps_at, rows=ROWS, resident=True)
    return Run(OdeRegression(student=student), data, steps, batch_size, init_from=start, **_shown(pipeline))


def consistency(
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 3e-4,
    clips: int = 24576,
    teacher: str = "runs/sprites-teacher_forcing",
    base: str = "sprites-wan",
) -> Run:
    """Teach a causal student to agree with itself along a causal teacher's ODE; another start for dmd, sid and gan."""
    spec, pipeline, run = _start(teacher, base, "--teacher")
    student = Role(spec, Optim(lr=lr, warmup=50, anneal=steps), Ema(decay=0.99))
    objective = ConsistencyDistillation(student=student, teacher=Role(spec), guidance=_wan(base)[2], batched=True)
    data = SpriteLatents((TRAINED,), pipeline.codec, pipeline.text, clips=clips, dropout=0.0, block=BLOCK)
    start = {"init_from": run, "init_roles": {"teacher": "student"}} if run else {}
    return Run(objective, data, steps, batch_size, **start, **_shown(pipeline))


def dmd(
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 1e-4,
    clips: int = 4096,
    start: str | None = "sprites-wan-ode",
    base: str = "sprites-wan",
) -> Run:
    """Self-forcing: a four-step causal student whose own videos are moved towards the teacher's distribution."""
    spec, pipeline, start = _start(start, base)
    teacher, _, guidance = _wan(base)
    objective = DMD(
        student=Role(spec, Optim(lr=lr, betas=(0.0, 0.999)), Ema(decay=0.99, start=40)),
        critic=Role(Wan(weights=base, shift=spec.shift), Optim(lr=2 * lr, betas=(0.0, 0.999))),
        teacher=Role(teacher),
        guidance=guidance,
        batched=True,
        **GAME,
    )
    data = Prompts(SpritePrompts((TRAINED,), clips), pipeline.text, rows=ROWS, resident=True)
    return Run(objective, data, steps, batch_size, init_from=start, **_shown(pipeline))


def sid(
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 1e-4,
    clips: int = 4096,
    start: str | None = "sprites-wan-ode",
    base: str = "sprites-wan",
) -> Run:
    """Self-forcing with score identity distillation in the place of DMD."""
    run = dmd(steps, batch_size, lr, clips, start, base)
    objective = SiD(**run.objective.roles(), guidance=_wan(base)[2], batched=True, **GAME)
    return replace(run, objective=objective)


def gan(
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 1e-4,
    clips: int = 24576,
    start: str | None = "sprites-wan-ode",
    base: str = "sprites-wan",
) -> Run:
    """Self-forcing against a discriminator that compares with rendered videos; it needs no teacher."""
    run = dmd(steps, batch_size, lr, start=start, base=base)
    roles, pipeline = run.objective.roles(), run.pipeline
    assert pipeline is not None
    critic = Discriminator(Wan(weights=base, shift=_wan(base)[0].shift), ClassifierBranch((1, 3, 5), ffn_dim=512))
    objective = GAN(
        student=roles["student"],
        critic=replace(roles["critic"], spec=critic),
        g_weight=1.0,
        d_weight=1.0,
        relativistic=True,
        r1=0.1,
        r2=0.1,
        branch_warmup=100,
        **GAME,
    )
    data = SpriteLatents((TRAINED,), pipeline.codec, pipeline.text, clips=clips, dropout=0.0, block=BLOCK)
    return replace(run, objective=objective, data=data)


def _wan(base: str) -> tuple[Wan, Pipeline, float]:
    """The spec of the Wan named `base`, the pipeline around it, and its guidance."""
    spec, pipeline = describe(base)
    if not isinstance(spec, Wan) or isinstance(spec, WanCausal):
        raise UserError(f"{base} is no bidirectional Wan; give --base sprites-wan, or the folder of one")
    assert not callable(pipeline.guidance), "a folder says a number"
    return spec, pipeline, pipeline.guidance


def _few_step(base: str, weights: str | None = None) -> tuple[WanCausal, Pipeline]:
    """The spec of a causal student of `base`, and the pipeline that samples it: in few steps, without guidance."""
    spec, pipeline, _ = _wan(base)
    causal = WanCausal(weights=weights or base, shift=spec.shift, steps_at=warped((1, 0.75, 0.5, 0.25), spec.shift))
    return causal, replace(pipeline, steps=len(causal.steps_at), guidance=1.0)


def _start(start: str | None, base: str, option: str = "--start") -> tuple[WanCausal, Pipeline, str | None]:
    """As `_few_step`, from the model `start`; if that is a run's folder, or one that is yet to be, the last says so."""
    if start is None or is_run(start) or not (Path(start).exists() or (ASSETS / start).is_dir()):
        return *_few_step(base), start
    if not (located(start) / "model_index.json").exists() or not isinstance(describe(start)[0], Wan):
        raise UserError(
            f"{option} {start} is neither a Wan nor a run of one; give a causal one (sprites-wan-ode) or a run's folder"
        )
    return *_few_step(base, start), None


def is_run(folder: str) -> bool:
    """Whether a folder is that of a run, or of its checkpoint."""
    return any((Path(folder) / name).exists() for name in OF_RUNS)


def start_of_vae(start: str | None, kind: str, example: str) -> str | None:
    """`start`, if it names weights of the autoencoder that diffusers calls `kind`, or nothing. UserError if not."""
    if start is None:
        return None
    if is_run(start):
        raise UserError(f"--start {start} is a run; to begin from its weights, give --run.init_from {start}")
    found = open_weights(start, "vae").config.get("_class_name", kind)
    if found != kind:
        raise UserError(f"--start {start} has an autoencoder of class {found}, not {kind}; give one as {example}")
    return start


def _shown(pipeline: Pipeline) -> dict[str, Any]:
    return {"pipeline": pipeline, "preview": Preview(PROMPTS)}


def _causal_tuning(context: Times | None, steps: int, batch_size: int, lr: float, clips: int, base: str) -> Run:
    spec, pipeline = _few_step(base)
    pipeline = replace(pipeline, steps=50, guidance=_wan(base)[2])
    objective = Denoising(
        Role(spec, Optim(lr=lr, betas=(0.9, 0.98), warmup=100, anneal=steps), Ema(decay=0.999)),
        times=PerChunk(Shifted(spec.shift), spec.chunk),
        context=context,
    )
    data = SpriteLatents((TRAINED,), pipeline.codec, pipeline.text, clips=clips, block=BLOCK)
    return Run(objective, data, steps, batch_size, **_shown(pipeline))
