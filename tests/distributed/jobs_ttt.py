"""Tiny long videos on the ranks of a context group."""

from pathlib import Path

import torch
from jobs import device, whole
from jobs_cogvideox import randomised
from world import COGVIDEOX, Stories

from kinema.diffusion.times import Uniform
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.ttt.edit import TTT
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run
from kinema.training.trainer import Trainer


def train(rank, folder, mixer, segments, plan=None, steps=1):
    """Losses and state after training a network with such mixers."""
    base = CogVideoX(COGVIDEOX)
    folder = Path(folder) / f"rank{rank}"
    if not (folder / "base").exists():
        base.export(randomised(base.load(base.build(), torch.device("cpu"))), folder / "base")
    spec = CogVideoX(COGVIDEOX, str(folder / "base"), edits=(TTT(mixer),))
    role = Role(spec, Optim(lr=1e-2, eps=1e-2), Ema(decay=0.9))
    run = Run(
        Denoising(role, times=Uniform()),
        Stories(segments),
        steps=steps,
        batch_size=2,
        micro_batch=1,
        plan=Plan(**(plan or {})),
    )
    trainer = Trainer(run, folder, device())
    losses = []
    for trainer.step in range(steps):
        trainer.take(run.objective.turns()[0])
        read = trainer.meter.read(trainer.world)
        losses.append((read["loss/student"], read["grad_norm/student"]))
    return losses, {name: whole(tensor) for name, tensor in trainer._state().items()}
