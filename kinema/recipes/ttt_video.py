"""Long video (arXiv 2504.05298): CogVideoX-5B with a global mixer in every block, at 3, 9, 18, 30 and 63 seconds.

Each stage is a run that starts from the last checkpoint of the one before, `runs/ttt_video-3s` for `ttt_video:9s`, and
any of them can be the last. `model` is a CogVideoX pipeline in diffusers' layout (--weights takes the transformer from
elsewhere, such as SAT or the public code), `data` a folder of prepared stories or the public code's list of videos.

    kinema train ttt_video:3s --model CogVideoX-5b --data stories
    kinema train ttt_video:9s --model CogVideoX-5b --data stories
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kinema.data.prepared_videos import PreparedStories
from kinema.data.stories import PublicSegments
from kinema.diffusion.times import Stratified
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.lora import LoRA
from kinema.models.text import T5
from kinema.models.ttt.edit import KINDS, TTT
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.recipes.cogvideox import described
from kinema.run import Plan, Run, Validation

Kind = Literal["lact", "ttt_mlp", "ttt_linear", "gated_deltanet", "none", "attention"]


@dataclass(frozen=True)
class Stage:
    """shard, context: how 8 GPUs share network and video; further ones hold copies. `peak` is the mixers' rate."""

    seconds: int
    steps: int
    warmup: int
    peak: float
    trains: str
    shard: int
    context: int
    save_every: int

    @property
    def segments(self) -> int:
        return self.seconds // 3


MIXERS = r"\.mixer\."
LATER = r"\.mixer\.|\.attn\.(q|k|v|out|norm_q|norm_k)\."
STAGES = (
    Stage(3, 5000, 100, 1e-4, "", 8, 1, 500),
    Stage(9, 5000, 100, 1e-5, LATER, 8, 1, 500),
    Stage(18, 1000, 50, 1e-5, LATER, 8, 1, 500),
    Stage(30, 1000, 50, 1e-5, LATER, 4, 2, 25),
    Stage(63, 250, 25, 1e-5, LATER, 2, 4, 25),
)
ROWS = 512  # tokens of a segment's text, at most
BACKBONE = 1e-5  # the rate of what the base brought along, which the mixers' comes down to
# Fast weights, rates and gates are no matrices of features, and what is new does not pull them to zero; the public code
# spares only what these words are in.
DECAYS = {
    "new": r"^(?!.*(bias|norm|\.gate\.|\.lr\.|\.W\d$|A_log|dt_bias|\.beta\.|\.decay\.))",
    "public": r"^(?!.*(bias|norm|b1|b2))",
}


def _3s(model: str, data: str, mixer: Kind = "lact", weights: str = "", held_out: str = "", processes: int = 8) -> Run:
    """Stage 1: fine-tune all of a CogVideoX and its new mixers on videos of one segment."""
    return _stage(STAGES[0], model, data, mixer, weights, held_out, processes, "")


def _9s(
    model: str,
    data: str,
    mixer: Kind = "lact",
    weights: str = "",
    held_out: str = "",
    processes: int = 8,
    previous: str = "runs/ttt_video-3s",
) -> Run:
    """Stage 2: mixers and attention's projections, on 3 segments, from stage 1."""
    return _stage(STAGES[1], model, data, mixer, weights, held_out, processes, previous)


def _18s(
    model: str,
    data: str,
    mixer: Kind = "lact",
    weights: str = "",
    held_out: str = "",
    processes: int = 8,
    previous: str = "runs/ttt_video-9s",
) -> Run:
    """Stage 3: the same on 6 segments, from stage 2."""
    return _stage(STAGES[2], model, data, mixer, weights, held_out, processes, previous)


def _30s(
    model: str,
    data: str,
    mixer: Kind = "lact",
    weights: str = "",
    held_out: str = "",
    processes: int = 8,
    previous: str = "runs/ttt_video-18s",
) -> Run:
    """Stage 4: the same on 10 segments, from stage 3."""
    return _stage(STAGES[3], model, data, mixer, weights, held_out, processes, previous)


def _63s(
    model: str,
    data: str,
    mixer: Kind = "lact",
    weights: str = "",
    held_out: str = "",
    processes: int = 8,
    previous: str = "runs/ttt_video-30s",
) -> Run:
    """Stage 5: the same on 21 segments, from stage 4."""
    return _stage(STAGES[4], model, data, mixer, weights, held_out, processes, previous)


def quick_3s(model: str, data: str, mixer: Kind = "lact", rank: int = 128, steps: int = 1000) -> Run:
    """One GPU: mixers, and adapters of attention on a frozen base, on videos of one segment."""
    return _quick(STAGES[0], model, data, mixer, rank, steps, "")


