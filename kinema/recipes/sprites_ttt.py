"""Long video on the embedded world: the tiny CogVideoX learns stories of 1, 3, 6, 12 and 21 scenes, stage by stage.

A character opens the story, others play, and in the last scene it comes back, called only "the first one": what it
looked like has to be remembered. Stage `3x` starts from `runs/sprites-ttt_1x`, and so on; `direct` trains at full
length from the start with as much computation, for comparison.
"""

from dataclasses import dataclass, replace

from kinema.data.sprites import World
from kinema.data.stories import SpriteStories
from kinema.diffusion.times import LogitNormal
from kinema.errors import UserError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.ttt.edit import TTT, MixerKind
from kinema.models.ttt.full_attention import FullAttention, NoMixer
from kinema.models.ttt.gated_deltanet import GatedDeltaNet
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP, TTTLinear
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.recipes.ttt_video import DECAYS, LATER, MIXERS, Kind, half_life
from kinema.run import Run, Validation

# A scene has 168 tokens here, not 18,000, so each must move the fast weights more; and all kinds walk alike.
KINDS: dict[str, MixerKind] = {
    "ttt_linear": TTTLinear(mini_batch=64, base_lr=10.0, spread=0.18, passes="parallel", order="segments"),
    "ttt_mlp": TTTMLP(mini_batch=64, base_lr=0.3, spread=1.0, passes="parallel", order="segments"),
    "lact": LaCT(heads=1, base_lr=0.03),
    "gated_deltanet": GatedDeltaNet(dt=(1e-5, 1e-3)),
    "attention": FullAttention(),
    "none": NoMixer(),
}


@dataclass(frozen=True)
class Stage:
    """clips: how many stories there are; peak: the mixers' rate, which comes down to the backbone's."""

    scenes: int
    steps: int
    batch_size: int
    clips: int
    peak: float
    trains: str


# What the base knows already, a scene, needs few steps; memory is learnt where it is cheap, in short stories.
STAGES = {
    "1x": Stage(1, 300, 32, 4096, 2e-3, ""),
    "3x": Stage(3, 1500, 32, 8192, 2e-3, ""),
    "6x": Stage(6, 1500, 16, 4096, 2e-3, LATER),
    "12x": Stage(12, 600, 8, 2048, 1e-3, LATER),
    "21x": Stage(21, 400, 8, 1024, 1e-3, LATER),
}
# Who comes back is decided from pure noise on: its colour and size at once, its shape where t is 0.4 to 0.8 (there a
# wrong word for it costs most). Below, everything is seen, and nothing has to be remembered.
TIMES = LogitNormal(1.2, 1.0)
BACKBONE = 4e-4


def _1x(mixer: Kind = "lact", base: str = "sprites-cogvideox", steps: int | None = None) -> Run:
    """Train mixers and network on stories of one scene."""
    return _run(STAGES["1x"], mixer, base, steps, "")


def _3x(
    mixer: Kind = "lact",
    base: str = "sprites-cogvideox",
    steps: int | None = None,
    previous: str = "runs/sprites-ttt_1x",
) -> Run:
    """Stories of 3 scenes, from stage 1x."""
    return _run(STAGES["3x"], mixer, base, steps, previous)


def _6x(
    mixer: Kind = "lact",
    base: str = "sprites-cogvideox",
    steps: int | None = None,
    previous: str = "runs/sprites-ttt_3x",
) -> Run:
    """Stories of 6 scenes, from stage 3x: mixers and attention's projections."""
    return _run(STAGES["6x"], mixer, base, steps, previous)


def _12x(
    mixer: Kind = "lact",
    base: str = "sprites-cogvideox",
    steps: int | None = None,
    previous: str = "runs/sprites-ttt_6x",
) -> Run:
    """Stories of 12 scenes, from stage 6x."""
    return _run(STAGES["12x"], mixer, base, steps, previous)


def _21x(
    mixer: Kind = "lact",
    base: str = "sprites-cogvideox",
    steps: int | None = None,
    previous: str = "runs/sprites-ttt_12x",
) -> Run:
    """Stories of 21 scenes, from stage 12x."""
    return _run(STAGES["21x"], mixer, base, steps, previous)


def direct(mixer: Kind = "lact", base: str = "sprites-cogvideox", steps: int | None = None) -> Run:
    """Stories of 21 scenes from the start, as many scenes in all as the five stages together see."""
    last = STAGES["21x"]
    scenes = sum(stage.steps * stage.batch_size * stage.scenes for stage in STAGES.values())
    stage = replace(
        last,
        steps=scenes // (last.batch_size * last.scenes),
        clips=2048,
        peak=STAGES["1x"].peak,
        trains="",
    )
    return _run(stage, mixer, base, steps, "")


def _run(stage: Stage, mixer: Kind, base: str, steps: int | None, previous: str) -> Run:
    steps = stage.steps if steps is None else steps
    spec, pipeline = describe(base)
    if not isinstance(spec, CogVideoX):
        raise UserError(f"{base} is no CogVideoX; give the folder of one that knows sprites")
    spec = replace(spec, edits=(TTT(KINDS[mixer]),))
    tokens = spec.dimensions.text_tokens
    optim = Optim(
        lr=BACKBONE,
        betas=(0.9, 0.98),
        weight_decay=1e-4,
        warmup=50,
        anneal=steps,
        floor=BACKBONE / stage.peak,
        groups={MIXERS: stage.peak},
        train=stage.trains,
        anneals=MIXERS,
        decays=DECAYS["new"],
    )
    stories = SpriteStories(World(), pipeline.codec, pipeline.text, stage.scenes, stage.clips, rows=tokens)
    # a block of stories is rendered and encoded together; the autoencoder's memory is that of all their frames
    stories = replace(stories, block=max(1, 16 // stage.scenes))
    held_out = replace(stories, world=World(seed=1), clips=16, dropout=0.0)
    return Run(
        objective=Denoising(Role(spec, optim, Ema(decay=half_life(steps))), times=TIMES),
        data=stories,
        steps=steps,
        batch_size=stage.batch_size,
        pipeline=pipeline,
        validation=Validation(held_out, (0.3, 0.6, 0.9, 1.0), samples=16, every=500),
        init_from=previous or None,
        init_average=False,
        init_finished=bool(previous),
        save_every=500,
    )
