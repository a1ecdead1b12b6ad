"""A role at work: its network, laid out and filled, and, where it learns, its optimizer and its moving average.

Optimizer and average see only this rank's parts of the tensors, as plain tensors: what is elementwise does not care
whether it is given parts or wholes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.errors import UserError
from kinema.models import edits
from kinema.models.protocols import Spec
from kinema.models.wan.fast import Rehearsal
from kinema.models.wan.spec import WanCausal
from kinema.models.weights import tensors
from kinema.objectives.objective import Cast, Metrics, Role, Turn
from kinema.run import Plan, Run
from kinema.training import parallel
from kinema.training.ema import Average
from kinema.training.parallel import local
from kinema.training.world import World

Fill = Callable[[Spec, nn.Module, torch.device], nn.Module]


def read_weights(spec: Spec, module: nn.Module, device: torch.device) -> nn.Module:
    return spec.load(module, device)


def loss_of(turn: Turn, cast: Cast, batch: Batch, step: int, plan: Plan) -> tuple[Tensor, Metrics]:
    """Loss and metrics of one micro-batch, in the dtype that the plan computes in."""
    device = batch.video.device.type
    # Without its cache, which would hold a second copy of all weights that were gathered.
    with torch.autocast(device, torch.bfloat16, enabled=plan.compute == "bfloat16", cache_enabled=False):
        return turn.loss(cast, batch, step)


def backward(turn: Turn, cast: Cast, batch: Batch, step: int, passes: int, plan: Plan) -> tuple[Tensor, Metrics]:
    """Adds the gradient of one of `passes` micro-batches to the parameters; returns loss and metrics, without graph."""
    loss, metrics = loss_of(turn, cast, batch, step, plan)
    (loss / passes).backward()
    return loss.detach(), {name: value.detach() for name, value in metrics.items()}


def micro_batch(run: Run, source: Source, world: World, step: int, micro: int) -> Batch:
    """Micro-batch number `micro` of a step on this data-parallel rank: which samples, and the keys of all randomness
    about them. All ranks' micro-batches together are the same samples whatever their number."""
    _, samples = run.passes(world.copies)
    first = (micro * world.copies + world.copy) * samples
    places = range(first, first + samples)
    numbers = [step * run.batch_size + place for place in places]
    keys = seeds.keys(run.seed, "train", numbers, list(places), run.batch_size, world.device)
    return replace(source(numbers, keys), micro=micro)


