"""Recipes under Lightning's Trainer, for those who live in it: its loggers, callbacks, checkpoints and environments.

One Lightning batch is one step of the run. The step itself is `kinema.training.trainer.Trainer.advance`: turns, noise,
clipping, learning rates and averages are the native engine's, so on one device every loss equals the native one.
Lightning counts, logs, saves and calls back. docs/lightning.md says what it cannot do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from kinema import config, seeds
from kinema.data.batch import Batch, Data
from kinema.errors import UsageError, UserError
from kinema.objectives.objective import Cast, Metrics, Turn
from kinema.run import Plan, Run
from kinema.training.actor import loss_of
from kinema.training.metrics import Silence
from kinema.training.trainer import Trainer, check_base


class Module(pl.LightningModule):
    """A run as a LightningModule. Its networks exist from `setup` on, on the device that Lightning chose.

    Only the learning networks are submodules, so frozen teachers and encoders are neither wrapped nor saved. When the
    fit ends, `folder` holds the run as the native engine leaves it, for kinema's sample, evaluate and export.
    """

    def __init__(self, run: Run, folder: str | Path):
        super().__init__()
        self.automatic_optimization = False
        self.run, self.folder = run, Path(folder)
        self.native: Trainer | None = None

    @property
    def engine(self) -> Trainer:
        assert self.native is not None, "setup comes first"
        return self.native

    def setup(self, stage: str) -> None:
        if self.native is not None:
            return
        _check(self.trainer, self.run)
        self.native = Trainer(self.run, self.folder, self.trainer.strategy.root_device)
        self.learning = {name: actor for name, actor in self.native.actors.items() if actor.optimizer is not None}
        self.networks = nn.ModuleDict({name: actor.module for name, actor in self.learning.items()})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [actor.optimizer for actor in self.learning.values() if actor.optimizer is not None]

    def on_fit_start(self) -> None:
        counted = self.optimizers(use_pl_optimizer=True)
        for actor, optimizer in zip(
            self.learning.values(), counted if isinstance(counted, list) else [counted], strict=True
        ):
            actor.move = optimizer.step  # so that Lightning sees the updates

    def shared_step(self, turn: Turn, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a turn on one micro-batch, in training as in validation."""
        return loss_of(turn, self.engine.cast, batch, step, self.run.plan)

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        self.engine.advance(self._backward, batches)
        step = self.engine.step
        if step % self.run.log_every == 0 or step == self.run.steps:
            row, kept = self.engine.measured()
            self.log_dict({**row, "step": float(step)}, batch_size=1)
            self.engine.check(kept)

    def _backward(
        self, turn: Turn, cast: Cast, batch: Batch, step: int, passes: int, plan: Plan
    ) -> tuple[Tensor, Metrics]:
        loss, metrics = self.shared_step(turn, batch, step)
        self.manual_backward(loss / passes)
        return loss, metrics

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.run.preview.every
        if every and self.engine.step % every == 0:
            self.engine._preview(Silence())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for turn in self.run.objective.turns():
            loss, _ = self.shared_step(turn, batch, self.engine.step)
            self.log(f"validation/{turn.role}", loss, batch_size=len(batch))

    def on_fit_end(self) -> None:
        if self.engine.step:
            self.engine.save()
            self.engine.checkpoints.wait()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the native engine's checkpoints hold: step, learning weights, moments and averages."""
        return {name: tensor.detach() for name, tensor in self.engine._state().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        state = self.engine._state()
        if unlike := sorted(state.keys() ^ state_dict.keys()):
            raise UserError(f"this checkpoint is of another run ({unlike[0]} is in one of them only); give this run's")
        for name, stamp in self.engine.bases.items():
            check_base(self.folder, state_dict[name], stamp)
        for name, tensor in state.items():
            tensor.copy_(state_dict[name])
        self.engine.step = int(state["step"])
        for actor in self.engine.actors.values():
            actor.restored()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []  # they are in the state
        checkpoint["run.yaml"] = config.dump(self.run)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning goes on counting updates, but not batches: which samples come next is a function of the step."""
        loops = checkpoint["loops"]["fit_loop"]
        checkpoint["loops"]["fit_loop"] = {name: value for name, value in loops.items() if "optim" in name}


class DataModule(pl.LightningDataModule):
    """The data of a run, and of `validation` the first `batches` micro-batches, the same ones with the same noise at
    every validation."""

    def __init__(self, run: Run, validation: Data | None = None, batches: int = 4):
        super().__init__()
        self.run, self.validation, self.batches = run, validation, batches

    def train_dataloader(self) -> "Steps":
        return Steps(self._engine())

    def val_dataloader(self) -> "list | Loaded":
        if self.validation is None:
            return []
        run, engine = self.run, self._engine()
        source, count = self.validation.open(run.seed, engine.device), self.batches * engine.samples
        batches = []
        for micro in range(self.batches):
            samples = range(micro * engine.samples, (micro + 1) * engine.samples)
            keys = seeds.keys(run.seed, "validation", samples, samples, count, engine.device)
            batches.append(source(samples, keys))
        return Loaded(batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is made where it is needed

    def _engine(self) -> Trainer:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not isinstance(module, Module):
            raise UsageError(f"this data is for kinema.lightning.Module, not for a {type(module).__name__}")
        return module.engine


class Steps:
    """The micro-batches of each step that is left."""

    def __init__(self, engine: Trainer):
        self.engine, self.count = engine, engine.run.steps - engine.step

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Batch]]:
        engine = self.engine
        for step in range(engine.step, engine.run.steps):
            yield [engine.batch(step, micro) for micro in range(engine.passes)]


class Save(pl.Callback):
    """A Lightning checkpoint at `path` after every `run.save_every` steps and the last."""

    def __init__(self, run: Run, path: Path):
        self.run, self.path = run, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.engine.step
        if step == self.run.steps or step % self.run.save_every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)  # False: with what is needed to go on


class Loaded:
    """Batches as a loader: Lightning takes a plain list for several loaders."""

    def __init__(self, batches: list[Batch]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def fit(run: Run, folder: str | Path, validation: Data | None = None, **options: Any) -> Module:
    """Trains a run in `folder` under a Lightning Trainer made with `options`; goes on from its checkpoint there."""
    folder = Path(folder)
    module, last = Module(run, folder), folder / "lightning" / "last.ckpt"
    settings = {"max_epochs": 1, "default_root_dir": folder, "log_every_n_steps": 1, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "limit_val_batches": None if validation else 0}
    settings |= {**options, "callbacks": [Save(run, last), *options.get("callbacks", [])]}
    trainer = pl.Trainer(**settings)
    start = last if last.exists() else None
    trainer.fit(module, datamodule=DataModule(run, validation), ckpt_path=start, weights_only=True)
    return module


def _check(trainer: pl.Trainer, run: Run) -> None:
    """UsageError for what would change what is trained, with the way that kinema has for it."""
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        what = f"{trainer.world_size} processes and {type(trainer.strategy).__name__}"
        fix = "give devices=1, or use torchrun -m kinema train, which shards any recipe"
        raise UsageError(f"under Lightning kinema trains on one device, not on {what}; {fix}")
    if run.plan.graph:
        raise UsageError("Lightning's backward cannot be recorded; set run.plan.graph to false, or use kinema train")
    if trainer.precision != "32-true":
        raise UsageError(f"leave precision={trainer.precision} away; run.plan.compute says what is computed in")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UsageError(f"leave {type(callback).__name__} away; the ema of a role is its average")
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        raise UsageError(
            "Lightning's requeueing saves in the middle of a step; give plugins=[SLURMEnvironment(auto_requeue=False)] "
            "or use kinema launch"
        )
