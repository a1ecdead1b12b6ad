"""URSA at real size: fine-tuning on cached codes, and one-step students by Di[M]O from prompts alone.

`weights` is a folder of the released layout; `prompts` a file or a folder of captions. On 8 GPUs:
`torchrun --nproc-per-node 8 -m kinema train ursa_dimo:dimo …`, with `--run.plan.reshard false` for ZeRO-2.
"""

import logging
from dataclasses import replace
from typing import Any

from kinema.data.codes import CaptionFiles, CodePrompts
from kinema.data.prepared_videos import PreparedCodes
from kinema.diffusion.times import Shifted, SomeShared
from kinema.diffusion.token_sampling import Jumps, Redraws
from kinema.errors import UsageError
from kinema.models.ursa.codec import URSACodec
from kinema.models.ursa.spec import URSA
from kinema.models.ursa.text import NEGATIVE, QwenText
from kinema.objectives.denoising import Denoising
from kinema.objectives.dimo import Dimo
from kinema.objectives.objective import Role
from kinema.objectives.reinforce import Reinforce
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.run import Plan, Run
from kinema.sampling import Pipeline

SEED = 1337
BODY = r"^(blocks|norm|lm_head)\b"  # what learns: the embedding stays the teacher's
TRAINED_FRAMES = 49

log = logging.getLogger(__name__)


def dimo(
    weights: str,
    prompts: str,
    frames: int = 17,
    height: int = 320,
    width: int = 512,
    steps: int = 20_000,
    batch_size: int = 32,
    micro_batch: int = 1,
    guidance: float = 3.0,
    student_steps: int = 1,
) -> Run:
    """Distil URSA into a student of one step whose weights hold the guidance; prompts only."""
    times = SomeShared(Shifted(3.0)), SomeShared(Shifted(1.0))
    how = {"guidance": guidance, "first": times[0], "then": times[1], "switch": round(0.6 * steps), "critic_first": 200}
    text = QwenText(weights, unconditional=NEGATIVE)
    return _distilled(
        Dimo, weights, prompts, (frames, height, width), steps, batch_size, micro_batch, text, 0.0, student_steps, how
    )


def reinforce(
    weights: str,
    prompts: str,
    frames: int = 49,
    height: int = 320,
    width: int = 512,
    steps: int = 50_000,
    batch_size: int = 16,
    micro_batch: int = 2,
    draws: int = 4,
) -> Run:
    """The same by a score function, unguided: its student is deployed at guidance 3."""
    times = SomeShared(Shifted(3.0))
    how = {"guidance": 1.0, "first": times, "then": times, "critic_first": 200, "draws": draws}
    size = (frames, height, width)
    made = _distilled(Reinforce, weights, prompts, size, steps, batch_size, micro_batch, QwenText(weights), 0.1, 1, how)
    assert made.pipeline is not None
    return replace(made, pipeline=replace(made.pipeline, guidance=3.0))


def smoke(weights: str, prompts: str, steps: int = 50, batch_size: int = 1) -> Run:
    """50 steps of `dimo` at 17x256x256, with a checkpoint at the end: does everything fit and move?"""
    made = dimo(weights, prompts, 17, 256, 256, steps, batch_size)
    assert isinstance(made.objective, Dimo)
    return replace(made, objective=replace(made.objective, critic_first=0), save_every=steps)


def sft(weights: str, data: str, steps: int = 1000, batch_size: int = 32, micro_batch: int = 1) -> Run:
    """Fine-tune URSA on the codes of your own videos, from `kinema prepare --for ursa`."""
    spec, pipeline = described(weights)
    text, codec = replace(pipeline.text, unconditional="", motion=None), pipeline.codec  # type: ignore[type-var]
    assert isinstance(text, QwenText) and isinstance(codec, URSACodec), "what `describe` makes for a URSA"
    optim = Optim(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, clip=1.0, warmup=100)  # k: none is published
    return Run(
        objective=Denoising(Role(spec, optim, Ema(decay=0.9999)), times=Shifted(spec.shift)),
        data=PreparedCodes(data, codec, text),
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        pipeline=pipeline,
        plan=Plan(compute="bfloat16", recompute="block"),
        seed=SEED,
    )


def described(weights: str) -> tuple[URSA, Pipeline]:
    """The spec of a URSA and the pipeline around it."""
    spec, pipeline = describe(weights)
    if not isinstance(spec, URSA):
        raise UsageError(f"{weights} is no URSA; give the folder of one in the released layout")
    return spec, pipeline


def _distilled(
    kind: type[Dimo],
    weights: str,
    prompts: str,
    size: tuple[int, int, int],
    steps: int,
    batch_size: int,
    micro_batch: int,
    text: QwenText,
    dropout: float,
    passes: int,
    how: dict[str, Any],
) -> Run:
    spec, codec = URSA.from_pretrained(weights), URSACodec(weights)
    if codec.size.codes != spec.dimensions.codes:
        raise UsageError(
            f"the network of {weights} has {spec.dimensions.codes:,} codes and its tokenizer {codec.size.codes:,}; "
            "they are of two models, so download the folder again"
        )
    if size[1:] != (320, 512):
        log.warning("the video teacher was trained at 320x512; at %dx%d it is a weak one", *size[1:])
    optim = Optim(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0, warmup=100, train=BODY)
    times = spec.times(passes)
    return Run(
        objective=kind(
            student=Role(replace(spec, continues=False), optim, Ema(decay=0.9999)),
            teacher=Role(spec, weights="bfloat16"),
            critic=Role(spec, replace(optim, lr=2e-6)),
            steps_at=times,
            **how,
        ),
        data=CodePrompts(CaptionFiles(prompts), codec, text, *size, dropout=dropout),
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        pipeline=Pipeline(
            text=replace(text, motion=9.0),
            codec=codec,
            frames=size[0],
            height=size[1],
            width=size[2],
            fps=12,
            steps=passes,
            guidance=1.0,
            sampler=Redraws() if passes > 1 else Jumps(),
        ),
        plan=Plan(compute="bfloat16", recompute="block"),
        seed=SEED,
    )
