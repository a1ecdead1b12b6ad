"""One step on the embedded world: a video tokenizer, a many-step model of its codes, and its one-step students.

`tokenizer`, then `python -m kinema.shipping codes RUN BASE`; `ursa --base BASE`, then `... shipping model RUN TEACHER`;
`dimo --teacher TEACHER` or `reinforce`, and `... shipping model RUN STUDENT TEACHER`.
"""

from dataclasses import replace
from typing import Any

from kinema.config import nearest
from kinema.data.codes import CodePrompts, SpriteCodes
from kinema.data.prompts import SpritePrompts
from kinema.data.sprites_data import SpriteVideos
from kinema.data.tokenizer import vocabulary
from kinema.diffusion.times import NearData, Shifted, SomeShared
from kinema.diffusion.token_sampling import Jumps, Redraws
from kinema.errors import UsageError, UserError
from kinema.models.ursa.codec import FSQTraining, URSACodec
from kinema.models.ursa.spec import URSA, Metric
from kinema.models.ursa.text import QwenText
from kinema.models.ursa.tokenizer import FSQSize
from kinema.models.ursa.transformer import URSASize
from kinema.objectives.code_reconstruction import CodeReconstruction
from kinema.objectives.denoising import Denoising
from kinema.objectives.dimo import Dimo, Mixed
from kinema.objectives.objective import Role
from kinema.objectives.reinforce import Reinforce
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.recipes.sprites import EVERYTHING, PROMPTS, TRAINED
from kinema.run import Preview, Run
from kinema.sampling import Pipeline

LEVELS = (8, 8, 6, 5)
CODEC = FSQSize(block_out_channels=(48, 64, 64), layers_per_block=1, latent_channels=8, levels=LEVELS, sample_frames=33)
WORDS = len(vocabulary())
SIZE = URSASize(
    dim=128,
    ffn_dim=384,
    heads=4,
    kv_heads=2,
    layers=7,
    codes=CODEC.codes,
    words=WORDS + 1,
    bov=WORDS,
    head_dim=32,
    theta=1e4,
    text_len=40,
)
PATH = Metric(LEVELS, alpha=0.9, c=3.2)


def tokenizer(steps: int = 10000, batch_size: int = 16, clips: int = 4096, lr: float = 1e-3) -> Run:
    """Train a tiny FSQ video tokenizer on whole clips of sprites."""
    optim = Optim(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup=100, anneal=steps, floor=0.01)
    return Run(
        objective=CodeReconstruction(Role(FSQTraining(CODEC), optim, Ema(decay=0.998))),
        data=SpriteVideos(EVERYTHING, frames=CODEC.sample_frames, clips=clips),
        steps=steps,
        batch_size=batch_size,
    )


def ursa(
    steps: int = 10000,
    batch_size: int = 32,
    clips: int = 24576,
    block: int = 16,
    lr: float = 1e-3,
    shift: float = 1.0,
    base: str = "sprites-ursa",
) -> Run:
    """Train a tiny URSA text-to-video model on sprites from nothing, with the tokenizers of `base`."""
    codec, text = URSACodec(base), QwenText(base, length=SIZE.text_len or 0)
    optim = Optim(lr=lr, betas=(0.9, 0.95), weight_decay=0.05, warmup=200, anneal=steps, floor=0.01)
    return Run(
        objective=Denoising(
            Role(URSA(PATH, SIZE, shift=shift), optim, Ema(decay=0.999)), times=SomeShared(Shifted(shift))
        ),
        data=SpriteCodes((TRAINED,), codec, text, clips=clips, block=block),
        steps=steps,
        batch_size=batch_size,
        pipeline=Pipeline(text, codec, frames=33, height=64, width=64, fps=8, steps=25, guidance=3.0, sampler=Jumps()),
        preview=Preview(PROMPTS, every=0),
    )


def dimo(
    steps: int = 6000,
    batch_size: int = 32,
    lr: float = 1e-4,
    guidance: float = 3.0,
    student_steps: int = 1,
    clips: int = 24576,
    teacher: str = "sprites-ursa",
) -> Run:
    """Distil the model of sprites' codes into one that takes 1 step, or `student_steps`, by Di[M]O."""
    return _distilled(Dimo, steps, batch_size, lr, student_steps, clips, teacher, guidance=guidance)


