"""Tiny long videos on the ranks of a context group."""

from pathlib import Path

import torch
from jobs import whole
from jobs_cogvideox import randomised

from kinema.data.batch import Batch
from kinema.diffusion.times import Uniform
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize
from kinema.models.ttt.edit import KINDS, TTT
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run
from kinema.seeds import keys
from kinema.training.trainer import Trainer

SIZE = CogVideoXSize(
    heads=4,
    layers=2,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    time_dim=16,
    text_dim=8,
    text_tokens=3,
    grid=(3, 4, 4),
)
CPU = torch.device("cpu")
SMALL = {"ttt_linear": {"mini_batch": 4, "n": 4}, "ttt_mlp": {"mini_batch": 8, "n": 8, "passes": "parallel"}}


class Stories:
    """Videos of `segments` segments whose texts have different lengths."""

    def __init__(self, segments: int):
        self.segments = segments

    def open(self, seed, device):
        def source(samples, own):
            draw = keys(seed, "stories", list(samples), device=device)
            text = draw.fold("text").normal(self.segments, 3, 8)
            words = 1 + draw.fold("words").integers(3, self.segments)
            valid = torch.arange(3) < words[..., None]
            return Batch(draw.fold("video").normal(2 * self.segments + 1, 4, 4, 4), own, {"text": text, "valid": valid})

        return source


def train(rank, folder, kind, segments, plan=None, steps=1):
    """Losses and state after training a network with mixers of a kind."""
    base = CogVideoX(SIZE)
    folder = Path(folder) / f"rank{rank}"
    if not (folder / "base").exists():
        base.export(randomised(base.load(base.build(), CPU)), folder / "base")
    mixer = KINDS[kind](**SMALL.get(kind, {}))
    spec = CogVideoX(SIZE, str(folder / "base"), edits=(TTT(mixer),))
    role = Role(spec, Optim(lr=1e-2, eps=1e-2), Ema(decay=0.9))
    run = Run(
        Denoising(role, times=Uniform()),
        Stories(segments),
        steps=steps,
        batch_size=2,
        micro_batch=1,
        plan=Plan(**(plan or {})),
    )
    trainer = Trainer.__new__(Trainer)
    trainer._claim = lambda: None  # its data is no value that a file could hold
    Trainer.__init__(trainer, run, folder, CPU)
    losses = []
    for trainer.step in range(steps):
        trainer.take(run.objective.turns()[0])
        read = trainer.meter.read(trainer.world)
        losses.append((read["loss/student"], read["grad_norm/student"]))
    return losses, {name: whole(tensor) for name, tensor in trainer._state().items()}
