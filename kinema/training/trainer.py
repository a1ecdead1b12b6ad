"""The training loop. It calls what happens, in order: turns, metrics, previews, checkpoints; there are no callbacks.

All that a run needs to go on is the step, the learning roles' weights, their optimizers' moments and their averages:
data, noise, learning rates and the averages' decay are functions of the step. So a resumed run equals a straight one.
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from kinema import config, seeds
from kinema.errors import UserError
from kinema.objectives.objective import Role, Turn
from kinema.run import Plan, Run
from kinema.training import checkpoint
from kinema.training.ema import Average
from kinema.training.metrics import Log, Meter
from kinema.training.preview import write_preview


@dataclass
class Actor:
    """A role at work: its network, how it is read, and, where it learns, the optimizer and the moving average."""

    role: Role
    module: nn.Module
    reading: Any
    optimizer: torch.optim.AdamW | None
    average: Average | None

    def state(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint keeps, under names that start with the role's."""
        if self.optimizer is None:
            return {}
        state = {f"{name}.model.{key}": tensor for key, tensor in tensors(self.module).items()}
        for key, parameter in self.module.named_parameters():
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}.optim.{key}.{moment}"] = tensor
        if self.average:
            state |= {f"{name}.ema.{key}": tensor for key, tensor in tensors(self.average.module).items()}
        return state