def reinforce(
    steps: int = 6000,
    batch_size: int = 16,
    lr: float = 1e-4,
    guidance: float = 3.0,
    draws: int = 4,
    clips: int = 24576,
    teacher: str = "sprites-ursa",
) -> Run:
    """The same by a score function, for comparison; guidance is folded as in `dimo`."""
    return _distilled(Reinforce, steps, batch_size, lr, 1, clips, teacher, guidance=guidance, draws=draws)


def ablation(
    knob: str = "none", steps: int = 1500, batch_size: int = 32, lr: float = 2e-4, teacher: str = "sprites-ursa"
) -> Run:
    """One of `KNOBS`: `dimo` or `reinforce` with one thing changed; `python -m kinema.ablations` compares them all."""
    if knob not in KNOBS:
        raise UsageError(f"there is no knob {knob!r}{nearest(knob, KNOBS)}; use {', '.join(KNOBS)}")
    kind, changes = KNOBS[knob]
    return _distilled(kind, steps, batch_size, lr, 1, 24576, teacher, guidance=3.0, **changes)


NOISY, EVEN, CLEAN = (SomeShared(times) for times in (Shifted(3.0), Shifted(1.0), NearData()))
KNOBS: dict[str, tuple[type[Dimo], dict[str, Any]]] = {
    "none": (Dimo, {}),  # times biased to noise, then even; forward divergence; nothing else
    "times-even": (Dimo, {"first": EVEN, "then": EVEN}),
    "times-noisy": (Dimo, {"first": NOISY, "then": NOISY}),
    "times-near-data": (Dimo, {"first": CLEAN, "then": EVEN}),
    "mixed-start": (Dimo, {"mixed": Mixed(0.2, 0.2)}),
    # both are means over tokens: next to a sum of 576 they would be nothing
    "entropy": (Dimo, {"entropy": (0.01, 0.05), "reduction": "mean"}),
    "kd": (Dimo, {"kd": 1.0, "reduction": "mean"}),
    "reverse-half": (Dimo, {"reverse": 0.5}),
    "reverse-all": (Dimo, {"reverse": 1.0}),
    "reverse-minus-fifth": (Dimo, {"reverse": -0.2}),
    "critic-twice": (Dimo, {"student_every": 2}),
    "smoothing": (Dimo, {"smoothing": 0.1}),
    "mean": (Dimo, {"reduction": "mean"}),
    "reinforce": (Reinforce, {"reverse": 0.5}),
    "reinforce-jeffreys": (Reinforce, {"reverse": 0.5, "reward": "jeffreys"}),
    "reinforce-running-mean": (Reinforce, {"reverse": 0.5, "baseline": "ema", "draws": 1}),
    "reinforce-sequence": (Reinforce, {"reverse": 0.5, "credit": "sequence"}),
}


def _distilled(
    kind: type[Dimo], steps: int, batch_size: int, lr: float, passes: int, clips: int, teacher: str, **how
) -> Run:
    spec, pipeline = describe(teacher)
    if not isinstance(spec, URSA):
        raise UserError(f"{teacher} is no URSA; give the folder of one with --teacher")
    assert isinstance(pipeline.codec, URSACodec) and isinstance(pipeline.text, QwenText), "what `describe` makes for it"
    optim = Optim(lr=lr, betas=(0.9, 0.999), weight_decay=0.0, warmup=100, train="^(?!embed_tokens)")
    times = spec.times(passes)
    sampler = Redraws() if passes > 1 else Jumps()
    return Run(
        objective=kind(
            student=Role(replace(spec, continues=False), optim, Ema(decay=0.999)),
            teacher=Role(spec),
            critic=Role(spec, replace(optim, lr=2 * lr)),
            switch=round(0.6 * steps),
            critic_first=min(200, steps // 10),
            steps_at=times,
            **how,
        ),
        data=CodePrompts(SpritePrompts((TRAINED,), clips), pipeline.codec, pipeline.text, 33, 64, 64),
        steps=steps,
        batch_size=batch_size,
        pipeline=replace(pipeline, steps=passes, guidance=1.0, sampler=sampler),
        preview=Preview(PROMPTS, every=0),
    )