class Actor:
    """`reading` is how the role's spec reads `module`; `average` is None where there is none.

    `fill` gives the laid-out module its weights: its own, unless nothing is to be read.
    """

    def __init__(self, name: str, role: Role, plan: Plan, world: World, fill: Fill = read_weights):
        self.name, self.role, self.world = name, role, world
        parallel.check(name, role.spec, plan)
        module = _built(role)
        self._frozen = edits.frozen(module)
        for key, parameter in module.named_parameters():
            learns = key not in self._frozen and role.optim is not None and role.optim.trains(key)
            parameter.requires_grad_(learns)
        if role.optim is None:
            module.eval()
        elif not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"no parameter's name matches optim.train = {role.optim.train!r}; nothing would learn")
        parallel.lay_out(module, role.spec, plan, world, role.shards, role.optim is not None)
        self.module = fill(role.spec, module, world.device)
        self.reading: Any = role.spec.read(self.module)
        self.rehearsal = _rehearsal(role, self.module, plan, world)
        if self.rehearsal is not None:
            self.reading = replace(self.reading, backbone=self.rehearsal)
        self.average = Average(role, self.module, plan, world) if role.ema else None
        self.learning = {key: p for key, p in self.module.named_parameters() if p.requires_grad}
        self.updates = torch.zeros((), device=world.device)  # that were not thrown away
        self.optimizer = self._optimizer() if role.optim is not None else None
        self.move: Callable[[], Any] | None = self.optimizer and self.optimizer.step  # another engine may count them

    def moves(self, yes: bool) -> None:
        """Whether losses give this role gradients. What is in shards always takes them, and drops them here: FSDP
        remembers of a gathered tensor whether it required gradients when it was first gathered."""
        for p in self.learning.values():
            if isinstance(p, DTensor):
                p.grad = None
            else:
                p.requires_grad_(yes)

    def forget(self) -> None:
        """The optimizer starts anew."""
        assert self.optimizer is not None
        for moments in self.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()
        self.updates.zero_()

    def update(
        self, step: int, number: int, betas: tuple[float, float] | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Clips the gradients, steps, averages. Returns the gradients' norm and whether all was thrown away as not
        finite, each `[]` on the device. `number` counts this role's updates, which began at step `first`; `betas`
        replace the optimizer's."""
        optim, optimizer, move = self.role.optim, self.optimizer, self.move
        assert optim is not None and optimizer is not None and move is not None, (
            f"{self.name} has a turn but no optimizer"
        )
        moved = [(p, part) for p, part in zip(self.learning.values(), self._parts, strict=True) if p.grad is not None]
        parallel.settle(p for p, _ in moved)
        norm = parallel.gradient_norm((p for p, _ in moved), self.world)
        skip = (~norm.isfinite()).float()
        _clip(moved, (optim.clip / (norm + 1e-6)).clamp(max=1.0) if optim.clip else torch.ones_like(norm))
        for group in optimizer.param_groups:
            scale = optim.scale_at(step, first, group["anneals"])
            group["lr"], group["betas"] = group["base_lr"] * scale, betas or optim.betas
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # fused AdamW leaves everything as it is where this is 1
        move()
        for p, part in moved:
            p.grad = part.grad = None
        parallel.give_back(self.module)
        self.updates += 1 - skip
        if self.rehearsal is not None:
            self.rehearsal.refresh()
        if self.average:
            self.average.update(number, skip)
        return norm, skip

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, under names that start with the role's; each tensor in place, whole or in shards.

        Of a network with adapters, only these: the rest is where its spec reads it.
        """
        if self.optimizer is None:
            return {}
        state = {f"{self.name}.model.{key}": tensor.detach() for key, tensor in self._kept(self.module).items()}
        state[f"{self.name}.optim.step"] = self.updates
        for (key, p), part in zip(self.learning.items(), self._parts, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{self.name}.optim.{key}.{moment}"] = parallel.part_of(p, self.optimizer.state[part][moment])
        if self.average:
            state |= {f"{self.name}.ema.{key}": tensor for key, tensor in self._kept(self.average.module).items()}
        return state

    def _kept(self, module: nn.Module) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors(module).items() if key not in self._frozen}

    def restored(self) -> None:
        """To be called when the tensors of `state` were overwritten."""
        if self.optimizer is not None:
            for moments in self.optimizer.state.values():
                moments["step"].copy_(self.updates)
        if self.rehearsal is not None:
            self.rehearsal.refresh()

    def _optimizer(self) -> torch.optim.AdamW:
        optim = self.role.optim
        assert optim is not None
        self._parts = [local(p) for p in self.learning.values()]
        named = [(key, part) for key, part in zip(self.learning, self._parts, strict=True)]
        optimizer = torch.optim.AdamW(optim.split(named), betas=optim.betas, eps=optim.eps, fused=True)
        for part in self._parts:  # the moments exist before the first step, so that a checkpoint can be read into them
            moments = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
            optimizer.state[part] = {"step": torch.zeros((), dtype=torch.float32, device=part.device), **moments}
        return optimizer


def _built(role: Role) -> nn.Module:
    """The module on the meta device, in the dtype its weights are held in."""
    usual = torch.get_default_dtype()
    if role.weights != "float32":
        torch.set_default_dtype(getattr(torch, role.weights))
    try:
        return role.spec.build()
    finally:
        torch.set_default_dtype(usual)


def _rehearsal(role: Role, module: Any, plan: Plan, world: World) -> Rehearsal | None:
    """A fast copy for the passes without gradients of a causal student, where one process holds it all."""
    spec = role.spec
    if not isinstance(spec, WanCausal) or spec.edits or role.optim is None:
        return None
    alone = world.size == 1 and world.device.type == "cuda" and not plan.graph  # a graph records no other graphs
    if not (alone and plan.fuse and plan.compute == "bfloat16"):
        return None
    return Rehearsal(spec, module, torch.bfloat16, compiled=True, graphs=True)


def _clip(moved: Sequence[tuple[Tensor, Tensor]], shrink: Tensor) -> None:
    """Hands each part its own part of the gradient, times `shrink`."""
    gradients = [local(p.grad) for p, _ in moved if p.grad is not None]
    torch._foreach_mul_(gradients, shrink)  # type: ignore[reportPrivateImportUsage]
    for (_, part), gradient in zip(moved, gradients, strict=True):
        part.grad = gradient
