"""What the processes of `pool` do: functions of their rank, which pickle by name."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from world import SIZE, game, token_game

from kinema import seeds
from kinema.data.noise import Noise
from kinema.diffusion.rollout import rollout
from kinema.models.discriminator import ClassifierBranch, Discriminator
from kinema.models.wan.spec import Wan, WanCausal
from kinema.objectives.dimo import Dimo
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.objective import Role
from kinema.objectives.reinforce import Reinforce
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run
from kinema.training.parallel import lay_out, local
from kinema.training.trainer import Trainer
from kinema.training.world import World


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().cpu()


def train(rank, folder, steps=6, plan=None, teacher=None, **changes):
    """Losses, gradients and weights of a `game` under `plan`: one row per update, then the state."""
    return updates(game(**({"teacher": teacher} if teacher else {}), steps=steps, **changes), folder, steps, plan)


def distil(rank, folder, kind, steps=6, plan=None):
    """The same of a `token_game`."""
    kinds = {"dimo": Dimo, "reinforce": partial(Reinforce, baseline="ema")}
    return updates(token_game(kinds[kind], steps=steps), folder, steps, plan)


def match(rank, folder, kind, weights, processes, plan=None):
    """The same of DMD, SiD or a GAN of networks with these weights; two passes a step, each with its own exit. Of
    several processes, DMD's take the gradients of a rollout at once."""
    learns = Optim(lr=1e-3, eps=1e-2, betas=(0.0, 0.99))  # a large eps, as the sign of a tiny gradient is rounding
    roles = {"student": Role(WanCausal(weights=weights, chunk=2), learns, Ema(0.9))}
    roles |= {"critic": Role(Discriminator(Wan(weights=weights), ClassifierBranch((0, 1), ffn_dim=16)), learns)}
    roles |= {} if kind is GAN else {"teacher": Role(Wan(weights=weights))}
    more = {"g_weight": 1.0, "d_weight": 1.0, "r1": 0.1} if kind is GAN else {"guidance": 3.0}
    more |= {"graded_at_once": 4} if kind is DMD and processes > 1 else {}
    objective = kind(**roles, shape=(4, 4, 4), frames=(4, 4), scored=4, student_every=2, share_rollout=True, **more)
    data = Noise((4, 4, 4, 4), 3, 8)
    return updates(
        Run(objective=objective, data=data, steps=6, batch_size=8, micro_batch=4 // processes), folder, 6, plan
    )


def updates(run, folder, steps, plan):
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


def roll(rank, weights, plan=None, exit_step=1):
    """The video and the gradients of two rollouts of a causal Wan, and how often the text was embedded in each."""
    spec = WanCausal(weights=weights, chunk=2, window=5, sink=1)
    laid = replace(Plan(), **(plan or {}))
    module = spec.load(lay_out(spec.build(), spec, laid, World.of(laid, device())), device())
    denoiser, draw = spec.read(module), seeds.keys(0, "roll", [0, 1], device=device())
    calls = []
    module.text_embedding.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cache, made = module.new_cache(8, graded=8), []
    for turn in range(2):
        chosen = draw.fold(turn)
        denoise = partial(denoiser, cond={"text": chosen.fold("text").normal(3, 8).double()})
        noise = chosen.fold("noise").normal(8, 4, 4, 4)
        video = torch.cat(
            [*rollout(denoise, denoiser.path, noise, spec.steps_at, cache, spec.chunks, chosen, exit_step)], dim=1
        )
        (video * chosen.fold("weight").normal(8, 4, 4, 4)).sum().backward()
        made.append(video.detach().cpu())
    return torch.stack(made), calls, {name: whole(p.grad) for name, p in module.named_parameters()}


def teacher(shards):
    return Role(Wan(size=SIZE, seed=3), weights="bfloat16", shards=shards)
