"""The training loop. It calls what happens, in order: turns, metrics, previews, checkpoints; there are no callbacks.

All that a run needs to go on is the step, the learning roles' weights, their optimizers' moments and their averages:
data, noise, learning rates and the averages' decay are functions of the step. So a resumed run equals a straight one,
on any number of ranks.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kinema import config
from kinema.data.batch import Batch
from kinema.errors import UserError
from kinema.models import lora
from kinema.models.weights import tensors
from kinema.objectives.objective import Cast, Metrics, Turn
from kinema.run import Plan, Run
from kinema.training import checkpoint, graphs, parallel, preview
from kinema.training.actor import Actor, backward, micro_batch
from kinema.training.guard import Guard, update_size
from kinema.training.metrics import Log, Meter, Silence
from kinema.training.validation import Validator
from kinema.training.world import World

Backward = Callable[[Turn, Cast, Batch, int, int, Plan], tuple[Tensor, Metrics]]
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # the last is what Slurm is asked to send before it ends a job


class Trainer:
    """Trains `run` in `folder`, from its newest complete checkpoint if there is one.

    In a job of several processes (see `world.join`) each of them makes one, with the same arguments.
    """

    def __init__(self, run: Run, folder: Path, device: torch.device):
        self.run, self.folder, self.device = run, folder, device
        self.world = World.of(run.plan, device)
        self.passes, self.samples = run.passes(self.world.copies)
        preview.check(run)
        self.world.first(self._claim)
        self.actors = {name: Actor(name, role, run.plan, self.world) for name, role in run.objective.roles().items()}
        stamps = {n: lora.stamp(actor.module) for n, actor in self.actors.items() if actor.optimizer is not None}
        self.bases = {f"{name}.base": stamp for name, stamp in stamps.items() if stamp is not None}
        self.memory = {name: tensor.to(device) for name, tensor in run.objective.memory().items()}
        self.cast = {name: actor.reading for name, actor in self.actors.items()} | {"memory": self.memory}
        self.source = run.data.open(run.seed, device)
        self.checkpoints = checkpoint.Writer(folder / "checkpoints", run.keep, self.world)
        self.step = 0
        self.meter = Meter()
        if run.plan.graph:
            graphs.check(device, self.world.size)
        self.graphs = graphs.Graphs(backward) if run.plan.graph else None
        self.skipped = torch.zeros((), device=device)  # updates thrown away so far
        self.streak = torch.zeros((), device=device)  # of these, the most recent in a row
        self.validator = Validator(run, device) if run.validation else None
        self.origin: Path | None = None  # the checkpoint of another run that this one starts from
        self._signal = 0  # the number of the one that asked this rank to stop
        self._resume()
        self.guard = Guard(folder / "metrics.jsonl", self.step)

    def train(self) -> signal.Signals | None:
        """Takes the remaining steps.

        SIGTERM, SIGUSR2 and Ctrl-C, on any rank, end it on all of them after the current step, with a checkpoint.
        Returns which it was, and None when all steps are done.
        """
        run = self.run
        with self._signals(), self._log() as log, self.world.together():
            if self.step >= run.steps:
                log.say(f"all {run.steps} steps are done in {self.folder}; to train further, {self._further()}")
            elif self.step:
                log.say(f"going on from step {self.step} in {self.folder}")
            elif self.origin is not None:
                log.say(f"starting from {self.origin}")
            stop = 0
            while self.step < run.steps and not stop:
                self.advance()
                stop = self.world.most(self._signal)
                last = self.step == run.steps or stop > 0
                log.step(self.step)
                if self.validator is not None and (last or self.step % self.validator.every == 0):
                    self._validate()
                if last or self.step % run.log_every == 0:
                    self._report(log)
                if run.preview.every and (last or self.step % run.preview.every == 0):
                    self._preview(log)
                if last or self.step % run.save_every == 0:
                    self.save()
            self.checkpoints.wait()
            if self.step < run.steps:
                log.say(f"stopped at step {self.step} of {run.steps}; the same command goes on from here")
                return signal.Signals(stop)
        return None

    def finish(self) -> None:
        """Takes the remaining steps, for what needs all of them: KeyboardInterrupt if they are stopped before."""
        if self.train() is not None:
            raise KeyboardInterrupt

    def advance(self, backward: Backward = backward, batches: Sequence[Batch] | None = None) -> None:
        """One step: all turns that are due. `backward` takes the gradients, as `actor.backward` does; `batches` are the
        step's micro-batches, if they have been read already."""
        for turn in self.run.objective.turns():
            if turn.due(self.step):
                self.take(turn, backward, batches)
        self.step += 1

    def take(self, turn: Turn, backward: Backward = backward, batches: Sequence[Batch] | None = None) -> None:
        """One role learns once: accumulate its loss over the micro-batches, clip, step, average."""
        actor = self.actors[turn.role]
        if turn.fresh and self.step == turn.first:
            actor.forget()
        for other in self.actors.values():
            other.moves(other is actor)
        for micro in range(self.passes):
            batch = batches[micro] if batches else self.batch(self.step, micro)
            if batch.told:
                told = {f"data/{name}": torch.full((), value, device=self.device) for name, value in batch.told.items()}
                self.meter.add(told)
            given = (turn, self.cast, batch, self.step, self.passes, self.run.plan)
            learning = list(actor.learning.values())
            loss, metrics = self.graphs(*given, learning) if self.graphs else backward(*given)
            self.meter.add({f"loss/{turn.role}": loss, **{f"{turn.role}/{k}": v for k, v in metrics.items()}})
        for tensor in self.memory.values():
            tensor.copy_(self.world.sum(tensor) / self.world.size)
        norm, skip = actor.update(self.step, turn.number(self.step), turn.betas, turn.first)
        self.skipped += skip
        self.streak = (self.streak + 1) * skip
        self.meter.add({f"grad_norm/{turn.role}": torch.where(skip.bool(), torch.nan, norm)})

    def _validate(self) -> None:
        assert self.validator is not None
        actor = self.actors["student"]
        module = actor.average.module if actor.average else actor.module
        self.meter.add(self.validator.errors(actor.role.spec.read(module), self.world, self.samples))
        parallel.give_back(module)

    def save(self) -> None:
        """Begins to write a checkpoint of the current step."""
        self.checkpoints.save(self.step, self._state(), healthy=not self.guard.alarms)

    def batch(self, step: int, micro: int) -> Batch:
        return micro_batch(self.run, self.source, self.world, step, micro)

    def _further(self) -> str:
        """How a finished run is trained further. Where a learning rate was annealed, more steps would have what is left
        of it, and for some that is nothing. Where a role is another's weights, a new run from this one would take it
        from this one as well, and a student's teacher would be itself."""
        annealed = [a.role.optim.anneal for a in self.actors.values() if a.role.optim is not None]
        if not any(0 < anneal <= self.step + 1 for anneal in annealed):
            return f"raise --run.steps above {self.run.steps}"
        ended = "the schedule of its learning rate has ended"
        if taken := [f"its {role} from this one's {origin}" for role, origin in self.run.init_roles.items()]:
            start = "start anew, with a longer schedule and another --out"
            return f"{start}: {ended}, and a run from it would take {' and '.join(taken)}"
        return f"start a new run from it, with --run.init_from {self.folder} and another --out: {ended}"

    def _claim(self) -> None:
        """Makes the folder this run's own, or checks that it is. Until its first checkpoint it is nobody's."""
        path = self.folder / "run.yaml"
        taken = path.exists() and checkpoint.latest(self.folder / "checkpoints") is not None
        if taken and (different := config.differences(config.load(path), self.run)):
            raise UserError(
                f"{self.folder} belongs to another run ({different[0]}); choose another folder with --out, or delete it"
            )
        if self.run.init_from and not taken:  # what cannot begin leaves nothing behind
            origin_of(Path(self.run.init_from), self.run.init_finished)
        self.folder.mkdir(parents=True, exist_ok=True)
        config.save(self.run, path)

    def _state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step), "skipped": self.skipped}
        state |= {f"memory.{name}": tensor for name, tensor in self.memory.items()}
        state |= {name: stamp.clone() for name, stamp in self.bases.items()}
        for actor in self.actors.values():
            state |= actor.state()
        return state

    def _resume(self) -> None:
        state = self._state()
        if path := self.world.first(lambda: checkpoint.latest(self.checkpoints.folder)):
            checkpoint.load(path, state)
            self.step = int(state["step"])
            for name, stamp in self.bases.items():
                check_base(path, state[name], stamp)
        elif self.run.init_from:
            self.origin = self._initialise(state)
        if self.run.init_from and (frozen := self._frozen()):  # no checkpoint of this run has these
            self._initialise(frozen)
        for actor in self.actors.values():
            actor.restored()

    def _initialise(self, state: dict[str, Tensor]) -> Path:
        run = self.run
        assert run.init_from is not None
        return initialise(state, Path(run.init_from), run.init_roles, run.init_average, run.init_finished)

    def _frozen(self) -> dict[str, Tensor]:
        """The tensors of frozen roles that start from another run."""
        frozen = {n: a for n, a in self.actors.items() if a.optimizer is None and n in self.run.init_roles}
        return {
            f"{n}.model.{key}": tensor.detach() for n, a in frozen.items() for key, tensor in tensors(a.module).items()
        }

    def _log(self) -> Log | Silence:
        return Log(self.folder, self.step, self.run.steps) if self.world.rank == 0 else Silence()

    def measured(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the steps since the last call were like, with the current learning rates; and what `check` asks about.
        Waits for the device, once."""
        rates = {
            f"lr/{turn.role}": optim.lr_at(self.step - 1, turn.first)
            for turn in self.run.objective.turns()
            if turn.first < self.step and (optim := self.actors[turn.role].role.optim) is not None
        }
        self.meter.add({"skipped": self.skipped, "streak": self.streak, **self.memory})
        for name, actor in self.actors.items():
            if actor.optimizer is not None:
                self.meter.add({f"update/{name}": update_size(actor.optimizer)})
        row = self.meter.read(self.world)
        kept = {name: row.pop(name, math.nan) for name in ("streak", *self.memory)}
        return {**row, **rates}, kept

    def _report(self, log: Log | Silence) -> None:
        row, kept = self.measured()
        for alarm in self.guard.watch(row):
            log.say(f"[bold red]alarm[/] at step {self.step}: {alarm}")
        log.write(self.step, {**row, "alarms": float(len(self.guard.alarms))})
        self.guard.check(self.step, self.run.seed)
        self.check(kept)

    def check(self, kept: dict[str, float]) -> None:
        """Raises UserError if the last `run.max_skips` updates were all thrown away, or the objective wants no more."""
        self.run.objective.watch(kept, self.step, self.run.seed)
        if kept["streak"] >= self.run.max_skips:
            self.checkpoints.wait()
            raise UserError(
                f"the last {round(kept['streak'])} updates had a gradient that was not finite and were thrown away; "
                "lower the learning rate or clip harder and run again: the last checkpoint is of step "
                f"{self._last_saved()}"
            )

    def _last_saved(self) -> int:
        path = checkpoint.latest(self.checkpoints.folder)
        return checkpoint.step_of(path) if path else 0

    def _preview(self, log: Log | Silence) -> None:
        """All ranks make the videos, as all are needed for a network in shards; one writes them."""
        for name, actor in self.actors.items():
            if actor.optimizer is not None and self.run.pipeline is not None:
                module = actor.average.module if actor.average else actor.module
                path = self.folder / "previews" / f"step-{self.step:08d}-{name}"
                preview.write_preview(path, self.run, actor.role.spec, actor.role.spec.read(module), self.world)
                log.say(f"preview {path}.mp4")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number, _):
            self._signal = number

        before = {number: signal.signal(number, stop) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_base(path: Path, there: Tensor, here: Tensor) -> None:
    """UserError if adapters in a checkpoint belong to other weights than those they are now put on (`lora.stamp`)."""
    if not torch.equal(there.cpu(), here.cpu()):
        raise UserError(
            f"the adapters of {path} were trained on other weights than these; give the model that they belong to, or "
            "train them anew with another --out"
        )


def origin_of(source: Path, finished: bool = False) -> Path:
    """The newest checkpoint of a run's folder, or the checkpoint that the folder is.

    Raises UserError if there is none or, with `finished`, if the run it is of has steps left.
    """
    path = source if (source / checkpoint.MARKER).exists() else checkpoint.latest(source / "checkpoints")
    if path is None:
        if not source.exists():
            raise UserError(
                f"run.init_from: there is no folder {source} to start from; train that run first, or name another, by "
                "the recipe's own option for it (--start, --teacher, --previous) or by --run.init_from"
            )
        why = "has no complete checkpoint" if (source / "run.yaml").exists() else "is no folder of a run (no run.yaml)"
        raise UserError(f"run.init_from: {source} {why}; train that run first, or name another")
    if finished and path.parent.parent == source and checkpoint.step_of(path) < (steps := _steps_of(source)):
        raise UserError(
            f"{source} is at step {checkpoint.step_of(path)} of {steps}; finish that run first, or set run.init_from "
            f"to {path} to start from there"
        )
    return path


def initialise(
    state: dict[str, Tensor], source: Path, roles: dict[str, str], average: bool = True, finished: bool = False
) -> Path:
    """Copies from another run's newest checkpoint (or the checkpoint itself) what `state` has under the same names;
    returns that checkpoint.

    Where that run averaged a role and `average` asks for it, its average is taken for both the weights and the average.
    `roles` says which role of the other run a role starts from, where it is not its namesake. Raises UserError as
    `origin_of` does, and if the two runs have nothing in common.
    """
    path = origin_of(source, finished)
    there = checkpoint.names(path)
    if unknown := sorted(set(roles.values()) - {name.partition(".")[0] for name in there}):
        raise UserError(f"run.init_roles: {path} has no role {unknown[0]}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        role, _, rest = name.partition(".")
        kind, _, key = rest.partition(".")
        if kind in ("model", "ema"):
            origin = roles.get(role, role)
            candidates = [f"{origin}.ema.{key}"] * average + [f"{origin}.model.{key}"]
            if origin := next((c for c in candidates if c in there), None):
                found.setdefault(f"{role}.{kind}", {})[origin] = tensor
    for name, stamp in state.items():
        role, _, kind = name.partition(".")
        if kind == "base" and (origin := f"{roles.get(role, role)}.base") in there:
            checkpoint.load(path, {origin: (found_stamp := stamp.clone())})
            check_base(path, found_stamp, stamp)
    for part in found.values():  # apart, as weights and average may come from the same tensors
        checkpoint.load(path, part)
    if not found:
        raise UserError(f"run.init_from: {path} has no weights of the roles of this run")
    return path


def _steps_of(folder: Path) -> int:
    return config.load(folder / "run.yaml").steps
