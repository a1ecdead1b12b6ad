import json
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from world import Waves, game, run, token_game

from kinema.errors import UserError
from kinema.objectives.objective import Turn
from kinema.optim import Ema, Optim
from kinema.training import checkpoint
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")


def state_after(folder, **changes):
    trainer = Trainer(run(**changes), folder, CPU)
    trainer.train()
    return {name: tensor.clone() for name, tensor in trainer._state().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_logged_row_waits_for_the_device_once(tmp_path, monkeypatch):
    trainer = Trainer(token_game(), tmp_path, CPU)
    trainer.advance()
    waits = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        there = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, there=there, name=name: (waits.append(name), there(x))[1])
    row, kept = trainer.measured()
    trainer.check(kept)
    assert waits == ["tolist"] and row["skipped"] == 0
    assert kept == {"streak": 0, "broken": 0, "broken_before": 0}


def test_resume_equals_straight_run(tmp_path):
    straight = state_after(tmp_path / "straight")
    killed = Trainer(run(), tmp_path / "killed", CPU)
    for _ in range(5):  # dies in step 5; the last checkpoint is of step 3
        for turn in killed.run.objective.turns():
            killed.take(turn)
        killed.step += 1
        if killed.step == 3:
            killed.save()
    killed.checkpoints.wait()
    assert equal(straight, state_after(tmp_path / "killed"))


def test_accumulated_gradient_equals_that_of_the_whole_batch(tmp_path):
    whole = state_after(tmp_path / "whole", steps=3)
    parts = state_after(tmp_path / "parts", steps=3, micro_batch=1)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"recompute": "block"}, {"compute": "bfloat16"}])
def test_plans_train_the_same_network(tmp_path, changes):
    plain = state_after(tmp_path / "plain", steps=2)
    other = state_after(tmp_path / "other", steps=2, plan=replace(run().plan, **changes))
    tolerance = 0.0 if "recompute" in changes else 0.03
    for name in plain:
        if ".model." in name:
            torch.testing.assert_close(plain[name], other[name], atol=tolerance, rtol=0)


def test_a_run_with_nan_skips_counts_and_stops_with_its_weights_unharmed(tmp_path):
    broken = run(data=Waves(broken=16), steps=50, max_skips=4)  # sample 16 is the first of step 4
    with pytest.raises(UserError, match="not finite"):
        Trainer(broken, tmp_path / "broken", CPU).train()
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == 4 and rows[-1]["step"] == 8
    trainer = Trainer(replace(broken, data=Waves(broken=16)), tmp_path / "broken", CPU)
    assert all(tensor.isfinite().all() for tensor in trainer._state().values())


def test_skipped_update_leaves_weights_moments_and_average(tmp_path):
    trainer = Trainer(run(data=Waves(broken=0)), tmp_path, CPU)
    before = {name: tensor.clone() for name, tensor in trainer._state().items() if name.startswith("student")}
    trainer.take(trainer.run.objective.turns()[0])
    assert equal(before, {name: tensor for name, tensor in trainer._state().items() if name.startswith("student")})


def test_only_named_parameters_learn_and_groups_have_their_rates(tmp_path):
    role = run().objective.roles()["student"]
    optim = Optim(lr=1e-2, train=r"self_attn\.(q|k)", groups={r"\.k\.": 1e-5})
    objective = replace(run().objective, student=replace(role, optim=optim))
    trainer = Trainer(run(objective=objective, steps=1), tmp_path, CPU)
    module = trainer.actors["student"].module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in module.named_parameters()}
    assert all(
        (size > 0) == ("self_attn.q" in name or "self_attn.k" in name)
        for name, size in moved.items()
        if "bias" not in name
    )
    assert (
        max(v for n, v in moved.items() if ".k." in n)
        < 2e-5
        < min(v for n, v in moved.items() if "attn.q.weight" in n and "self" in n)
    )


def test_nothing_to_train_is_an_error(tmp_path):
    role = run().objective.roles()["student"]
    objective = replace(run().objective, student=replace(role, optim=Optim(train="no such name")))
    with pytest.raises(UserError, match=r"optim\.train"):
        Trainer(run(objective=objective), tmp_path, CPU)


