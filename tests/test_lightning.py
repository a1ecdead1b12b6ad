"""Runs under Lightning's Trainer: every loss is the native engine's, checkpoints go on exactly, other engines' options
that would change what is learned are refused."""

import json
import logging
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from world import Waves, game, run

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.plugins.environments import SLURMEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from kinema import lightning, pretrained  # noqa: E402
from kinema.errors import UsageError, UserError  # noqa: E402
from kinema.models.lora import LoRA, adapted  # noqa: E402
from kinema.models.wan.spec import Wan  # noqa: E402
from kinema.objectives.denoising import Denoising  # noqa: E402
from kinema.objectives.objective import Role  # noqa: E402
from kinema.optim import Optim  # noqa: E402
from kinema.training.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")


class Rows(Logger):
    """Keeps what Lightning logs."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_hyperparams(self, *_): ...

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


def fit(made, folder, **options):
    rows = Rows()
    settings = {"accelerator": "cpu", "logger": rows, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        module = lightning.fit(made, folder, **{**settings, **options})
    return module, rows.rows


def adapters():
    spec = Wan(size=run().objective.student.spec.size, seed=1, edits=(LoRA(rank=2, alpha=1.0),))
    return run(objective=Denoising(Role(spec, Optim(lr=1e-2))), log_every=1)


@pytest.mark.parametrize("make", [run, game, adapters])
def test_losses_and_weights_equal_the_native_engines(tmp_path, make):
    made = make() if make is adapters else make(log_every=1)
    native = Trainer(made, tmp_path / "native", CPU)
    native.train()
    module, rows = fit(made, tmp_path / "lightning")
    lines = (tmp_path / "native" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) == made.steps
    for line in map(json.loads, lines):
        seen = rows[line["step"]]
        for name in line.keys() & {
            "loss/student",
            "loss/critic",
            "grad_norm/student",
            "lr/student",
            "student/error_q4",
        }:
            assert seen[name] == torch.tensor(line[name])
    state = native._state()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    updates = sum(turn.due(step) for step in range(made.steps) for turn in made.objective.turns())
    assert module.trainer.global_step == updates  # Lightning's word for it
    assert set(module.networks) == {name for name, role in made.objective.roles().items() if role.optim}
    if make is adapters:
        learned = {name for name, p in module.named_parameters() if p.requires_grad}
        assert len(learned) == 2 * len(adapted(module.networks["student"])) == 32


def test_a_stopped_fit_goes_on_and_equals_a_straight_one(tmp_path):
    made = run(steps=6, save_every=2)
    straight, _ = fit(made, tmp_path / "straight")
    fit(made, tmp_path / "stopped", limit_train_batches=4)
    (last,) = (tmp_path / "stopped" / "lightning").iterdir()
    assert int(torch.load(last, weights_only=True)["state_dict"]["step"]) == 4
    again, rows = fit(made, tmp_path / "stopped")
    assert again.engine.step == 6 and len(rows) == 1
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in straight.state_dict().items())
    network = pretrained.trained(tmp_path / "stopped", CPU)[1]  # as kinema's own commands read it
    assert torch.equal(
        network.patch_embedding.weight, straight.engine.actors["student"].average.module.patch_embedding.weight
    )


def test_validation_sees_the_same_noise_every_time_and_moves_nothing(tmp_path):
    made = run(steps=4, log_every=1)
    plain, _ = fit(made, tmp_path / "plain")
    watched, rows = fit(made, tmp_path / "watched", validation=Waves(), val_check_interval=1)
    seen = [row["validation/student"] for row in rows.values() if "validation/student" in row]
    assert len(seen) == 4 and len(set(seen)) == 4
    assert all(torch.equal(t, watched.state_dict()[name]) for name, t in plain.state_dict().items())
    _, rows = fit(run(steps=4, log_every=1), tmp_path / "again", validation=Waves(), val_check_interval=1)
    assert [row["validation/student"] for row in rows.values() if "validation/student" in row] == seen


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "bf16-mixed"}, "run.plan.compute"),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "the ema of a role"),
        ({"plugins": [SLURMEnvironment(auto_requeue=True)]}, "kinema launch"),
        ({"strategy": DDPStrategy(), "devices": 1}, "torchrun -m kinema train"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
    ],
)
def test_what_would_change_the_training_is_refused(tmp_path, options, says, monkeypatch):
    monkeypatch.setattr(DDPStrategy, "setup_environment", lambda self: None)  # this process must stay alone
    with pytest.raises((UsageError, pl.utilities.exceptions.MisconfigurationException), match=says):
        fit(run(), tmp_path, **options)


def test_recorded_turns_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"run\.plan\.graph"):
        fit(run(plan=replace(run().plan, graph=True)), tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(run(steps=3), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")  # kinema's own, which would say so first
    with pytest.raises(UserError, match="of another run"):
        fit(adapters(), tmp_path)
