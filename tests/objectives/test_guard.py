"""The collapse guard: silent in a healthy game, loud within 60 steps in a broken one; a function of its log."""

import json
from dataclasses import replace

import pytest
import torch
from games import CPU, Points, TwoModes

from kinema.errors import UserError
from kinema.evaluation.summary import from_folder
from kinema.objectives import monitors
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD
from kinema.objectives.objective import Role
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import keys
from kinema.training import checkpoint
from kinema.training.guard import HEALTHY, Guard, Healthy, read_rows, ring, update_size
from kinema.training.trainer import Trainer

FLAGGED = 60  # steps within which a broken run is told; the guard looks every 10


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A denoiser of points that knows which mode it is told, in one case out of four that it is told nothing."""
    folder = tmp_path_factory.mktemp("started")
    role = Role(Points(), Optim(lr=5e-3, anneal=300))
    made = Run(objective=Denoising(role), data=TwoModes(told=True), steps=300, batch_size=256, log_every=300)
    Trainer(made, folder, CPU).train()
    return str(folder)


def game(started, folder, steps=FLAGGED, guidance=2.0, critic_lr=6e-3):
    slow = {"betas": (0.0, 0.999), "weight_decay": 0.0}
    objective = DMD(
        student=Role(Points(), Optim(lr=1.5e-3, **slow), Ema(0.98)),
        critic=Role(Points(), Optim(lr=critic_lr, **slow)),
        teacher=Role(Points(known=True)),
        shape=(2, 1, 1),
        frames=(1, 1),
        scored=1,
        student_every=1,
        guidance=guidance,
    )
    made = Run(
        objective=objective,
        data=TwoModes(told=True),
        steps=steps,
        batch_size=128,
        save_every=10,
        keep=1,
        init_from=started,
        init_roles={"critic": "student"},
    )
    trainer = Trainer(made, folder, CPU)
    trainer.train()
    return trainer


def rung(folder):
    """The steps at which alarms rang."""
    return [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["alarms"]]


def test_a_healthy_game_rings_no_alarm(started, tmp_path):
    trainer = game(started, tmp_path, steps=200)
    assert not rung(tmp_path) and not trainer.guard.alarms
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert 0.5 < last["student/prompt"] < 4 and last["student/critic_fit"] < 1
    assert (checkpoint.latest(tmp_path / "checkpoints") / checkpoint.HEALTHY).exists()


def test_a_critic_that_does_not_learn_is_told(started, tmp_path, capsys):
    trainer = game(started, tmp_path, critic_lr=0.0)
    assert rung(tmp_path)[0] <= FLAGGED
    assert "update/critic" in {healthy.metric for healthy in trainer.guard.alarms}
    assert "the critic does not learn" in capsys.readouterr().out


def test_guidance_of_the_wrong_sign_is_told_and_the_last_healthy_checkpoint_stays(started, tmp_path, capsys):
    trainer = game(started, tmp_path, guidance=-4.0)
    first = rung(tmp_path)[0]
    assert first <= FLAGGED
    assert "student/prompt" in {healthy.metric for healthy in trainer.guard.alarms}
    assert "shun their prompts" in capsys.readouterr().out
    there = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "checkpoints")]
    assert there == [first - 10, FLAGGED]  # keep=1, and the one before the alarm
    report = from_folder(tmp_path).read_text(encoding="utf-8")
    assert "shun their prompts" in report
    again = Trainer(replace(trainer.run, steps=FLAGGED + 10), tmp_path, CPU)
    assert again.guard.alarms.keys() == trainer.guard.alarms.keys()


def test_directions_that_are_all_lost_stop_the_run(tmp_path):
    guard = Guard(tmp_path / "none.jsonl", 0)
    guard.watch({"student/not_finite": 0.2})
    guard.check(10, 7)
    guard.watch({"student/not_finite": 1.0})
    with pytest.raises(UserError, match="seed 7"):
        guard.check(20, 7)


def test_alarms_need_their_rows_and_end_when_it_is_well_again():
    healthy = Healthy("x", "1 to 2", "it is wrong", low=1.0, high=2.0, rows=2)
    assert not healthy.broken([{"x": 0.5}])
    assert "below 1" in healthy.broken([{"x": 0.5}, {"y": 1.0}, {"x": 0.4}])
    assert not healthy.broken([{"x": 0.5}, {"x": 0.4}, {"x": 1.5}])
    assert not healthy.broken([{"x": 0.5}, {"x": float("nan")}])
    assert not healthy.broken([{"x": 0.5}, {"x": 3.0}])  # not twice on the same side


def test_falls_are_measured_from_the_start():
    healthy = Healthy("x", "", "", fall=0.5, rows=1)
    rows = [{"x": value} for value in (2.0, 1.0, 3.0, 1.1)]
    assert not healthy.broken(rows) and healthy.broken([*rows, {"x": 0.9}])


def test_ratios_are_watched():
    healthy = Healthy("a", "", "", over="b", high=10.0, rows=1)
    assert healthy.broken([{"a": 11.0, "b": 1.0}]) and not healthy.broken([{"a": 11.0}])
    assert healthy.broken([{"a": 1.0, "b": 0.0}])


def test_a_torn_log_is_read_up_to_the_tear(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    assert not ring([]) and len({h.metric for h in HEALTHY}) > 10


def test_the_size_of_an_update_is_that_of_the_weights_change():
    weight = torch.nn.Parameter(keys(0, "w", [0]).normal(4, 5)[0].clone())
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    optimizer.state[weight] = {"step": torch.zeros(()), **moments}
    assert update_size(optimizer).isnan()  # a role whose turns begin later is not one that does not learn
    for step in range(3):
        weight.grad = keys(0, f"g{step}", [0]).normal(4, 5)[0]
        before = weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(update_size(optimizer), (weight - before).norm() / weight.norm(), atol=1e-6, rtol=1e-4)


# --- monitors --------------------------------------------------------------------------------------------------------


def test_monitors_know_collapsed_videos():
    x, noise = keys(0, "x", range(4)).normal(5, 3, 4, 4), keys(0, "noise", range(4))
    well = monitors.of_videos(x, noise)
    assert 0.9 < well["spread"] < 1.1 and 0.9 < well["diversity"] < 1.1 and abs(well["same_noise"]) < 0.2
    assert monitors.of_videos(x[:, :1].expand_as(x), noise)["motion"] == 0
    assert monitors.of_videos(x[:1].expand_as(x), noise)["diversity"] < 1e-6
    assert monitors.of_videos(x, noise[:1].__class__(noise.key[:1].expand(4), noise.place, 4, 0))["same_noise"] > 0.99
    assert monitors.of_videos(5 * x, noise)["saturated"] > 0.3
    assert monitors.of_videos(x[:1], noise[:1])["diversity"].isnan()


@pytest.mark.parametrize("w", [-2.0, 0.0, 1.0, 3.0])
def test_prompt_monitor_reads_the_guidance_videos_show(w):
    without, effect, rest = (keys(0, name, range(64)).normal(3, 4, 4, 4) for name in ("u", "e", "r"))
    with_ = without + 0.3 * effect
    x = without + w * (with_ - without) + rest
    t = torch.full((64, 1), 0.5)
    told = monitors.of_scores(x, t, with_, without, without, with_, True)
    assert told["prompt"] == pytest.approx(w, abs=0.15)
    assert told["gap_q3"].isfinite() and told["gap_q1"].isnan()


def test_critic_fit_is_one_for_a_copy_of_the_teacher():
    x, with_ = (keys(0, name, range(4)).normal(3, 4, 4, 4) for name in ("x", "c"))
    t = torch.full((4, 1), 0.5)
    assert monitors.of_scores(x, t, with_, with_, with_, with_, True)["critic_fit"] == 1
    assert monitors.of_scores(x, t, with_, (x + with_) / 2, with_, with_, True)["critic_fit"] < 0.3