def test_half_written_checkpoint_is_never_chosen(tmp_path):
    trainer = Trainer(run(steps=6), tmp_path, CPU)
    trainer.train()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest.name == "step-00000006" and (tmp_path / "checkpoints" / "latest").resolve() == newest.resolve()
    (newest / checkpoint.MARKER).unlink()
    assert Trainer(run(steps=6), tmp_path, CPU).step == 3


def test_only_the_newest_checkpoints_stay(tmp_path):
    state_after(tmp_path, steps=8, save_every=2, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step-00000006", "step-00000008"]


def test_a_checkpoint_that_cannot_be_written_harms_nothing(tmp_path, monkeypatch):
    state_after(tmp_path, steps=3)
    trainer = Trainer(run(steps=6), tmp_path, CPU)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", full)
    trainer.save()
    with pytest.raises(UserError, match=r"No space left.*goes on from step-00000003"):
        trainer.checkpoints.wait()
    assert Trainer(run(steps=6), tmp_path, CPU).step == 3


def test_another_rank_may_make_the_folder_of_a_checkpoint_first(tmp_path, monkeypatch):
    def removed(path, **options):
        rmtree(path, **options)
        if path.name.startswith("writing"):
            path.mkdir(parents=True)

    rmtree = checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", removed)
    state_after(tmp_path, steps=3)
    assert Trainer(run(steps=6), tmp_path, CPU).step == 3


def test_truncated_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    state_after(tmp_path, steps=6)
    file = next((tmp_path / "checkpoints" / "step-00000006").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert Trainer(run(steps=6), tmp_path, CPU).step == 3
    assert "step-00000006 is damaged" in caplog.text and str(file.name) in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_unasked(tmp_path):
    state_after(tmp_path, steps=3)
    next((tmp_path / "checkpoints" / "step-00000003").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"all checkpoints .* are damaged"):
        Trainer(run(steps=6), tmp_path, CPU)


def test_what_is_written_is_the_state_of_the_moment_though_training_goes_on(tmp_path, monkeypatch):
    trainer, goes_on = Trainer(run(), tmp_path, CPU), threading.Event()
    write = checkpoint.Writer._write

    def slowly(self, *args):
        goes_on.wait()
        write(self, *args)

    monkeypatch.setattr(checkpoint.Writer, "_write", slowly)
    turn = trainer.run.objective.turns()[0]
    trainer.take(turn)
    then = {name: tensor.clone() for name, tensor in trainer._state().items()}
    trainer.save()
    trainer.take(turn)
    assert not equal(then, trainer._state())
    goes_on.set()
    trainer.checkpoints.wait()
    there = {name: torch.empty_like(tensor) for name, tensor in then.items()}
    checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"), there)
    assert equal(then, there)


def test_a_pinned_checkpoint_stays_however_many_follow(tmp_path):
    trainer = Trainer(run(), tmp_path, CPU)
    for step in range(1, 5):
        trainer.step = step
        trainer.save()
        trainer.checkpoints.wait()
        if step == 1:
            checkpoint.pin(checkpoint.latest(tmp_path / "checkpoints"))
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "checkpoints")] == [1, 3, 4]


@pytest.mark.parametrize(
    ("anneal", "says"),
    [(0, "raise --run.steps above 1"), (9, "raise --run.steps"), (1, "new run from it, with --run.init")],
)
def test_a_finished_run_says_how_to_train_further(tmp_path, capsys, anneal, says):
    objective = run().objective
    student = replace(objective.student, optim=replace(objective.student.optim, anneal=anneal))
    for _ in range(2):
        state_after(tmp_path, steps=1, objective=replace(objective, student=student))
    assert f"all 1 steps are done in {tmp_path}; to train further, " in (said := capsys.readouterr().out)
    assert says in said and (str(tmp_path) in said.partition("init_from")[2]) == (anneal == 1)


def test_a_finished_run_whose_teacher_was_a_student_is_no_start_of_another(tmp_path, capsys):
    state_after(tmp_path / "first", steps=1)
    start = {"init_from": str(tmp_path / "first"), "init_roles": {"teacher": "student"}}
    cast = game().objective
    student = replace(cast.student, optim=replace(cast.student.optim, anneal=1))
    for _ in range(2):
        Trainer(game(**start, steps=1, objective=replace(cast, student=student)), tmp_path / "second", CPU).train()
    said = capsys.readouterr().out
    assert "start anew, with a longer schedule" in said and "take its teacher from this one's student" in said
    assert "init_from" not in said


