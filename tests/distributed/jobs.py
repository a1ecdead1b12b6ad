"""What the processes of `pool` do: functions of their rank, which pickle by name."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from world import game, token_game

from kinema.objectives.dimo import Dimo
from kinema.objectives.reinforce import Reinforce
from kinema.training.parallel import local
from kinema.training.trainer import Trainer


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().cpu()


def train(rank, folder, steps=6, plan=None, teacher=None, **changes):
    """Losses, gradients and weights of a `game` under `plan`: one row per update, then the state."""
    return play(game(**({"teacher": teacher} if teacher else {}), steps=steps, **changes), folder, plan)


def distil(rank, folder, kind, steps=6, plan=None):
    """The same of a `token_game`."""
    return play(
        token_game({"dimo": Dimo, "reinforce": partial(Reinforce, baseline="ema")}[kind], steps=steps), folder, plan
    )


def play(run, folder, plan):
    steps = run.steps
    trainer = Trainer(replace(run, plan=replace(run.plan, **(plan or {}))), Path(folder), device())
    rows = []
    while trainer.step < steps:
        for turn in trainer.run.objective.turns():
            if turn.due(trainer.step):
                actor = trainer.actors[turn.role]
                gradients = {}
                update = actor.update

                def noting(*args, actor=actor, gradients=gradients, update=update):
                    gradients |= {name: whole(p.grad) for name, p in actor.learning.items() if p.grad is not None}
                    return update(*args)

                actor.update = noting
                trainer.take(turn)
                del actor.update
                rows.append((turn.role, trainer.meter.read(trainer.world), gradients))
        trainer.step += 1
    return rows, {name: whole(tensor) for name, tensor in trainer._state().items()}


def resume(rank, folder, steps, plan=None):
    """Trains a game in `folder` up to `steps`, as `kinema train` does, and returns the state and what was drawn."""
    run = game(save_every=2, batch_size=4, steps=100)
    trainer = Trainer(replace(run, plan=replace(run.plan, **(plan or {})), steps=steps), Path(folder), device())
    seen = []
    source = trainer.source

    def noting(samples, keys):
        seen.extend(zip(samples, keys.fold("start").normal(2).tolist(), strict=True))
        return source(samples, keys)

    trainer.source = noting
    trainer.train()
    return {name: whole(tensor) for name, tensor in trainer._state().items()}, seen, trainer.world.copy


def parts(rank, folder, plan=None):
    """This rank's own parts of the average, as a freshly opened trainer reads them."""
    run = game(save_every=2, batch_size=4, steps=4)
    trainer = Trainer(replace(run, plan=replace(run.plan, **(plan or {}))), Path(folder), device())
    return {name: local(tensor).clone() for name, tensor in trainer._state().items() if ".ema." in name}


def trained_parts(rank, folder, plan=None):
    """The same parts as the trainer had them that wrote the checkpoint."""
    run = game(save_every=2, batch_size=4, steps=4)
    trainer = Trainer(replace(run, plan=replace(run.plan, **(plan or {}))), Path(folder), device())
    trainer.train()
    return {name: local(tensor).clone() for name, tensor in trainer._state().items() if ".ema." in name}