class Trainer:
    """Trains `run` in `folder`, from its newest complete checkpoint if there is one."""

    def __init__(self, run: Run, folder: Path, device: torch.device, log: Log | None = None):
        self.run, self.folder, self.device = run, folder, device
        self.checkpoints = folder / "checkpoints"
        self._claim()
        self.actors = {name: self._cast(role) for name, role in run.objective.roles().items()}
        self.cast = {name: actor.reading for name, actor in self.actors.items()}
        self.source = run.data.open(run.seed, device)
        self.step = 0
        self.meter = Meter()
        self.skipped = torch.zeros((), device=device)  # updates thrown away so far
        self.streak = torch.zeros((), device=device)  # of these, the most recent in a row
        self._stop = False
        self._resume()

    def train(self) -> None:
        """Takes the remaining steps. SIGTERM and Ctrl-C end it after the current step with a checkpoint."""
        run = self.run
        with self._signals(), Log(self.folder, self.step, run.steps) as log:
            if self.step:
                log.say(f"going on from step {self.step} in {self.folder}")
            while self.step < run.steps and not self._stop:
                for turn in run.objective.turns():
                    if turn.due(self.step):
                        self.take(turn)
                self.step += 1
                last = self.step == run.steps or self._stop
                log.step(self.step)
                if last or self.step % run.log_every == 0:
                    self._report(log)
                if run.preview.every and (last or self.step % run.preview.every == 0):
                    self._preview(log)
                if last or self.step % run.save_every == 0:
                    self.save()
            if self._stop:
                log.say(f"stopped at step {self.step} of {run.steps}; the same command goes on from here")

    def take(self, turn: Turn) -> None:
        """One role learns once: accumulate its loss over the micro-batches, clip, step, average."""
        run, actor = self.run, self.actors[turn.role]
        optim, optimizer = actor.role.optim, actor.optimizer
        assert optim is not None and optimizer is not None, f"{turn.role} has a turn but no optimizer"
        passes = run.batch_size // run.passes_of
        for micro in range(passes):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=run.plan.compute == "bfloat16"):
                loss, metrics = turn.loss(self.cast, self._batch(micro), self.step)
            (loss / passes).backward()
            self.meter.add({f"loss/{turn.role}": loss, **{f"{turn.role}/{k}": v for k, v in metrics.items()}})

        learning = [p for p in actor.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(learning, optim.clip or float("inf"))
        skip = (~norm.isfinite()).float()
        scale = optim.scale_at(self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # fused AdamW leaves everything as it is where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if actor.average:
            actor.average.update(self.step // turn.every, skip)
        self.skipped += skip
        self.streak = (self.streak + 1) * skip
        self.meter.add({f"grad_norm/{turn.role}": torch.where(skip.bool(), torch.nan, norm)})

    def save(self) -> None:
        checkpoint.save(self.checkpoints, self.step, self._state(), self.run.keep)

    def _batch(self, micro: int):
        """Micro-batch number `micro` of this step: which samples, and the keys of all randomness about them."""
        run = self.run
        places = range(micro * run.passes_of, (micro + 1) * run.passes_of)
        samples = [self.step * run.batch_size + place for place in places]
        return self.source(samples, seeds.keys(run.seed, "train", samples, list(places), run.batch_size, self.device))

    def _claim(self) -> None:
        """Makes the folder this run's own, or checks that it is. Until its first checkpoint it is nobody's."""
        path = self.folder / "run.yaml"
        taken = path.exists() and checkpoint.latest(self.checkpoints) is not None
        if taken and (different := config.differences(config.load(path), self.run)):
            raise UserError(
                f"{self.folder} belongs to another run ({different[0]}); choose another folder with --out, or delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        config.save(self.run, path)

    def _cast(self, role: Role) -> Actor:
        plan, optim = self.run.plan, role.optim
        module = role.spec.load(role.spec.build(), self.device)
        if optim is None:
            module.eval().requires_grad_(False)
            return Actor(role, module, role.spec.read(module), None, None)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(optim.trains(name))
        learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not learning:
            raise UserError(f"no parameter's name matches optim.train = {optim.train!r}; nothing would learn")
        average = Average(role.spec, role.ema, module) if role.ema else None
        _arrange(module, plan)
        optimizer = torch.optim.AdamW(optim.split(learning), betas=optim.betas, eps=optim.eps, fused=True)
        for _, p in learning:  # the moments exist before the first step, so that a checkpoint can be read into them
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        return Actor(role, module, role.spec.read(module), optimizer, average)

    def _state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step), "skipped": self.skipped}
        for name, actor in self.actors.items():
            state |= actor.state(name)
        return state

    def _resume(self) -> None:
        state = self._state()
        if path := checkpoint.latest(self.checkpoints):
            checkpoint.load(path, state)
            self.step = int(state["step"])
        elif self.run.init_from:
            initialise(state, Path(self.run.init_from))

    def _report(self, log: Log) -> None:
        rates = {
            f"lr/{name}": actor.role.optim.lr_at(self.step - 1)
            for name, actor in self.actors.items()
            if actor.role.optim is not None
        }
        skipped, streak = torch.stack([self.skipped, self.streak]).tolist()
        log.write(self.step, {**self.meter.read(), **rates, "skipped": skipped})
        if streak >= self.run.max_skips:
            raise UserError(
                f"the last {int(streak)} updates had a gradient that was not finite and were thrown away; lower the "
                f"learning "
                f"rate or clip harder and run again: the last checkpoint is of step {self._last_saved()}"
            )

    def _last_saved(self) -> int:
        path = checkpoint.latest(self.checkpoints)
        return checkpoint.step_of(path) if path else 0

    def _preview(self, log: Log) -> None:
        for name, actor in self.actors.items():
            if actor.optimizer is not None and self.run.pipeline is not None:
                module = actor.average.module if actor.average else actor.module
                path = self.folder / "previews" / f"step-{self.step:08d}-{name}"
                write_preview(path, self.run, actor.role.spec, actor.role.spec.read(module), self.device)
                log.say(f"preview {path}.mp4")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_):
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def initialise(state: dict[str, Tensor], source: Path) -> None:
    """Copies from another run's newest checkpoint (or the checkpoint itself) what `state` has under the same names.

    Where that run averaged a role, its average is taken for both the weights and the average.
    """
    path = source if (source / checkpoint.MARKER).exists() else checkpoint.latest(source / "checkpoints")
    if path is None:
        raise UserError(f"run.init_from: {source} has no complete checkpoint")
    there = checkpoint.names(path)
    found = 0
    for name, tensor in state.items():
        role, _, rest = name.partition(".")
        kind, _, key = rest.partition(".")
        if kind in ("model", "ema"):
            candidates = [f"{role}.ema.{key}", f"{role}.model.{key}"]
            if origin := next((c for c in candidates if c in there), None):
                checkpoint.load(path, {origin: tensor})
                found += 1
    if not found:
        raise UserError(f"run.init_from: {path} has no weights of the roles of this run")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with tied weights under one name only, as safetensors wants it."""
    once = {name: p for name, p in module.named_parameters()}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name in once or name not in tied}


def _arrange(module: nn.Module, plan: Plan) -> None:
    """Recompute, then compile, block by block; both leave the parameters' names as they are."""
    for block in (
        dict(module.named_children()).get("blocks", nn.ModuleList()).children()
    ):  # a codec has none: it is small
        if plan.recompute == "block":
            block.forward = _recomputed(block.forward)
        if plan.compile:
            block.compile()


def _recomputed(forward):
    def wrapped(*args, **kwargs):
        return recompute(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
