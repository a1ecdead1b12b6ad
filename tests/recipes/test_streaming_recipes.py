"""The chain from a bidirectional model to a four-step streaming one, a few steps a stage, and the real recipes."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from cogvideox_world import write_model

from kinema import config, pretrained
from kinema.cli import main
from kinema.data.shards import Shards, prepare
from kinema.diffusion.times import shifted
from kinema.errors import UsageError, UserError
from kinema.evaluation import evaluate as evaluation
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.ode_regression import OdeRegression
from kinema.objectives.sid import SiD
from kinema.recipes import self_forcing, sprites
from kinema.training.trainer import Trainer, initialise

CPU = torch.device("cpu")


def trained(run, folder, steps=2):
    trainer = Trainer(replace(run, steps=steps, log_every=1), folder, CPU)
    before = {key: tensor.clone() for key, tensor in trainer._state().items() if key.startswith("student.model.")}
    trainer.train()
    after = trainer._state()
    assert config.load(folder / "run.yaml") == trainer.run
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(after[key].isfinite().all() for key in before)
    return str(folder)


def test_the_chain_of_sprites_runs_from_one_command_to_the_next(tmp_path):
    first = trained(sprites.diffusion_forcing(batch_size=1, clips=2), tmp_path / "first", 1)
    forced = trained(sprites.teacher_forcing(batch_size=1, clips=2), tmp_path / "forced", 1)
    made = sprites.ode_pairs(clips=2, batch=2, steps=4)
    prepare(made, tmp_path / "pairs", CPU)
    steps_at = sprites.dmd().objective.student.spec.steps_at
    assert Shards(tmp_path / "pairs", "ode_pairs").header["times"] == pytest.approx([*steps_at, 0.0])
    pairs = str(tmp_path / "pairs")
    started = trained(sprites.ode_init(batch_size=1, pairs=pairs, start=first), tmp_path / "init", 1)
    trained(sprites.consistency(batch_size=1, clips=2, teacher=forced), tmp_path / "consistency", 1)
    taught = sprites.consistency(teacher="sprites-wan-causal")  # a model, of which both roles begin
    assert {role.spec.weights for role in taught.objective.roles().values()} == {"sprites-wan-causal"}
    assert taught.init_from is None
    for name in ("dmd", "sid", "gan"):
        run = getattr(sprites, name)(batch_size=1, clips=2, start=started)
        objective = replace(run.objective, branch_warmup=1) if name == "gan" else run.objective
        trained(replace(run, objective=objective), tmp_path / name, 2 if name == "gan" else 1)


def test_a_stage_without_the_one_before_it_says_which(tmp_path, capsys):
    assert main(["train", "sprites:dmd", "--start", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "there is no folder" in (said := capsys.readouterr().err) and "train that run first" in said
    no, out = str(tmp_path / "no"), str(tmp_path / "out2")
    assert main(["train", "sprites:ode_init", "--pairs", no, "--out", out, "--start", "null"]) == 1
    assert "kinema prepare sprites:ode_pairs" in capsys.readouterr().err


def test_a_start_of_another_family_is_refused(tmp_path, capsys):
    write_model(tmp_path / "cog", "2B")
    (tmp_path / "notes").mkdir()
    for start in ("sprites-cogvideox", str(tmp_path / "cog"), str(tmp_path / "notes")):
        assert main(["train", "sprites:dmd", "--start", start, "--out", str(tmp_path / "out")]) == 1
        assert f"--start {start} is neither a Wan nor a run of one" in capsys.readouterr().err
    with pytest.raises(UserError, match="notes is no folder of a run"):
        initialise({}, tmp_path / "notes", {})


def test_what_prepares_does_not_train_and_the_reverse(tmp_path, capsys):
    assert main(["train", "sprites:ode_pairs"]) == 2
    assert "run it with kinema prepare" in capsys.readouterr().err
    assert main(["prepare", "sprites:dmd", "--start", "null"]) == 2
    assert "run it with kinema train" in capsys.readouterr().err
    assert main(["prepare", "sprites:ode_pairs", "--part", "2/2"]) == 2
    assert main(["prepare", "sprites:ode_pairs", "--clip", "4"]) == 2
    assert "did you mean --clips" in capsys.readouterr().err


def test_prepare_makes_a_folder(tmp_path, capsys):
    words = ["prepare", "sprites:ode_pairs", "--batch", "2", "--steps", "4", "--out", str(tmp_path)]
    assert main([*words, "--clips", "2"]) == 0
    assert len(Shards(tmp_path, "ode_pairs")) == 2
    assert main([*words, "--clips", "3"]) == 1
    assert "items 2, not 3" in capsys.readouterr().err


KINDS = {
    "causal_sft": Denoising,
    "diffusion_forcing": Denoising,
    "ode_init": OdeRegression,
    "dmd": DMD,
    "sid": SiD,
    "gan": GAN,
    "frame_wise": DMD,
    "image": DMD,
    "long": DMD,
    "realtime": DMD,
}


@pytest.mark.parametrize("name", KINDS)
def test_real_recipes_are_what_they_are_called_and_read_back(name, tmp_path):
    run = getattr(self_forcing, name)()
    assert type(run.objective) is KINDS[name]
    config.save(run, tmp_path / "run.yaml")
    assert config.load(tmp_path / "run.yaml") == run
    assert values(run)["shift"] == {5.0}


def test_published_values_are_in_the_recipes():
    run = self_forcing.dmd()
    objective = run.objective
    assert objective.student.spec.steps_at == pytest.approx((1, 0.9375, 0.8333333, 0.625))
    assert (run.steps, run.batch_size, objective.guidance, objective.student_every) == (600, 64, 4.0, 5)
    assert (objective.student.optim.lr, objective.critic.optim.lr) == (2e-6, 4e-7)
    assert objective.student.optim.betas == objective.critic.optim.betas == (0.0, 0.999)
    assert objective.student.ema.decay == 0.99 and objective.student.ema.start * objective.student_every == 200
    assert (self_forcing.sid().objective.critic.optim.lr, self_forcing.gan().objective.g_weight) == (2e-6, 0.01)
    pairs = self_forcing.ode_pairs(__file__)
    assert (pairs.guidance, pairs.compute) == (6.0, "float32")


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_smoke_of_the_real_recipes(name, tmp_path):
    trained(self_forcing.smoke(name), tmp_path, steps=3)


def test_smoke_of_those_that_need_data_asks_for_it(tmp_path):
    with pytest.raises(UsageError, match="--data DIR"):
        self_forcing.smoke("ode_init")
    made = sprites.ode_pairs(clips=2, batch=2, steps=4)
    made = replace(made, shape=(6, 16, 8, 8), teacher=replace(made.teacher, shift=5.0))
    prepare(made, tmp_path / "pairs", CPU)
    trained(self_forcing.smoke("ode_init", str(tmp_path / "pairs")), tmp_path / "init", steps=3)


def values(value, name="", found=None) -> dict[str, set]:
    """Every number of a tree of dataclasses, by the name of its field."""
    found = {} if found is None else found
    if is_dataclass(value):
        for f in fields(value):
            values(getattr(value, f.name), f.name, found)
    elif isinstance(value, float):
        found.setdefault(name, set()).add(value)
    return found


def test_fewer_steps_and_another_window_are_settings(tmp_path):
    model = pretrained.load(trained(sprites.dmd(batch_size=1, clips=4, start=None), tmp_path, steps=1), CPU)
    two = model.with_settings(steps=2, frames=57).with_window(6, 3)
    assert two.spec.steps_at == pytest.approx((1.0, 0.75)) and (two.spec.window, two.spec.sink) == (6, 3)
    assert two.settings()["window"] == 6 and two.settings() != model.settings()
    seven = model.with_settings(steps=7)  # steps as the student was taught them, and recorded so
    assert seven.spec.times(7) == seven.spec.steps_at == pytest.approx(shifted(7, 3.0))
    assert seven.settings()["sampler"] == "few-step" and len(seven.settings()["steps_at"]) == 7
    captions, scenes = evaluation.held_out(1)
    evaluation.evaluate(two, captions, scenes, tmp_path / "eval")
    result = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert [window["first"] for window in result["windows"]] == [0] and result["steps_at"] == [1.0, 0.75]
    with pytest.raises(UserError, match="not causal"):
        pretrained.load("sprites-wan", CPU).with_window(6, 3)
