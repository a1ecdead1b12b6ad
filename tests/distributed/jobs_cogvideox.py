"""Tiny CogVideoX runs for the processes of `pool`."""

from dataclasses import replace
from pathlib import Path

import torch
from jobs import whole
from world import COGVIDEOX, Waves

from kinema.models import lora
from kinema.models.cogvideox import layouts
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.lora import LoRA
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Plan, Run
from kinema.training.trainer import Trainer

SIZE = replace(COGVIDEOX, heads=2, text_tokens=2, table=True)
EDIT = LoRA(rank=3, alpha=1.5)
CPU = torch.device("cpu")


def randomised(module):
    """With every tensor random: modulations that start at zero would hide what they multiply."""
    for n, (_, p) in enumerate(module.named_parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(n))
    return module


def run(folder: Path, edited: bool, **changes) -> Run:
    plain = CogVideoX(SIZE)
    if not (folder / "base").exists():
        plain.export(randomised(plain.load(plain.build(), CPU)), folder / "base", "diffusers")
    spec = CogVideoX.from_pretrained(str(folder / "base"), edits=(EDIT,) if edited else ())
    role = Role(spec, Optim(lr=1e-2), Ema(decay=0.9))
    return Run(Denoising(role), Waves(), steps=4, batch_size=4, micro_batch=1, seed=3, **changes)


def train(rank, folder, edited, plan=None):
    folder = Path(folder) / (f"rank{rank}")  # its own copy of the base: they start at once
    trainer = Trainer(run(folder, edited, plan=Plan(**(plan or {}))), folder, CPU)
    losses = []
    for trainer.step in range(4):
        trainer.take(trainer.run.objective.turns()[0])
        losses.append(trainer.meter.read(trainer.world)["loss/student"])
    return losses, {name: whole(tensor) for name, tensor in trainer._state().items()}


def write(rank, folder):
    """Adapters of the base in `folder`, every number of them random, as a file beside it."""
    spec = run(Path(folder), True).objective.roles()["student"].spec
    module = spec.load(spec.build(), CPU)
    for n, (_, layer) in enumerate(lora.adapted(module)):
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(n))
    lora.export(module, Path(folder) / "lora", layouts.diffusers_name)
    return {name: p.detach().float().double() for name, p in module.named_parameters() if ".lora_" in name}


def read(rank, folder, plan):
    edit = LoRA.of_file(str(Path(folder) / "lora"))
    job = run(Path(folder), False, plan=Plan(**plan))
    role = job.objective.roles()["student"]
    role = replace(role, spec=replace(role.spec, edits=(edit,)))
    trainer = Trainer(replace(job, objective=Denoising(role)), Path(folder) / f"rank{rank}{len(plan)}", CPU)
    named = trainer.actors["student"].module.named_parameters()
    return {name: whole(p.detach()) for name, p in named if ".lora_" in name}