def quick_9s(
    model: str,
    data: str,
    mixer: Kind = "lact",
    rank: int = 128,
    steps: int = 1000,
    previous: str = "runs/ttt_video-quick_3s",
) -> Run:
    """One GPU: the same on 3 segments, from quick_3s."""
    return _quick(STAGES[1], model, data, mixer, rank, steps, previous)


def _stage(
    stage: Stage,
    model: str,
    data: str,
    mixer: Kind,
    weights: str,
    held_out: str,
    processes: int,
    previous: str,
) -> Run:
    spec, pipeline = described(model, weights)
    edit = spec.long or TTT(KINDS[mixer]())  # what the weights have, where they have one
    parity = edit.mixer.kind in ("ttt_mlp", "ttt_linear")
    spec = replace(spec, edits=(*(e for e in spec.edits if not isinstance(e, TTT)), edit))
    text, codec = pipeline.text, pipeline.codec
    assert isinstance(codec, CogVideoXVAE) and isinstance(text, T5), "what `describe` makes for a CogVideoX"
    if Path(data).suffix == ".jsonl":  # its latents are what the autoencoder says, unscaled, and its texts are padded
        codec, text = replace(codec, latent_scale=1.0), replace(text, unconditional=None)
    else:
        text = replace(text, tokens=ROWS, padded=False, unconditional="")
    text = replace(text, scene_tokens=True)
    optim = mixer_optim(stage, BACKBONE, DECAYS["public" if parity else "new"])
    ema = None if parity else Ema(decay=half_life(stage.steps))
    stride = spec.dimensions.grid[0] // spec.dimensions.patch[0] - 1
    validation = None
    if held_out:
        validation = Validation(_data(held_out, stage, stride, 0.0, codec, text), samples=16, every=stage.save_every)
    return Run(
        objective=Denoising(Role(spec, optim, ema), times=Stratified()),
        data=_data(data, stage, stride, 0.1, codec, text),
        steps=stage.steps,
        batch_size=64,
        micro_batch=1,
        pipeline=replace(pipeline, text=text, codec=codec, fps=16, frames=4 * stride + 1),
        plan=plan(stage, processes),
        validation=validation,
        init_from=previous or None,
        init_average=False,
        init_finished=bool(previous),
        seed=42,
        save_every=stage.save_every,
        keep=3,
    )


def _quick(stage: Stage, model: str, data: str, mixer: Kind, rank: int, steps: int, previous: str) -> Run:
    run = _stage(replace(stage, steps=steps, warmup=50, trains=""), model, data, mixer, "", "", 1, previous)
    assert isinstance(run.objective, Denoising)
    role = run.objective.student
    assert isinstance(role.spec, CogVideoX)
    # the adapters first: they freeze what is there, and mixers that come after them learn
    edits = (LoRA(rank=rank, alpha=rank / 2, base="bfloat16"), *role.spec.edits)
    optim = replace(role.optim or Optim(), lr=1e-4, groups={MIXERS: stage.peak})
    role = replace(role, spec=replace(role.spec, edits=edits), optim=optim, ema=None)
    return replace(run, objective=replace(run.objective, student=role), batch_size=8, save_every=100)


def mixer_optim(stage: Stage, backbone: float, decays: str) -> Optim:
    """The base's rate is constant after the warm-up; the mixers' comes down to it by a cosine.

    Step s of the warm-up has (s + 1) / warmup of the rate, so that the last of these steps has all of it.
    """
    return Optim(
        lr=backbone,
        betas=(0.9, 0.95),
        weight_decay=1e-4,
        clip=0.1,
        warmup=stage.warmup - 1,
        anneal=stage.steps + 1,
        floor=backbone / stage.peak,
        groups={MIXERS: stage.peak},
        train=stage.trains,
        anneals=MIXERS,
        decays=decays,
    )


def half_life(steps: int) -> float:
    """The decay of an average that forgets half in a twentieth of the steps. Of no steps: 0, for the run says so."""
    return 0.5 ** (20 / steps) if steps else 0.0


def plan(stage: Stage, processes: int) -> Plan:
    """8 GPUs share a video and the network as the stage says, others hold copies; fewer GPUs share what they can."""
    context = next(n for n in (stage.context, 2, 1) if n <= stage.context and processes % n == 0)
    rest = processes // context
    shard = next(n for n in (stage.shard, 4, 2, 1) if n <= stage.shard and rest % n == 0)
    if processes < 8:
        shard = rest
    return Plan(replicate=rest // shard, shard=shard, context=context, compute="bfloat16", recompute="block")


def _data(path: str, stage: Stage, stride: int, dropout: float, codec: CogVideoXVAE, text: T5) -> Any:
    if Path(path).suffix == ".jsonl":
        return PublicSegments(path, stage.segments, stride=stride, dropout=dropout)
    return PreparedStories(path, codec, text, stage.segments, dropout)