def test_folder_of_another_run_is_refused(tmp_path):
    state_after(tmp_path, steps=1)
    with pytest.raises(UserError, match="batch_size"):
        Trainer(run(batch_size=2), tmp_path, CPU)
    assert Trainer(run(steps=20), tmp_path, CPU).step == 1  # more steps of the same run are fine


def test_init_from_takes_the_average_of_another_run(tmp_path):
    state = state_after(tmp_path / "first", steps=3)
    trainer = Trainer(run(init_from=str(tmp_path / "first"), seed=5), tmp_path / "second", CPU)
    name = "blocks.0.ffn.0.weight"
    assert trainer.step == 0
    assert torch.equal(trainer.actors["student"].module.state_dict()[name], state[f"student.ema.{name}"])
    assert torch.equal(trainer._state()[f"student.ema.{name}"], state[f"student.ema.{name}"])


def test_init_from_another_role_of_another_run(tmp_path):
    state = state_after(tmp_path / "first", steps=3)
    start = {"init_from": str(tmp_path / "first"), "init_roles": {"critic": "student"}}
    trainer = Trainer(game(**start), tmp_path / "second", CPU)
    for name in ("student", "critic"):
        key = "blocks.0.ffn.0.weight"
        assert torch.equal(trainer._state()[f"{name}.model.{key}"], state[f"student.ema.{key}"])
    with pytest.raises(UserError, match="has no role pupil"):
        Trainer(run(**{**start, "init_roles": {"student": "pupil"}}), tmp_path / "third", CPU)


def test_metrics_of_a_resumed_run_have_every_step_once(tmp_path):
    state_after(tmp_path, steps=7, save_every=3, log_every=1)
    (tmp_path / "checkpoints" / "step-00000007" / checkpoint.MARKER).unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # torn by the kill
    state_after(tmp_path, steps=8, save_every=3, log_every=1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))


def test_average_is_the_recursion_of_its_definition(tmp_path):
    trainer = Trainer(run(), tmp_path, CPU)
    actor, name = trainer.actors["student"], "blocks.1.ffn.2.weight"
    average = actor.module.state_dict()[name].clone()
    for step in range(4):
        trainer.take(trainer.run.objective.turns()[0])
        trainer.step += 1
        keep = min(0.9, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * actor.module.state_dict()[name]
    torch.testing.assert_close(actor.average.module.state_dict()[name], average, atol=1e-6, rtol=1e-5)


def test_average_follows_exactly_until_it_starts():
    assert [Ema(0.99, start=2).keep_at(n) for n in range(4)] == [0.0, 0.0, 0.1, 2 / 11]


def test_learning_rate_is_a_function_of_the_step():
    optim = Optim(lr=2.0, warmup=3, anneal=13, floor=0.1)
    assert [optim.lr_at(s) for s in (0, 1, 2, 3)] == [0.5, 1.0, 1.5, 2.0]
    assert optim.lr_at(8) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert optim.lr_at(13) == optim.lr_at(500) == pytest.approx(0.2)
    assert [optim.lr_at(s, first=5) for s in (5, 6, 7, 8)] == [0.5, 1.0, 1.5, 2.0]  # of turns that begin late
    assert optim.lr_at(13, first=5) == pytest.approx(0.2)


def test_a_turn_is_due_at_its_multiples():
    assert [s for s in range(11) if Turn("critic", lambda *_: None, every=5).due(s)] == [0, 5, 10]


def test_previews_leave_weights_bitwise(tmp_path):
    trainer = Trainer(run(), tmp_path, CPU)
    module = trainer.actors["student"].average.module
    trainer.take(trainer.run.objective.turns()[0])
    before = {name: tensor.clone() for name, tensor in trainer._state().items()}
    reading = trainer.actors["student"].role.spec.read(module)
    reading(torch.randn(1, 3, 4, 4, 4), torch.ones(1, 1), {"text": torch.zeros(1, 2, 8)})
    assert equal(before, trainer._state())
